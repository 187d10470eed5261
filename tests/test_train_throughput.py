"""benchmarks/train_throughput.py in its quick form, and the count of operations behind its limit."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import cifar10
import main
import main_binary
from engine import runtime
from models import build

ROOT = Path(__file__).resolve().parent.parent


def test_quick_form(
    tmp_path: Path, small_data: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = "benchmarks/train_throughput.py"
    done = run_script(script, "--quick", "--batch-size", 25, "--workers", 1, "--data-dir", small_data, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line and str(small_data) not in line) <= 80
    precisions = ["float32", "bfloat16"] if runtime.cpu_has_bfloat16_units() else ["float32"]
    rows = ("float, {}, eager", "BinaryConnect, {}, eager", "BinaryConnect, {}, Adam")
    names = ["textbook loop", *(row.format(precision) for precision in precisions for row in rows)]
    assert ("bfloat16 left out" in done.stdout) == (len(precisions) == 1)
    assert done.stdout.count("Muon / Adam: ") == done.stdout.count("/ full precision: ") == len(precisions)
    for name in names:
        speeds, shares = (line.removeprefix(name).split() for line in lines if line.startswith(f"{name}  "))
        middle, lowest, highest = (float(figure.replace(",", "")) for figure in speeds[:3])
        assert 0 < lowest <= middle <= highest
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)
        assert min(map(float, shares)) >= 0
        _, binary, forward, backward, *_ = map(float, shares)
        assert (binary > 0) == name.startswith("BinaryConnect")
        assert min(forward, backward) > 0
    assert (tmp_path / "train_throughput.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_throughput", ROOT / "benchmarks" / "train_throughput.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", [main, main_binary])
def test_a_variant_trains_in_its_precision(
    module: ModuleType, script: ModuleType, precision: str, small_data: Path
) -> None:
    data = cifar10.load(small_data)
    variant = module.Ours(script, data, ["--batch-size", "10"], compiled=False, precision=precision)
    outputs = []
    variant.trainer.model.linear.register_forward_hook(lambda _layer, _images, output: outputs.append(output.dtype))
    variant.turn(1, 10)
    assert set(outputs) == {runtime.PRECISIONS[precision]}
    assert len(outputs) == module.WARM_UP + 1


def test_operations_of_a_training_step(module: ModuleType) -> None:
    """He et al. 2015, table 6 counts no operations; by hand: forward 40.55 million multiplications, backward twice
    as many but for the first layer's input."""
    first = 3 * 9 * 16 * 32 * 32
    stages = [(16, 16, 32, 6), (32, 32, 16, 5), (64, 64, 8, 5)]  # inputs, outputs, side, convolutions
    forward = first + sum(i * 9 * o * side * side * count for i, o, side, count in stages)
    forward += 16 * 9 * 32 * 16 * 16 + 32 * 9 * 64 * 8 * 8 + 64 * 10  # the two that halve the image; the classifier
    assert module.training_flops(build("resnet20")) == 2 * (3 * forward - first)
