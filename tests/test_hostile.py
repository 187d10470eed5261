"""Files from anybody, given to every script that reads one: no crash, no traceback, no code run, no unbounded memory.

Always exit status 2 and one line that names the file. The scripts run in processes forked from one that has imported
torch, each with a limit of memory and time; ten cases also as real commands.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import data_files
import hostile_corpus
import pytest
from hostile_corpus import CANARY, Base, Case
from networks import binary_network, random_network
from script_server import ScriptServer

from engine import checkpoints
from engine.checkpoints import LAST
from engine.cli import UserError
from models.bitpack import pack_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 1_500_000_000  # bytes more than a process that has imported everything
CPU_SECONDS = 20
ABOUT = {"epoch": 3, "metrics": {"test_accuracy": 12.5}, "config": {"seed": 0}, "logit_scale": 0.125}


@dataclass(frozen=True)
class Reader:
    """A way to hand a file to a script: what it would take, and the command line."""

    name: str
    base: str
    arguments: Callable[[Path], list[object]]
    shows_others: bool = False  # exit status 0 is right for whatever can be read at all

    @property
    def script(self) -> str:
        return self.name.split()[0]

    def __str__(self) -> str:
        return self.name


def scoring(path: Path) -> list[object]:
    return [path, "--limit-test", 10]


READERS = [
    Reader("eval.py", "latent", scoring),
    Reader("eval_binarized.py", "latent", scoring),
    Reader("load_binarized_example.py", "binary", scoring),
    Reader("analyze_binary_weights.py", "binary", lambda path: [path]),
    Reader("save_binary_model.py", "latent", scoring),
    Reader("inspect_saved_model.py", "latent", lambda path: [path], shows_others=True),
    Reader("main.py --resume", "last of main.py", lambda path: ["--resume", path]),
    Reader("main_binary.py --resume", "last of main_binary.py", lambda path: ["--resume", path]),
    Reader("main_binary.py --init", "latent", lambda path: ["--init", path]),
    Reader("main_binary.py --teacher", "float", lambda path: ["--teacher", path]),
]
TAKE_PACKED = ("eval.py", "load_binarized_example.py", "analyze_binary_weights.py", "inspect_saved_model.py")
READS_PACKED = [reader for reader in READERS if reader.script in TAKE_PACKED]
RESUMES = [reader for reader in READERS if "--resume" in reader.name]


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
    found = {kind: Base.of(checkpoints.make("resnet20", kind, state, **ABOUT)) for kind in ("float", "latent")}
    found["binary"] = Base.of(checkpoints.make("resnet20", "binary", binary_network().state_dict(), **ABOUT))
    packed = pack_model(binary_network(), "resnet20")
    found["packed"] = Base.of(checkpoints.make(packed.pop("arch"), packed.pop("kind"), None, **packed, **ABOUT))
    for script in ("main.py", "main_binary.py"):
        folder = tmp_path_factory.mktemp("run")
        at = ("engine.training.loop.Trainer.train_epoch", 2, "SIGKILL")
        server.run(script, *training_options(small_data), "--epochs", 2, cwd=folder, at=at, expect=-9)
        raw = dict(checkpoints.load(folder / LAST).raw)
        del raw["checksum"]
        found[f"last of {script}"] = Base.of(raw)
    return found


def training_options(data: Path) -> list[object]:
    return ["--data-dir", data, "--limit-train", 16, "--limit-test", 10, "--batch-size", 8, "--wandb", "disabled"]


# -- giving them to the scripts ----------------------------------------------------------------------------------


class Trial:
    """Gives files to scripts one at a time, each in a folder of its own, and collects what went wrong."""

    def __init__(self, server: ScriptServer, bases: dict[str, Base], data: Path, folder: Path) -> None:
        self.server, self.bases, self.data, self.folder = server, bases, data, folder
        self.count, self.taken, self.failures = 0, 0, []

    def give(self, case: Case, reader: Reader, base: str = "") -> None:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        path = folder / "füle 1.pth"
        case.write(path, self.bases[base or reader.base])
        child = self.server.start(reader.script, *reader.arguments(path), *self._options(reader), cwd=folder)
        child.limit(cpu_seconds=CPU_SECONDS)
        try:
            status = child.wait(120)
        except TimeoutError as error:
            status = str(error)
        self.taken += status == 0
        problems = self._problems(case, reader, status, child.errors, path)
        if (folder / CANARY).exists():
            problems.append("code was run")
        left = [p.name for p in folder.iterdir() if p.suffix == ".pth" and p != path] if status != 0 else []
        if left and not case.diverges and "--resume" not in reader.name:
            problems.append(f"{left} written")
        if problems:
            self.failures.append(f"{reader}: {case}: {'; '.join(problems)}\n{child.errors[-1500:]}")
        shutil.rmtree(folder)

    def _options(self, reader: Reader) -> list[object]:
        if reader.script in ("inspect_saved_model.py", "analyze_binary_weights.py"):
            return []
        if "--resume" in reader.name:
            return ["--data-dir", self.data, "--wandb", "disabled"]
        if reader.script == "main_binary.py":
            return [*training_options(self.data), "--epochs", 1]
        return ["--data-dir", self.data]

    def _problems(self, case: Case, reader: Reader, status: object, errors: str, path: Path) -> list[str]:
        if status == 0 and (case.harmless or reader.shows_others):
            return ["something on stderr"] if errors else []
        problems = []
        if status != 2:
            problems.append(f"exit status {status}")
        if errors.count("\n") != 1 or not errors.startswith("Error: "):
            problems.append(f"{errors.count(chr(10))} lines on stderr")
        if str(path) not in errors:
            problems.append("the file is not named")
        if "more memory than there is" in errors:
            problems.append("it was the limit that stopped it")
        return problems

    def report(self) -> None:
        listed = "\n".join(self.failures[:40])
        assert not self.failures, f"{len(self.failures)} of {self.count} went wrong:\n{listed}"


@pytest.fixture
def trial(server: ScriptServer, bases: dict[str, Base], small_data: Path, tmp_path: Path) -> Trial:
    return Trial(server, bases, small_data, tmp_path)


CORPUS = hostile_corpus.corpus()
BY_NAME = {str(case): case for case in CORPUS}
GROUPS = list(dict.fromkeys(case.group for case in CORPUS))


def test_the_corpus_is_large_and_without_repetitions():
    assert len(BY_NAME) == len(CORPUS) >= 500


RULES = {
    "another kind: a tar that looks like a pickle": "a tar archive",
    "another kind: constants beside a pickle": "TorchScript",
    "code: in a part of another case": "one name",
    "code: in a second part of that name": "one name",
    "code: a registered extension": "EXT1",
    "bomb: compressed": "compressed",
    "bomb: overlapping parts": "overlap",
    "bomb: sixty thousand parts": "too many parts",
    "bomb: a memo of 2**31": "more memory than it can need",
    "bomb: bytes copied": "too many copies",
    "bomb: sets copied, old format": "too many keys",
    "bomb: dictionaries copied": "too many",
    "bomb: arrays copied": "too many copies",
    "bomb: files in the file copied": "too many copies",
    "bomb: a list that holds itself": "or itself",
    "bomb: a million values": "too many values",
    "bomb: lists fifty deep": "too many values",
    "bomb: a text many times": "too many copies of one text",
    "bomb: a tuple 400,000 deep as a key": "no plain value",
    "bomb: a key that doubles": "no plain value",
    "bomb: thirty million dictionaries, old format": "too long",
    "bomb: names of a megabyte": "too long a name",
    "bomb: keys that collide": "too many keys",
    "bomb: a number of six hundred digits": "too many digits",
    "bomb: a storage of 4 TB": "another size",
    "bomb: a storage of 4 TB, old format": "another size",
    "bomb: 4 TB from one number": "larger than the file",
    "values: many views of one memory": "share one place",
    "crooked: five thousand dimensions": "no proper shape",
    "crooked: an offset beyond the end": "beyond its storage",
    "crooked: a storage of no type": "NoStorage",
    "crooked: a part of a storage": "invalid storage",
    "crooked: of another byte order": "byte order",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_message_says_what_was_refused(tmp_path, name):
    """And so each rule is seen to act, not the next one behind it."""
    state = random_network().state_dict()
    BY_NAME[name].write(tmp_path / "a.pth", Base.of(checkpoints.make("resnet20", "latent", state, **ABOUT)))
    with pytest.raises(UserError, match=RULES[name]) as refused:
        checkpoints.load(tmp_path / "a.pth")
    assert "refused" in str(refused.value) or name.startswith("another kind")


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_the_good_files_are_taken(trial, reader):
    """Otherwise what follows would prove nothing."""
    good = Case("good", "file", lambda path, base: path.write_bytes(base.content), harmless=True)
    trial.give(good, reader)
    if reader in READS_PACKED:
        trial.give(good, reader, base="packed")
    trial.report()
    assert trial.count == trial.taken > 0


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_files_are_refused(trial, group):
    """Each file meets a script, and each script every kind of damage."""
    cases = [case for case in CORPUS if case.group == group]
    for turn in range(max(len(cases), len(READERS))):
        trial.give(cases[turn % len(cases)], READERS[turn % len(READERS)])
    trial.report()


def test_hostile_one_bit_files_are_refused(trial):
    for turn, case in enumerate(hostile_corpus.packed()):
        trial.give(case, READS_PACKED[turn % len(READS_PACKED)], base="packed")
    trial.report()


def test_hostile_training_states_are_refused(trial):
    """Of the strange values every third, to both scripts in turn; the others to BinaryConnect: Adam counts steps."""
    full_precision, binary = RESUMES
    for turn, case in enumerate(hostile_corpus.training()):
        if case.group != "state":
            trial.give(case, binary)
        elif turn % 3 == 0:
            trial.give(case, (full_precision, binary)[turn % 2])
    trial.report()


@pytest.mark.parametrize("reader", [r for r in READERS if r.script.startswith("main")], ids=str)
def test_weights_that_make_training_diverge_are_named(trial, reader):
    """They are finite, each of them: only the training that begins with them shows what they are."""
    for case in CORPUS:
        if case.diverges:
            trial.give(case, reader)
    trial.report()
    assert trial.count == 3


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_every_hostile_file_is_refused_by_every_script(trial, reader):
    for case in CORPUS:
        trial.give(case, reader)
    for case in hostile_corpus.packed() if reader in READS_PACKED else ():
        trial.give(case, reader, base="packed")
    for case in hostile_corpus.training() if reader in RESUMES else ():
        trial.give(case, reader)
    trial.report()
    print(f"{reader}: {trial.count} files, 0 went wrong")


def test_what_float32_cannot_fold_is_not_packed(trial):
    """The input is named, not the file that would have been made."""
    packing = next(reader for reader in READERS if reader.script == "save_binary_model.py")
    for case in CORPUS:
        if case.group == "folding":
            trial.give(case, packing)
    trial.report()
    assert trial.count == 2
    assert trial.taken == 0


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
    BY_NAME[name].write(path, bases[reader.base])
    environment = {"CIFAR10_DIR": str(small_data)}
    done = run_script(reader.script, *reader.arguments(path), cwd=tmp_path, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr
    assert {each.name for each in tmp_path.iterdir()} <= {"a.pth", ".run.lock"}


# -- data --------------------------------------------------------------------------------------------------------

SCORING = ["eval.py", "eval_binarized.py", "load_binarized_example.py", "save_binary_model.py"]
DATA_SCRIPTS = ["cifar10.py", *SCORING, "main.py", "main_binary.py"]


@pytest.fixture(scope="module")
def good_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {
        "binary": data_files.write_binary(folder / "b" / "cifar-10-batches-bin", train=20, test=10),
        "python": data_files.write_python(folder / "p" / "cifar-10-batches-py", train=20, test=10),
    }


def hostile_folder(folder: Path, good: Path, form: str, content: bytes, *, official: bool) -> Path:
    """A data folder with `content` for a test batch; returns that file. official: without a SHA256SUMS of its own."""
    shutil.copytree(good, folder / good.name)
    path = folder / good.name / ("test_batch.bin" if form == "binary" else "test_batch")
    path.write_bytes(content)
    (folder / good.name / "SHA256SUMS").unlink(missing_ok=True)
    if not official:
        data_files.write_sums(folder / good.name)
    return path


def test_hostile_data_is_refused(server, bases, good_data, tmp_path, request):
    """Checksums match, so it is the content that must be refused; without them, the official ones do not match."""
    failures, turn, given = [], 0, 0
    every = request.config.getoption("--full")
    for title, form, content in hostile_corpus.data_files():
        for official in (False, True):
            turn += 1
            for script in DATA_SCRIPTS if every else [DATA_SCRIPTS[turn % len(DATA_SCRIPTS)]]:
                folder = tmp_path / f"{turn} {script}"
                path = hostile_folder(folder, good_data[form], form, content, official=official)
                problems = give_data(server, script, folder, path, bases)
                given += 1
                if problems:
                    failures.append(f"{script}: {title}, official {official}: {problems}")
                shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    print(f"data: {given} times given to a script, 0 went wrong")  # for -rP


def give_data(server: ScriptServer, script: str, folder: Path, path: Path, bases: dict[str, Base]) -> str:
    arguments: list[object] = ["--data-dir", folder]
    if script.startswith("main"):
        arguments += ["--wandb", "disabled", "--epochs", 1]
    elif script != "cifar10.py":
        checkpoint_path = folder / "a.pth"
        checkpoint_path.write_bytes(bases["binary" if script.startswith("load") else "latent"].content)
        arguments.append(checkpoint_path)
    # What it would fetch in their place is the matter of test_cifar10, and asking for it takes seconds.
    child = server.start(script, *arguments, cwd=folder, at=("engine.data.fetch.download", 1, "ENETUNREACH"))
    child.limit(cpu_seconds=CPU_SECONDS)
    status = child.wait(120)
    errors = child.errors
    if status != 2 or errors.count("\n") != 1 or str(path.parent) not in errors or (folder / CANARY).exists():
        return f"exit status {status}, canary {(folder / CANARY).exists()}, {child.output[-500:]}{errors[-1500:]}"
    return ""


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to itself", "/dev/zero", "a hole of 1 TB", "empty"])
def test_what_is_no_data_file_is_refused(server, bases, good_data, tmp_path, kind):
    """In place of the test batch and in place of its checksums."""
    for name in ("test_batch.bin", "SHA256SUMS"):
        folder = tmp_path / name
        path = hostile_folder(folder, good_data["binary"], "binary", bytes(3073), official=False).with_name(name)
        path.unlink()
        BY_NAME[f"not a file: {kind}"].write(path, bases["latent"])
        assert give_data(server, "eval.py", folder, path, bases) == ""


def test_limits_are_in_force(server, bases, tmp_path):
    """A process that takes more memory than it may is stopped by the limit, so the tests above mean something."""
    (tmp_path / "a.pth").write_bytes(bases["latent"].content)
    for more, status in ((MEMORY // 2, 0), (MEMORY + 1, 2)):
        at = ("engine.checkpoints.load", 1, f"{more} bytes")
        child = server.run("inspect_saved_model.py", "a.pth", cwd=tmp_path, at=at, expect=status)
        assert child.errors.startswith("Error: out of memory; ") == (status == 2)
