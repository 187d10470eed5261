"""A training process may end at any moment, by whatever hand: nothing is lost, and going on changes nothing."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import RUN_FILES, assert_all_load, differences, essence, small_options
from script_server import Child, ScriptServer

from engine.checkpoints import FINAL, LAST
from engine.cli import as_typed

ROOT = Path(__file__).resolve().parent.parent

EPOCHS = 3


@pytest.fixture(scope="module")
def never_killed(
    scripts: ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """never_killed(script): the folder of a small run that nobody has stopped. Not to be written to."""
    made: dict[str, Path] = {}

    def make(script: str) -> Path:
        if script not in made:
            made[script] = tmp_path_factory.mktemp("never-killed")
            scripts.run(script, *small_options(small_data), cwd=made[script])
        return made[script]

    return make


class Chain:
    """One folder in which runs are started, stopped and resumed again and again.

    After each stop all checkpoints must load; each run that reaches its end must equal one that was never stopped.
    The next one then starts anew in the same folder, which moves the finished files aside.
    """

    def __init__(self, scripts: ScriptServer, script: str, data: Path, folder: Path, never_killed: Path) -> None:
        self.scripts, self.script, self.data, self.folder = scripts, script, data, folder
        self.expected = essence(never_killed)
        self.kills = self.finished = self.resumed = 0
        self._fresh = True
        self._sets = 0  # of files of finished runs, in the folder and below it

    def start(self, at: tuple[str, int, str] | None = None) -> Child:
        resume = (self.folder / LAST).exists() and not self._fresh
        self.resumed += resume
        arguments = ["--resume", "--data-dir", self.data] if resume else small_options(self.data, epochs=EPOCHS)
        return self.scripts.start(self.script, *arguments, "--wandb", "disabled", cwd=self.folder, at=at)

    def ended(self, child: Child) -> None:
        """Take stock of a process that was killed, or was quicker than the killer."""
        status = child.wait()
        self._fresh = status == 0
        assert_all_load(self.folder)
        if status == -signal.SIGKILL:
            self.kills += 1
        else:
            assert status == 0, f"exit status {status}\n{child.output}\n{child.errors}"
            self.finished += 1
            assert differences(essence(self.folder), self.expected) == []
            assert not list(self.folder.glob("*.tmp-*"))
        found = min(len(list(self.folder.rglob(name))) for name in RUN_FILES)
        if status == 0:
            self._sets = found
        assert found >= self._sets, "a file of a finished run is neither here nor moved aside nor on its way"

    def finish(self) -> None:
        self.ended(self.start())
        assert self.finished
        assert self.resumed, "no kill left anything to resume"
        for kept in self.folder.glob("previous-*"):
            assert {path.name for path in kept.iterdir()} == set(RUN_FILES)
        print(f"{self.kills} kills, {self.resumed} resumed, {self.finished} finished as if never killed")  # for -rP


def how_many(request: pytest.FixtureRequest, default: int, full: int) -> int:
    return full if request.config.getoption("--full") else default


@pytest.mark.parametrize(("script", "default", "full"), [("main_binary.py", 12, 70), ("main.py", 8, 40)])
def test_kills_at_random_moments(
    scripts: ScriptServer,
    small_data: Path,
    tmp_path: Path,
    never_killed: Callable[[str], Path],
    request: pytest.FixtureRequest,
    script: str,
    default: int,
    full: int,
) -> None:
    chain = Chain(scripts, script, small_data, tmp_path, never_killed(script))
    moments = random.Random(script)
    started = time.monotonic()
    chain.ended(chain.start())
    longest = time.monotonic() - started
    while chain.kills < how_many(request, default, full):
        child = chain.start()
        child.ended.wait(moments.uniform(0, longest))
        child.send(signal.SIGKILL)
        chain.ended(child)
    chain.finish()


def test_kills_at_file_operations(
    scripts: ScriptServer,
    small_data: Path,
    tmp_path: Path,
    never_killed: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    """The first process dies at its first file operation, or halfway through it; the next at its second..."""
    chain = Chain(scripts, "main_binary.py", small_data, tmp_path, never_killed("main_binary.py"))
    for number in range(1, how_many(request, 16, 90)):
        chain.ended(chain.start(at=("file operation", number, "SIGKILL")))
    assert chain.kills > 8
    chain.finish()


def test_kills_when_something_happens(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, never_killed: Callable[[str], Path]
) -> None:
    chain = Chain(scripts, "main_binary.py", small_data, tmp_path, never_killed("main_binary.py"))

    def temporary_file(of: str) -> Callable[[], bool]:
        return lambda: any(tmp_path.glob(f"{of}.tmp-*"))

    def changed(name: str) -> Callable[[], bool]:
        before = (tmp_path / name).stat().st_mtime_ns if (tmp_path / name).exists() else None
        return lambda: (tmp_path / name).exists() and (tmp_path / name).stat().st_mtime_ns != before

    def line(child: Child) -> Callable[[], bool]:
        return lambda: "\nepoch " in child.output

    events: list[Callable[[Child], Callable[[], bool]]] = [
        lambda _: temporary_file(LAST),
        lambda _: changed(LAST),
        line,
        lambda _: changed("metrics.csv"),
        lambda _: temporary_file("best_model.pth"),
        lambda _: temporary_file(FINAL),
        lambda _: changed(FINAL),
    ]
    for event in events:
        child = chain.start()
        child.wait_until(event(child))
        child.send(signal.SIGKILL)
        chain.ended(child)
    assert chain.kills >= 4
    chain.finish()


def test_kills_while_old_files_are_moved_aside(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, never_killed: Callable[[str], Path]
) -> None:
    old = {name: (never_killed("main.py") / name).read_bytes() for name in RUN_FILES}
    folders_seen = set()
    for number in range(1, 14):
        folder = tmp_path / str(number)
        shutil.copytree(never_killed("main.py"), folder)
        at = ("file operation", number, "SIGKILL")
        scripts.run("main.py", *small_options(small_data), cwd=folder, at=at, expect=-signal.SIGKILL)
        folders_seen.update(path.name for path in folder.glob("previous*"))
        where = {name: next(path for path in folder.rglob(name) if path.read_bytes() == old[name]) for name in old}
        if not (folder / "previous-1").exists() and number % 2:
            resumed = scripts.run("main.py", "--resume", "--data-dir", small_data, cwd=folder)
            assert "this run is finished" in resumed.output
            assert {name: (folder / name).read_bytes() for name in old} == old, where
            continue
        begun = ("engine.training.loop.Trainer.train_epoch", 1, "SIGTERM")
        scripts.run("main.py", *small_options(small_data), cwd=folder, at=begun, expect=143)
        kept = [path for path in folder.glob("previous-*") if (path / FINAL).exists()]
        assert [path.name for path in kept] == ["previous-1"]
        assert {path.name: path.read_bytes() for path in kept[0].iterdir()} == old
        assert not list(folder.glob("*.part"))
    assert folders_seen == {"previous-1.part", "previous-1"}


# -- signals that ask ----------------------------------------------------------------------------------------

BEFORE_ANYTHING_IS_SAVED = [
    "engine.training.run.parse",
    "cifar10.load",
    "engine.training.run.set_aside",
    "engine.checkpoints.save",
]
MOMENTS = [
    ("engine.training.loop.WandbRun", 1),
    ("models.binaryconnect.BC.binarization", 1),  # the first step
    ("models.binaryconnect.BC.restore", 2),  # weights are binary at this moment
    ("engine.training.loop.Trainer.finish_epoch", 1),
    ("torch.bincount", 1),  # while scoring
    ("models.binaryconnect.BC.restore", 1),  # after it: an exception here leaves binary weights in the network
    ("half-written", 1),  # best_model.pth
    ("models.binaryconnect.BC.clip", 4),  # in the middle of the second epoch
    ("engine.training.loop.write_metrics", 1),
    ("engine.training.loop.Trainer.finish", 1),  # by the process that has done the last epoch
    ("replace", 1),
    ("torch.bincount", 1),
    ("engine.training.loop.draw_curves", 1),
]


@pytest.mark.parametrize("first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_signals_at_many_moments(
    scripts: ScriptServer,
    small_data: Path,
    tmp_path: Path,
    never_killed: Callable[[str], Path],
    first: signal.Signals,
) -> None:
    """One run, stopped in turn by Ctrl-C and SIGTERM, ends as if nobody had stopped it."""
    names = [first.name, "SIGTERM" if first == signal.SIGINT else "SIGINT"]
    status = {"SIGINT": 130, "SIGTERM": 143}
    options = small_options(small_data, epochs=EPOCHS)
    for number, moment in enumerate(BEFORE_ANYTHING_IS_SAVED):
        name = names[number % 2]
        child = scripts.run("main_binary.py", *options, cwd=tmp_path, at=(moment, 1, name), expect=status[name])
        assert len(child.errors.splitlines()) == 1
        assert "Traceback" not in child.errors
        assert not list(tmp_path.glob("*.pth"))
    for number, (moment, count) in enumerate(MOMENTS):
        name = names[number % 2]
        child = scripts.start("main_binary.py", *options, cwd=tmp_path, at=(moment, count, name))
        assert child.wait() == status[name], (moment, child.output, child.errors)
        assert "Traceback" not in child.errors
        script = as_typed(ROOT / "main_binary.py")
        go_on = f"Go on with: python3 {script} --resume --data-dir {as_typed(small_data)} --wandb disabled"
        assert child.errors.splitlines()[-1].endswith(go_on)
        assert_all_load(tmp_path)
        assert not list(tmp_path.glob("*.tmp-*"))
        options = ["--resume", "--data-dir", small_data, "--wandb", "disabled"]
    scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert differences(essence(tmp_path), essence(never_killed("main_binary.py"))) == []


def test_ctrl_c_saves_that_very_step(scripts: ScriptServer, small_data: Path, tmp_path: Path) -> None:
    step = "main.distributed.gradient_share"  # called once in each
    child = scripts.run("main.py", *small_options(small_data), cwd=tmp_path, at=(step, 3, "SIGINT"), expect=130)
    assert "holds 0 of 3 epochs and 3 of 4 steps." in child.errors
    options = ["--resume", "--data-dir", small_data, "--wandb", "disabled"]
    child = scripts.run("main.py", *options, cwd=tmp_path, at=("torch.bincount", 1, "SIGINT"), expect=130)
    assert f"Resuming {LAST} at epoch 1, after its step 3." in child.output
    assert "holds 0 of 3 epochs and 4 of 4 steps." in child.errors  # stopped while scoring, nothing to train again
    child = scripts.run("main.py", *options, cwd=tmp_path, at=(step, 2, "SIGTERM"), expect=143)
    assert "holds 1 of 3 epochs and 2 of 4 steps." in child.errors


def test_a_second_signal_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.cli import Interrupted
    from engine.training import loop as training

    now = 100.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    with training._Signals() as signals:
        signals.at_once = False
        signal.raise_signal(signal.SIGTERM)
        assert signals.signum == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)  # a wrapper that passes on what the terminal has sent already
        now = 102.0
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.value.exit_status == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_signals_to_the_command_itself(
    child_environment: dict[str, str], small_data: Path, tmp_path: Path, number: int, status: int
) -> None:
    """As a person does it: the real command, stopped after its first epoch, goes on by the line it prints."""
    import os
    import shlex
    import subprocess
    import sys

    folder = tmp_path / "with space é"
    options = [*small_options(small_data, epochs=500), "--output-dir", folder]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main_binary.py", *map(str, options)],
        env=child_environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    asked = time.monotonic()
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=400)
    assert time.monotonic() - asked < 60  # a few seconds where the machine does nothing else
    assert process.returncode == status
    go_on = re.search(r'Go on with: python3 (\S.* --resume --output-dir ".*with space é" .*)\n$', errors)
    process = subprocess.Popen(
        [sys.executable, *shlex.split(go_on[1])],
        env=child_environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert any(line.startswith("Resuming") for line in process.stdout)
    os.kill(process.pid, number)
    process.communicate(timeout=400)
    assert process.returncode == status
