"""benchmarks/inference.py, run for real on small data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from networks import save_checkpoint

from engine.checkpoint import BEST

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.full
def test_it_prints_its_tables_and_saves_a_chart(tmp_path: Path, small_data: Path, run_script: Callable) -> None:
    save_checkpoint(tmp_path / BEST, "latent")
    arguments = ("--data-dir", small_data, "--rounds", 1, "--seconds", 0, "--limit-test", 50)
    printed = run_script("benchmarks/inference.py", *arguments, cwd=tmp_path).stdout
    for name in ("torch eager, float32", "ONNX Runtime int8", "ours, 1-bit ONNX int8"):
        assert len(re.findall(rf"^{re.escape(name)}  .*\d", printed, re.MULTILINE)) == 2, name
    assert max(map(len, printed.partition("\n\n")[2].splitlines()[:-1])) <= 80
    assert (tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")
