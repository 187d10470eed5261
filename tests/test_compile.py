"""torch.compile: where it is used, what is said where it fails, and that a compiled run resumes bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import differences, essence, one_line, resume_options, run_here

import main_binary
from engine import checkpoints, runtime
from engine.checkpoints import LAST
from engine.cli import UserError
from models import ARCHITECTURES, ResNetS

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.slow
def test_compiled_run_is_resumed_bit_for_bit(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short batch at the end of an epoch must not change how the others are computed, which a run resumed after
    it would not repeat. The folder is copied in the second epoch; with a ResNet-8, which compiles in less time."""
    monkeypatch.setitem(ARCHITECTURES, "resnet8", lambda: ResNetS(8))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    whole, part, eager = tmp_path / "whole", tmp_path / "part", tmp_path / "eager"
    backward, losses = torch.Tensor.backward, []

    def copying(loss: torch.Tensor) -> None:
        losses.append(loss.item())
        if len(losses) == 5:
            shutil.copytree(whole, part)
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", copying)
    options = ["--arch", "resnet8", "--limit-train", 90, "--limit-test", 20, "--batch-size", 32, "--epochs", 2]
    run_here(main_binary, whole, monkeypatch, *options, "--compile", *resume_options(small_data)[1:])
    torch.compiler.reset()  # as in a new process
    shutil.copytree(part, eager)
    run_here(main_binary, part, monkeypatch, *resume_options(small_data))
    printed = capsys.readouterr().out
    assert printed.count(", compiled\n") == 2
    assert "same bits" not in printed
    assert losses[3:6] == losses[6:]
    assert differences(essence(part), essence(whole)) == []

    run_here(main_binary, eager, monkeypatch, *resume_options(small_data), "--no-compile")
    assert "It ran compiled and now runs eager: not the same bits any more." in capsys.readouterr().out
    assert checkpoints.load(eager / LAST).config["compile"] is False


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
