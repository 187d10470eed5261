"""torch.compile: where it is used, what is said where it is not, and that a compiled run is resumed bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import save_checkpoint

from engine import runtime
from engine.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda")
CPU = torch.device("cpu")
LONG_RUN = runtime.COMPILE_PAYS_FROM_IMAGES

# Stops a run between two steps in the middle of its second epoch.
STOPPING = """
import os, runpy, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from engine.training.loop import Trainer
count = Trainer._count
def count_and_stop(self, *step):
    count(self, *step)
    if (self.epoch, self.steps_done) == (1, 1):
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._count = count_and_stop
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which all compiled runs share one cache: the first one fills it."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


def test_compiled_run_is_resumed_bit_for_bit(
    tmp_path: Path,
    small_data: Path,
    cache: dict[str, str],
    child_environment: dict[str, str],
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """250 images in batches of 64: the short batch at the end of an epoch must not change how the others are
    computed, which a run resumed after it would not repeat. With a teacher, which is not compiled."""
    teacher = save_checkpoint(tmp_path / "teacher.pth", "float")
    options = ["--data-dir", str(small_data), "--wandb", "disabled"]
    fresh = [*options, "--epochs", "3", "--batch-size", "64", "--compile", "--teacher", str(teacher)]
    straight = run_script(
        "main_binary.py",
        *fresh,
        "--output-dir",
        tmp_path / "straight",
        cwd=tmp_path,
        env=cache,
        check=False,
        timeout=600,
    )
    if "--compile: torch.compile does not work here" in straight.stderr:
        pytest.skip("torch.compile does not work here")
    assert straight.returncode == 0, straight.stderr
    assert ", compiled" in straight.stdout

    script, folder = str(ROOT / "main_binary.py"), tmp_path / "stopped"
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPING, str(ROOT), script, *fresh, "--output-dir", str(folder)],
        env=child_environment | cache,
        capture_output=True,
        encoding="utf-8",
    )
    assert stopped.returncode == 143, stopped.stderr
    (folder / "copy.pth").write_bytes((folder / "checkpoint_last.pth").read_bytes())
    resumed = run_script(
        "main_binary.py", "--resume", *options, "--output-dir", folder, cwd=tmp_path, env=cache, timeout=600
    )
    assert "after its step 2" in resumed.stdout

    files = [torch.load(path / "final_model.pth", weights_only=True) for path in (tmp_path / "straight", folder)]
    assert all(torch.equal(value, files[1]["state_dict"][name]) for name, value in files[0]["state_dict"].items())
    assert files[0]["metrics"]["train_loss"] == files[1]["metrics"]["train_loss"]

    # Where the compiler has gone, the run goes on without it and says so.
    without = {"CXX": os.devnull, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    options += ["--output-dir", str(tmp_path / "elsewhere")]
    eager = run_script("main_binary.py", "--resume", folder / "copy.pth", *options, cwd=tmp_path, env=without)
    notices = [line for line in eager.stdout.splitlines() if "torch.compile does not work" in line]
    assert len(notices) == 1
    assert notices[0].startswith("Not compiled any more")
    assert "eager" in eager.stdout


def test_asked_for_without_a_compiler(
    tmp_path: Path, small_data: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Found out by compiling: the compiler that is named here exists and compiles nothing."""
    without = {"CXX": os.devnull, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = run_script(
        "main.py",
        "--data-dir",
        small_data,
        "--compile",
        "--wandb",
        "disabled",
        cwd=tmp_path,
        env=without,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --compile: torch.compile does not work here")
    assert len(done.stderr.splitlines()) == 1


def test_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried only where it would be used; used by default on a GPU only, where it works and the run is long."""
    tried: list[torch.device] = []
    monkeypatch.setattr(runtime, "_try_compile", lambda device: tried.append(device) or "")
    assert runtime.choose_compile(False, GPU, LONG_RUN) == (False, "")
    assert runtime.choose_compile(None, CPU, LONG_RUN) == (False, "")
    assert runtime.choose_compile(None, GPU, LONG_RUN, was=False) == (False, "")
    short, notice = runtime.choose_compile(None, GPU, LONG_RUN - 1)
    assert not short
    assert "too short" in notice
    assert not tried
    assert runtime.choose_compile(None, GPU, LONG_RUN) == (True, "")
    assert runtime.choose_compile(True, CPU, 1) == (True, "")
    assert runtime.choose_compile(None, CPU, 1, was=True) == (True, "")
    assert len(tried) == 3


def test_decision_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_try_compile", lambda device: "no compiler")
    compiled, notice = runtime.choose_compile(None, GPU, LONG_RUN)
    assert not compiled
    assert notice == "Not compiled: torch.compile does not work here (no compiler)."
    with pytest.raises(UserError, match=r"--compile: .*no compiler"):
        runtime.choose_compile(True, CPU, LONG_RUN)
