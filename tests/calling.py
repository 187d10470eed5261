"""Scripts called in this process, where their parts can be watched and replaced."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest


def caller(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """call = caller(...); call("eval", "x.pth"): a script's main() in `folder`; what it printed."""
    monkeypatch.chdir(folder)

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call
