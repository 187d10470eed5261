"""torch.compile: where it is used, what is said where it fails, and that a compiled run resumes bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import differences, essence, one_line, resume_options
from script_server import ScriptServer

from engine import checkpoints, runtime
from engine.checkpoints import LAST
from engine.cli import UserError

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def test_a_compiled_run_is_resumed_bit_for_bit(scripts: ScriptServer, small_data: Path, tmp_path: Path) -> None:
    """The short batch at the end of an epoch must not change how the others are computed, which a run resumed after
    it would not repeat. The folder is copied while the run, in its second epoch, stands still."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    options = ["--data-dir", small_data, "--limit-train", 90, "--limit-test", 20, "--batch-size", 32, "--epochs", 2]
    options += ["--compile", "--wandb", "disabled"]
    child = scripts.start("main_binary.py", *options, cwd=whole, env=cache, at=("step", 5, "SIGSTOP"))
    if not child.wait_until(lambda: is_stopped(child.pid)):
        assert "--compile" in one_line(child.errors)
        pytest.skip("torch.compile does not work here")
    shutil.copytree(whole, part)
    child.send(signal.SIGCONT)
    assert child.wait() == 0, child.errors
    assert ", compiled" in child.output
    assert checkpoints.load(part / LAST).epoch == 1
    child = scripts.run("main_binary.py", *resume_options(small_data), cwd=part, env=cache)
    assert ", compiled" in child.output
    assert differences(essence(part), essence(whole)) == []


def test_asked_for_without_a_compiler(
    run_script: Callable[..., subprocess.CompletedProcess[str]], small_data: Path, tmp_path: Path
) -> None:
    """Found out by compiling: the compiler that is named here exists and compiles nothing."""
    without = {"CXX": os.devnull, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    options = ["--data-dir", small_data, "--compile", "--wandb", "disabled"]
    done = run_script("main.py", *options, cwd=tmp_path, env=without, check=False)
    assert done.returncode == 2
    assert "--compile" in one_line(done.stderr)


def test_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried only where it would be used, and used by default on a GPU only."""
    tried: list[torch.device] = []
    monkeypatch.setattr(runtime, "_try_compile", lambda device: tried.append(device) or "")
    assert runtime.choose_compile(False, GPU, required=False) == (False, "")
    assert runtime.choose_compile(None, CPU, required=False) == (False, "")
    assert not tried
    assert runtime.choose_compile(None, GPU, required=False) == (True, "")
    assert runtime.choose_compile(True, CPU, required=True) == (True, "")
    assert tried == [GPU, CPU]


def test_decision_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, also of a run that was compiled elsewhere; an error is it only where --compile was typed."""
    monkeypatch.setattr(runtime, "_try_compile", lambda device: "no compiler")
    for wanted, device in ((None, GPU), (True, CPU)):
        compiled, notice = runtime.choose_compile(wanted, device, required=False)
        assert not compiled
        assert "no compiler" in notice
    with pytest.raises(UserError, match=r"--compile: .*no compiler"):
        runtime.choose_compile(True, CPU, required=True)
