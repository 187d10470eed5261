"""A training process may end at any moment, in whatever way: nothing is lost, and going on changes nothing."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import RUN_FILES, assert_all_load, differences, essence, resume_options, small_options
from script_server import Child, ScriptServer

from engine import checkpoints
from engine.checkpoints import BEST, FINAL, LAST

ROOT = Path(__file__).resolve().parent.parent
STATUS = {"SIGINT": 130, "SIGTERM": 143}


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
        options = resume_options(self.data) if resume else small_options(self.data)
        return self.scripts.start(self.script, *options, cwd=self.folder, at=at)

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
        assert found >= self._sets, "a file of a finished run is neither here nor moved aside"

    def finish(self) -> None:
        self.ended(self.start())
        assert self.finished
        assert self.resumed, "no kill left anything to resume"
        print(f"{self.kills} kills, {self.resumed} resumed, {self.finished} finished as if never killed")  # for -rP


@pytest.fixture
def chain(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, finished: Callable[[str], Path]
) -> Callable[[str], Chain]:
    return lambda script: Chain(scripts, script, small_data, tmp_path, finished(script))


def how_many(request: pytest.FixtureRequest, default: int, full: int) -> int:
    return full if request.config.getoption("--full") else default


@pytest.mark.parametrize(("script", "default", "full"), [("main_binary.py", 10, 70), ("main.py", 5, 40)])
def test_kills_at_random_moments(
    chain: Callable[[str], Chain], request: pytest.FixtureRequest, script: str, default: int, full: int
) -> None:
    runs, moments = chain(script), random.Random(script)
    started = time.monotonic()
    runs.ended(runs.start())
    longest = time.monotonic() - started
    while runs.kills < how_many(request, default, full):
        child = runs.start()
        child.ended.wait(moments.uniform(0, longest))
        child.send(signal.SIGKILL)
        runs.ended(child)
    runs.finish()


def test_kills_at_file_operations(chain: Callable[[str], Chain], request: pytest.FixtureRequest) -> None:
    """The first process dies at its first file operation, or halfway through it; the next at its second..."""
    runs = chain("main_binary.py")
    for number in range(1, how_many(request, 16, 90)):
        runs.ended(runs.start(at=("file operation", number, "SIGKILL")))
    assert runs.kills > 8
    runs.finish()


def test_kills_in_steps_and_while_scoring(chain: Callable[[str], Chain]) -> None:
    """And as soon as a file has changed on the disk."""
    runs = chain("main_binary.py")
    for moment, number in (("scoring", 1), ("step", 6), ("scoring", 2), ("step", 1), ("scoring", 3)):
        runs.ended(runs.start(at=(moment, number, "SIGKILL")))
    for name in (LAST, "metrics.csv", BEST, FINAL):
        path = runs.folder / name
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = runs.start()
        child.wait_until(lambda path=path, before=before: path.exists() and path.stat().st_mtime_ns != before)
        child.send(signal.SIGKILL)
        runs.ended(child)
    assert runs.kills >= 6
    runs.finish()


def test_kills_while_old_files_are_moved_aside(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path
) -> None:
    """They may lie in two places then; none of them is lost, and neither a new run nor a resumed one minds."""
    old = {name: (float_run / name).read_bytes() for name in RUN_FILES}
    moved = []

    def lost(folder: Path) -> list[str]:
        return [name for name in old if old[name] not in [path.read_bytes() for path in folder.rglob(name)]]

    for number in range(1, 10):
        folder = tmp_path / str(number)
        shutil.copytree(float_run, folder)
        at = ("file operation", number, "SIGKILL")
        scripts.run("main.py", *small_options(small_data), cwd=folder, at=at, expect=-signal.SIGKILL)
        assert lost(folder) == []
        moved.append(len(list(folder.glob("previous-*/*"))))
        if (folder / LAST).exists() and number % 2:
            scripts.run("main.py", *resume_options(small_data), cwd=folder)
            assert differences(essence(folder), essence(float_run)) == []
        else:
            scripts.run("main.py", *small_options(small_data, epochs=1), cwd=folder)
            assert lost(folder) == []
    assert {0, 1, 3, 5} <= set(moved)


# -- signals that ask ----------------------------------------------------------------------------------------

IN_THE_FIRST_EPOCH = [("cifar10.load", 1), ("step", 1), ("scoring", 1), ("half-written", 1)]
LATER = [
    ("fsync", 2),  # checkpoint_last.pth has just got its name
    ("half-written", 1),  # at the start of a resumed run, which writes its files once more
    ("step", 3),
    ("scoring", 1),
    ("replace", 4),
    ("step", 4),
    ("scoring", 2),  # by the run that has done the last epoch
]


@pytest.mark.parametrize("first", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.full)])
def test_signals_at_many_moments(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path, first: str
) -> None:
    """One run, stopped in turn by Ctrl-C and SIGTERM, ends as if nobody had stopped it."""
    names = ["SIGINT", "SIGTERM"] if first == "SIGINT" else ["SIGTERM", "SIGINT"]
    options = small_options(small_data)
    for number, moment in enumerate(IN_THE_FIRST_EPOCH):
        name = names[number % 2]
        child = scripts.run("main_binary.py", *options, cwd=tmp_path, at=(*moment, name), expect=STATUS[name])
        assert len(child.errors.splitlines()) == 1
        assert ("without --resume" in child.errors) == (moment[0] != "cifar10.load")
        assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    for number, moment in enumerate(LATER):
        name = names[number % 2]
        child = scripts.run("main_binary.py", *options, cwd=tmp_path, at=(*moment, name), expect=STATUS[name])
        assert len(child.errors.splitlines()) == 1, moment
        epoch = checkpoints.load(tmp_path / LAST).epoch
        assert f"{LAST} holds {epoch} of 3 epochs. Go on with: python3 " in child.errors, moment
        assert_all_load(tmp_path)
        assert not list(tmp_path.glob("*.tmp-*"))
        options = resume_options(small_data)
    scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert differences(essence(tmp_path), essence(binary_run)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_signals_to_the_command_itself(
    child_environment: dict[str, str], small_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As a person does it: the real command, stopped after its first epoch, goes on by the line it prints."""
    folder = tmp_path / "with space é"

    def until(start: str, *command: object) -> str:
        """Run it until it prints such a line, then stop it; what it says."""
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=child_environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert any(line.startswith(start) for line in process.stdout)
        asked = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=400)
        assert time.monotonic() - asked < 60  # a few seconds where the machine does nothing else
        assert process.returncode == STATUS[number.name]
        return errors

    options = [*small_options(small_data, epochs=500), "--output-dir", folder]
    errors = until("epoch", ROOT / "main_binary.py", *options)
    go_on = re.search(r'Go on with: python3 (\S.* --resume --output-dir ".*with space é" .*)\n$', errors)
    assert "Go on with" in until("Resuming", *shlex.split(go_on[1]))
