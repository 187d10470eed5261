"""Files from anybody, given to every script that reads one: no crash, no traceback, no code run, no unbounded memory.

Always exit status 2 and one line that names the file. The scripts run in processes forked from one that has imported
torch, each with a limit of memory and time; four cases also as real commands.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import data_files
import hostile_corpus
import pytest
from hostile_corpus import CANARY, Base, Case
from networks import binary_network, random_network
from script_server import Child, ScriptServer

from engine import checkpoints
from engine.checkpoints import LAST
from models.bitpack import pack_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 700_000_000  # bytes more than a process that has imported everything
CPU_SECONDS = 20
ABOUT = {"epoch": 3, "metrics": {"test_accuracy": 12.5}, "config": {"seed": 0}, "logit_scale": 0.125}
CORPUS = {str(case): case for case in hostile_corpus.corpus()}
GROUPS = list(dict.fromkeys(case.group for case in CORPUS.values()))


@dataclass(frozen=True)
class Reader:
    """A way to hand a file to a script: its name, perhaps an option; the good file that it takes; more options."""

    name: str
    base: str
    options: str = ""

    @property
    def script(self) -> str:
        return self.name.split()[0]

    def arguments(self, path: Path) -> list[object]:
        return [*self.name.split()[1:], path, *self.options.split()]

    def __str__(self) -> str:
        return self.name


TRAINING = "--limit-train 16 --limit-test 10 --batch-size 8 --wandb disabled"
READERS = [
    Reader("eval.py", "latent", "--limit-test 10"),
    Reader("eval_binarized.py", "latent", "--limit-test 10"),
    Reader("load_binarized_example.py", "binary", "--limit-test 10"),
    Reader("analyze_binary_weights.py", "binary"),
    Reader("save_binary_model.py", "latent", "--limit-test 10"),
    Reader("inspect_saved_model.py", "latent"),
    Reader("main.py --resume", "last of main.py", "--wandb disabled"),
    Reader("main_binary.py --resume", "last of main_binary.py", "--wandb disabled"),
    Reader("main_binary.py --init", "latent", f"{TRAINING} --epochs 1"),
    Reader("main_binary.py --teacher", "float", f"{TRAINING} --epochs 1"),
]
READS_PACKED = ("eval.py", "load_binarized_example.py", "analyze_binary_weights.py", "inspect_saved_model.py")


def readers_of(group: str) -> list[Reader]:
    """Who can be given the cases of a group."""
    if group == "packed":
        return [replace(reader, base="packed") for reader in READERS if reader.name in READS_PACKED]
    if group in ("state", "training"):
        return [reader for reader in READERS if "--resume" in reader.name]
    return READERS


def test_every_script_that_reads_a_checkpoint_is_among_the_readers():
    """A script that is added, or one that is missing, must be seen here."""
    reading = re.compile(r"\b(checkpoints\.(load|read)|Run\.start)\(")
    scripts = {path.name for path in ROOT.glob("*.py") if reading.search(path.read_text(encoding="utf-8"))}
    assert scripts == {reader.script for reader in READERS}


# -- good files to damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(child_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptServer]:
    server = ScriptServer(child_environment, tmp_path_factory.mktemp("outputs"))
    server.run("inspect_saved_model.py", "--help", cwd=tmp_path_factory.mktemp("warm"))  # the imports are done
    server.limit(memory=MEMORY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def bases(server: ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """A good file of each kind, and the checkpoint of a run that was stopped after an epoch."""
    state = random_network().state_dict()
    found = {kind: Base(checkpoints.make("resnet20", kind, state, **ABOUT)) for kind in ("float", "latent")}
    found["binary"] = Base(checkpoints.make("resnet20", "binary", binary_network().state_dict(), **ABOUT))
    packed = pack_model(binary_network(), "resnet20")
    found["packed"] = Base(checkpoints.make(packed.pop("arch"), packed.pop("kind"), None, **packed, **ABOUT))
    for script in ("main.py", "main_binary.py"):
        folder = tmp_path_factory.mktemp("run")
        options = [*TRAINING.split(), "--epochs", 2, "--data-dir", small_data]
        at = ("engine.training.loop.Trainer.train_epoch", 2, "SIGKILL")
        server.run(script, *options, cwd=folder, at=at, expect=-9)
        raw = checkpoints.load(folder / LAST).raw
        found[f"last of {script}"] = Base({key: value for key, value in raw.items() if key != "checksum"})
    return found


# -- giving them to the scripts ----------------------------------------------------------------------------------


class Trial:
    """Gives files to scripts one at a time, each in a folder of its own, and collects what went wrong."""

    def __init__(self, server: ScriptServer, bases: dict[str, Base], data: Path, folder: Path) -> None:
        self.server, self.bases, self.data, self._folder = server, bases, data, folder
        self.count, self.taken, self._failures = 0, 0, []

    def folder(self) -> Path:
        self.count += 1
        folder = self._folder / str(self.count)
        folder.mkdir()
        return folder

    def give(self, case: Case, reader: Reader) -> None:
        folder = self.folder()
        path = folder / "füle 1.pth"
        case.write(path, self.bases[reader.base])
        arguments, data = reader.arguments(path), {"CIFAR10_DIR": str(self.data)}
        child = self.server.start(reader.script, *arguments, cwd=folder, env=data)
        status, problems = self._wait(child, folder, named=path)
        if status == 0 and (case.harmless or reader.script == "inspect_saved_model.py"):  # it shows whatever it can
            self.taken += 1
            problems = ["something on stderr"] if child.errors else []
        written = {each.name for each in folder.glob("*.pth")} - {path.name}
        if status != 0 and written and not case.diverges and "--resume" not in reader.name:
            problems.append(f"{written} written")
        self._note(f"{reader}: {case}", problems, child, folder)

    def give_data(self, title: str, script: str, folder: Path, named: Path) -> None:
        """The data in `folder`, beside a checkpoint that fits the script."""
        arguments: list[object] = ["--data-dir", folder]
        if script.startswith("main"):
            arguments += ["--wandb", "disabled", "--epochs", 1]
        elif script != "cifar10.py":
            arguments.append(folder / "a.pth")
            base = "binary" if script.startswith("load") else "latent"
            (folder / "a.pth").write_bytes(self.bases[base].content)
        # What it would fetch in their place is the matter of test_cifar10, and asking for it takes seconds.
        offline = ("engine.data.fetch.download", 1, "ENETUNREACH")
        child = self.server.start(script, *arguments, cwd=folder, at=offline)
        _, problems = self._wait(child, folder, named)
        self._note(f"{script}: {title}", problems, child, folder)

    def _wait(self, child: Child, folder: Path, named: Path) -> tuple[object, list[str]]:
        """The exit status, and what a refusal in one line that names a file would have been."""
        child.limit(cpu_seconds=CPU_SECONDS)
        try:
            status: object = child.wait(120)
        except TimeoutError as error:
            status = str(error)
        lines = child.errors.count("\n")
        problems = {
            f"exit status {status}": status != 2,
            f"{lines} lines on stderr": lines != 1 or not child.errors.startswith("Error: "),
            "the file is not named": str(named) not in child.errors,
            "it was the limit that stopped it": "more memory than there is" in child.errors,
        }
        return status, [problem for problem, there in problems.items() if there]

    def _note(self, what: str, problems: list[str], child: Child, folder: Path) -> None:
        if (folder / CANARY).exists():
            problems.append("code was run")
        if problems:
            self._failures.append(f"{what}: {'; '.join(problems)}\n{child.errors[-1500:]}")
        shutil.rmtree(folder)

    def report(self) -> None:
        listed = "\n".join(self._failures[:40])
        assert not self._failures, f"{len(self._failures)} of {self.count} went wrong:\n{listed}"
        print(f"{self.count} files, 0 went wrong")  # for -rP


@pytest.fixture
def trial(server: ScriptServer, bases: dict[str, Base], small_data: Path, tmp_path: Path) -> Trial:
    return Trial(server, bases, small_data, tmp_path)


def test_the_corpus_is_large_and_without_repetitions():
    assert len(CORPUS) == len(hostile_corpus.corpus()) >= 700


@pytest.mark.parametrize("reader", [*READERS, *readers_of("packed")], ids=lambda each: f"{each}, {each.base}")
def test_the_good_files_are_taken(trial, reader):
    """Otherwise what follows would prove nothing."""
    trial.give(Case("odd", "a good file", lambda base: base.content), reader)
    trial.report()
    assert trial.taken == 1


def give_in_turn(trial: Trial, group: str) -> None:
    """Each file meets a script, and each script every kind of damage."""
    cases, readers = [case for case in CORPUS.values() if case.group == group], readers_of(group)
    for turn in range(max(len(cases), len(readers))):
        trial.give(cases[turn % len(cases)], readers[turn % len(readers)])
    trial.report()


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("state", "training")])
def test_hostile_files_are_refused(trial, group):
    give_in_turn(trial, group)


@pytest.mark.parametrize("group", ["state", "training"])
def test_hostile_training_states_are_refused(trial, group):
    give_in_turn(trial, group)


@pytest.mark.parametrize("reader", [r for r in READERS if r.script.startswith("main")], ids=str)
def test_weights_that_make_training_diverge_are_named(trial, reader):
    """They are finite, each of them: only the training that begins with them shows what they are."""
    for name in hostile_corpus.DIVERGES:
        trial.give(CORPUS[name], reader)
    trial.report()
    assert trial.count == 3


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_every_hostile_file_is_refused_by_every_script(trial, reader):
    for case in CORPUS.values():
        for each in readers_of(case.group):
            if each.name == reader.name:
                trial.give(case, each)
    trial.report()


def test_what_float32_cannot_fold_is_not_packed(trial):
    """The input is named, not the file that would have been made."""
    packing = next(reader for reader in READERS if reader.script == "save_binary_model.py")
    for case in CORPUS.values():
        if case.group == "folding":
            trial.give(case, packing)
    trial.report()
    assert (trial.count, trial.taken) == (2, 0)


# -- as real commands --------------------------------------------------------------------------------------------

AS_COMMANDS = {
    "truncated: to 15/21": "eval.py",
    "bomb: a key that doubles, old format": "inspect_saved_model.py",
    "values: nan in conv1.weight": "main_binary.py --resume",
    "code: a state of a class": "main_binary.py --init",
}


@pytest.mark.parametrize("name", AS_COMMANDS)
def test_as_a_command(name, bases, small_data, tmp_path, run_script):
    reader = next(reader for reader in READERS if reader.name == AS_COMMANDS[name])
    path = tmp_path / "a.pth"
    CORPUS[name].write(path, bases[reader.base])
    environment = {"CIFAR10_DIR": str(small_data)}
    done = run_script(reader.script, *reader.arguments(path), cwd=tmp_path, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr
    assert {each.name for each in tmp_path.iterdir()} <= {"a.pth", ".run.lock"}


# -- data --------------------------------------------------------------------------------------------------------

SCORING = ["eval.py", "eval_binarized.py", "load_binarized_example.py", "save_binary_model.py"]
DATA_SCRIPTS = ["cifar10.py", *SCORING, "main.py", "main_binary.py"]
TEST_BATCHES = {"cifar-10-batches-bin": "test_batch.bin", "cifar-10-batches-py": "test_batch"}


@pytest.fixture(scope="module")
def good_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    data_files.write_binary(folder / "cifar-10-batches-bin", train=20, test=10)
    data_files.write_python(folder / "cifar-10-batches-py", train=20, test=10)
    return folder


def test_hostile_data_is_refused(trial, good_data, request):
    """Checksums match, so it is the content that must be refused; without them, the official ones do not match."""
    every = request.config.getoption("--full")
    cases = [(kind, title) for kind, table in hostile_corpus.DATA.items() for title in table]
    for turn, (official, (kind, title)) in enumerate(itertools.product((False, True), cases)):
        for script in DATA_SCRIPTS if every else [DATA_SCRIPTS[turn % len(DATA_SCRIPTS)]]:
            folder = trial.folder()
            data = Path(shutil.copytree(good_data / kind, folder / kind))
            (data / TEST_BATCHES[kind]).write_bytes(hostile_corpus.DATA[kind][title])
            (data / "SHA256SUMS").unlink(missing_ok=True)
            if not official:
                data_files.write_sums(data)
            trial.give_data(f"{kind}, {title}, official {official}", script, folder, named=data)
    trial.report()


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to itself", "/dev/zero", "a hole of 1 TB", "empty"])
def test_what_is_no_data_file_is_refused(trial, good_data, kind):
    """In place of the test batch and in place of its checksums."""
    for name in ("test_batch.bin", "SHA256SUMS"):
        folder = trial.folder()
        data = Path(shutil.copytree(good_data / "cifar-10-batches-bin", folder / "cifar-10-batches-bin"))
        (data / name).unlink()
        CORPUS[f"not a file: {kind}"].write(data / name, trial.bases["latent"])
        trial.give_data(f"{kind} for {name}", "eval.py", folder, named=data)
    trial.report()


def test_limits_are_in_force(server, bases, tmp_path):
    """A process that takes more memory than it may is stopped by the limit, so the tests above mean something."""
    (tmp_path / "a.pth").write_bytes(bases["latent"].content)
    for more, status in ((MEMORY // 2, 0), (MEMORY + 1, 2)):
        at = ("engine.checkpoints.load", 1, f"{more} bytes")
        child = server.run("inspect_saved_model.py", "a.pth", cwd=tmp_path, at=at, expect=status)
        assert child.errors.startswith("Error: out of memory; ") == (status == 2)
