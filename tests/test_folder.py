"""Files and the folder of a training run: written whole or not at all; full, read-only, gone, or in use."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from runs import RUN_FILES, assert_all_load, differences, essence, one_line, resume_options, small_options

from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import UserError
from engine.files import FolderLock, atomic_write, remove_leftovers

ROOT = Path(__file__).resolve().parent.parent


# -- single files: the old one or the new one ------------------------------------------------------------------


def test_leftovers_of_a_living_writer_stay(tmp_path):
    for name in ("a.pth.tmp-1", "a.pth.tmp-2", "b.pth.tmp-1", "a.pth"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "a.pth.tmp-1", (0, 0))
    remove_leftovers(tmp_path, ["a.pth"], sole_writer=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.pth.tmp-2", "b.pth.tmp-1"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "the writer"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=str)
def test_what_fails_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    if failing != "the writer":
        monkeypatch.setattr(f"os.{failing}", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as refused:
        atomic_write(path, fail if failing == "the writer" else b"new")
    monkeypatch.undo()
    if expected is UserError:
        assert str(path) in str(refused.value)
        assert "No space left" in str(refused.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pth", b"old")]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    """Whoever asks: permissions do not stop root."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for folder in ("file", "loop", "gone", "file/below"):
        with pytest.raises(UserError, match=f"{tmp_path / folder}/a.pth: cannot be written"):
            atomic_write(tmp_path / folder / "a.pth", b"new")
        with pytest.raises(UserError, match=str(tmp_path / folder)):
            FolderLock(tmp_path / folder)
    with pytest.raises(UserError, match="folder: cannot be written"):
        atomic_write(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "loop"]


# -- one run a folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "left by a killed process", "\n\xff\xfe"])
def test_a_lock_is_what_is_held_not_what_is_written(tmp_path, content):
    (tmp_path / FolderLock.NAME).write_bytes(content.encode("latin1"))
    with FolderLock(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path}: .*process {os.getpid()} .*--output-dir"):
            FolderLock(tmp_path)
        (tmp_path / FolderLock.NAME).write_bytes(content.encode("latin1"))
        with pytest.raises(UserError, match="another run"):
            FolderLock(tmp_path)
    with FolderLock(tmp_path):
        pass


# -- the folder of a run -----------------------------------------------------------------------------------------


def test_full_disk(scripts, small_data, tmp_path, float_run):
    """One run for which each of several writes fails in turn, and which goes on when there is space again."""
    options = small_options(small_data)
    for operation, number in (("half-written", 1), ("half-written", 4), ("fsync", 5), ("half-written", 2)):
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
        child = scripts.run("main.py", *options, cwd=tmp_path, at=(operation, number, "ENOSPC"), expect=2)
        assert ": cannot be written: No space left on device" in one_line(child.errors)
        assert not list(tmp_path.glob("*.tmp-*"))
        assert_all_load(tmp_path)
        assert before.keys() <= {path.name for path in tmp_path.glob("*.pth")}
        if (tmp_path / LAST).exists():
            options = resume_options(small_data)
    scripts.run("main.py", *options, cwd=tmp_path)
    assert differences(essence(tmp_path), essence(float_run)) == []


def run_command(environment: dict[str, str], folder: Path, *command: object, **more: Any) -> CompletedProcess[str]:
    """The command itself, with options of subprocess.run."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    script, *arguments = map(str, command)
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=folder, env=environment, timeout=400, **pipes | more
    )


def test_a_file_that_grows_too_large(child_environment, small_data, tmp_path):
    """A limit that the system itself sets: main.py's checkpoint_last.pth has over 2 MB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    done = run_command(child_environment, tmp_path, "main.py", *small_options(small_data), preexec_fn=limit)
    assert done.returncode == 2
    assert f"{LAST}: " in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


