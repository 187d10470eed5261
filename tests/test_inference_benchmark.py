"""benchmarks/inference.py, run for real on small data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from networks import binary_network, save_checkpoint

from engine.checkpoints import BEST


@pytest.mark.full
def test_it_prints_its_tables_and_saves_a_chart(tmp_path: Path, small_data: Path, run_script: Callable) -> None:
    save_checkpoint(tmp_path / BEST, "latent")
    arguments = ("--data-dir", small_data, "--rounds", 1, "--seconds", 0, "--limit-test", 50)
    printed = run_script("benchmarks/inference.py", *arguments, cwd=tmp_path).stdout
    for name in ("torch eager, float32", "ONNX Runtime int8", "ours, 1-bit ONNX int8"):
        assert len(re.findall(rf"^{re.escape(name)}  .*\d", printed, re.MULTILINE)) == 2, name
    assert max(map(len, printed.partition("\n\n")[2].splitlines()[:-1])) <= 80
    assert (tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")


def test_the_plain_8_bit_network_overflows_on_no_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 without VNNI adds two products of an unsigned and a signed byte in 16 bits (docs/speed.md)."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    importlib.import_module("inference").write_plain_onnx(binary_network(), images, tmp_path)
    tensors = onnx.load(tmp_path / "plain_int8.onnx").graph.initializer
    weights = [
        onnx.numpy_helper.to_array(x) for x in tensors if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 4
    ]
    assert len(weights) == 19
    for weight in weights:
        assert 2 * 255 * np.abs(weight.astype(int)).max() <= np.iinfo(np.int16).max
