"""What tests share: scripts called in this process, a small run, and what of its files must not depend on a stop."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoints
from engine.checkpoints import BEST, FINAL, LAST

RUN_FILES = (BEST, FINAL, LAST, "metrics.csv", "training_curves.png")
TIMES = ("seconds", "images_per_second")


def small_options(data: Path, *, epochs: int = 3) -> list[object]:
    """Epochs of 4 steps, the last one with a short batch; scored on 20 images."""
    return [
        *("--data-dir", data, "--limit-train", 30, "--limit-test", 20, "--batch-size", 8),
        *("--epochs", epochs, "--warmup-epochs", 1, "--wandb", "disabled", "--no-compile"),
    ]


def resume_options(data: Path) -> list[object]:
    """To go on with a small run in its folder."""
    return ["--resume", "--data-dir", data, "--wandb", "disabled"]


def run_here(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    """A script's main function in this process, where its parts can be watched and replaced."""
    arguments = [*map(str, options), "--output-dir", str(folder), "--threads", "1"]
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
    module.main()


def caller(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """call = caller(...); call("eval", "x.pth"): a script's main function in `folder`; returns what it printed."""
    monkeypatch.chdir(folder)

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


def one_line(errors: str) -> str:
    """What a mistake has left on stderr: exactly one line."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("Error: ")
    return lines[0]


def essence(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, times apart, by the name of the file."""
    found: dict[str, Any] = {name: _plain(checkpoints.load(folder / name).raw) for name in (BEST, FINAL, LAST)}
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found["metrics.csv"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return found


def _plain(value: Any) -> Any:
    """A nest in which == means bit for bit, without times and without what names the run elsewhere."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        left_out = (*TIMES, "wandb_id", "checksum")
        return {key: _plain(item) for key, item in value.items() if key not in left_out}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in which two nests differ: an assertion on megabytes of weights would print them all."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [where or "/"]


_loaded: set[tuple[int, int, int]] = set()


def assert_all_load(folder: Path) -> int:
    """Every .pth in the folder and below it loads; returns how many there are. A file is looked at only once."""
    paths = sorted(folder.rglob("*.pth"))
    for path in paths:
        status = path.stat()
        content = (status.st_ino, status.st_mtime_ns, status.st_size)
        if content not in _loaded:
            checkpoints.load(path)
            _loaded.add(content)
    return len(paths)