def test_a_run_that_nobody_reads_is_not_called_done(child_environment, small_data, tmp_path):
    """As with `| head -1`: the first line that cannot be written ends it, and the status says so."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run_command(child_environment, tmp_path, "main.py", *small_options(small_data), stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
    assert not (tmp_path / FINAL).exists()


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_no_error(child_environment, float_run, tmp_path, closed):
    command = ("inspect_saved_model.py", float_run / BEST)
    done = run_command(child_environment, tmp_path, *command, preexec_fn=lambda: os.close(closed))
    assert (done.returncode, done.stderr) == (0, "")
    assert ("resnet20" in done.stdout) == (closed == 2)


def test_a_folder_that_cannot_be_written_to(scripts, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    folders = [tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), "x" * 300]
    folders += [] if os.access(tmp_path / "locked", os.W_OK) else [tmp_path / "locked"]  # root may write anywhere
    for folder in folders:
        child = scripts.run("main.py", "--data-dir", "none", "--output-dir", folder, cwd=tmp_path, expect=2)
        assert f"--output-dir {folder}: " in one_line(child.errors)


def test_a_folder_that_vanishes(scripts, small_data, tmp_path):
    folder = tmp_path / "out"
    options = [*small_options(small_data, epochs=500), "--output-dir", folder]
    child = scripts.start("main.py", *options, cwd=tmp_path)
    assert child.wait_until(lambda: "\nepoch" in child.output)
    shutil.rmtree(folder, ignore_errors=True)
    assert child.wait() == 2, child.errors
    assert str(folder) in one_line(child.errors)


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda folder: folder.rename(f"{folder}-old")], ids=["rm", "mv"])
def test_a_folder_that_is_replaced(scripts, small_data, tmp_path, gone):
    """The run that has lost its folder writes nothing into the one that another run has made in its place."""
    folder = tmp_path / "out"
    first = scripts.start("main.py", *small_options(small_data, epochs=500), "--output-dir", folder, cwd=tmp_path)
    assert first.wait_until(lambda: "\nepoch" in first.output)
    first.send(signal.SIGSTOP)
    gone(folder)
    options = [*small_options(small_data, epochs=2), "--seed", 1, "--output-dir", folder]
    scripts.run("main.py", *options, cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first.send(signal.SIGCONT)
    assert first.wait() == 2, first.errors
    assert str(folder) in one_line(first.errors)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_beside_a_link_to_the_checkpoint_lie_files_of_another_run(scripts, small_data, tmp_path, float_run):
    """They are moved aside, as those beside a copy of it are."""
    shutil.copytree(float_run, tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LAST).symlink_to(tmp_path / "source" / LAST)
    (tmp_path / "out" / BEST).write_bytes(b"another run's")
    options = ["--resume", tmp_path / "source" / LAST, *resume_options(small_data)[1:], "--output-dir", "out"]
    scripts.run("main.py", *options, cwd=tmp_path)
    assert (tmp_path / "out" / "previous-1" / BEST).read_bytes() == b"another run's"
    assert differences(essence(tmp_path / "source"), essence(float_run)) == []


def test_two_runs_in_one_folder(scripts, small_data, tmp_path):
    first = scripts.start("main.py", *small_options(small_data, epochs=500), cwd=tmp_path)
    assert first.wait_until(lambda: "\nepoch" in first.output)
    for options in (small_options(small_data), ["--resume"]):
        second = scripts.run("main_binary.py", *options, "--data-dir", "none", cwd=tmp_path, expect=2)
        error = one_line(second.errors)
        assert f"process {first.pid} on " in error
        assert "main.py --data-dir" in error
    lines = first.output.count("\nepoch")
    assert first.wait_until(lambda: first.output.count("\nepoch") > lines + 1), "the first run did not go on"
    first.send(signal.SIGKILL)
    first.wait()
    at = ("step", 1, "SIGTERM")
    third = scripts.run("main.py", *resume_options(small_data), cwd=tmp_path, at=at, expect=143)
    assert "Resuming" in third.output


def test_a_new_run_moves_the_old_files_aside(scripts, small_data, tmp_path, float_run):
    """Under one name, with nothing of the user's own."""
    shutil.copytree(float_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "previous-1").mkdir()
    at = ("step", 1, "SIGTERM")
    child = scripts.run("main_binary.py", *small_options(small_data), cwd=tmp_path, at=at, expect=143)
    assert "previous-2" in child.output
    assert {path.name for path in (tmp_path / "previous-2").iterdir()} == set(RUN_FILES)
    assert all((tmp_path / "previous-2" / name).read_bytes() == (float_run / name).read_bytes() for name in RUN_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {".run.lock", "notes.txt", "previous-1", "previous-2"}


def test_leftovers_go_at_the_next_start(scripts, small_data, tmp_path, float_run):
    shutil.copytree(float_run, tmp_path, dirs_exist_ok=True)
    for name in (f"{LAST}.tmp-0123", f"{BEST}.tmp-4", "metrics.csv.tmp-5"):
        (tmp_path / name).write_bytes(b"half")
    scripts.run("main.py", *resume_options(small_data), cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*RUN_FILES, ".run.lock"}
