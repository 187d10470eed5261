"""docs/use.md keeps its word: its programs run as they stand, and all of them compute the same logits."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from script_server import ScriptServer

import cifar10
from engine import checkpoints

PAGE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
HUB, ENGINE, ONNX = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(EXPORT,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
PACKED = Path("pretrained/resnet20_binary_1bit.pth")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture that is neither 32 x 32 nor plain RGB."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").resize((70, 50), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path


def check(program: str, folder: Path, environment: dict[str, str], *options: str) -> None:
    """Run a program of the page in `folder`; it must print the right class for the right logits."""
    program += "np.save('logits.npy', np.asarray(logits))\n"
    done = subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    expected = expected_logits(folder / "picture.png")
    np.testing.assert_allclose(np.load(folder / "logits.npy"), expected, rtol=1e-3, atol=1e-3)
    assert done.stdout == f"{cifar10.CLASSES[expected.argmax()]}\n"


def expected_logits(picture: Path) -> np.ndarray:
    """float32 (1, 10), of the 1-bit file."""
    pixels = np.array(Image.open(picture).convert("RGB").resize((32, 32)), np.float64) / 255
    normalized = (pixels - cifar10.MEAN) / cifar10.STD
    images = torch.from_numpy(normalized).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        return checkpoints.load(ROOT / PACKED).model()(images).numpy()


def test_torch_hub(folder: Path, child_environment: dict[str, str]) -> None:
    assert "path/to/this/repository" in HUB
    check(HUB.replace("path/to/this/repository", str(ROOT)), folder, child_environment)


def test_engine(folder: Path, child_environment: dict[str, str]) -> None:
    (folder / PACKED.parent).mkdir()
    shutil.copy(ROOT / PACKED, folder / PACKED)
    check(ENGINE, folder, child_environment | {"PYTHONPATH": str(ROOT)})


def test_onnxruntime_alone(
    folder: Path, small_data: Path, scripts: ScriptServer, child_environment: dict[str, str]
) -> None:
    source = checkpoints.load(ROOT / PACKED).source_sha256
    files = (ROOT / "pretrained").glob("*.pth")
    shutil.copy(
        next(f for f in files if hashlib.sha256(f.read_bytes()).hexdigest() == source), folder / "best_model.pth"
    )
    _, script, *arguments = shlex.split(EXPORT)
    scripts.run(script, *arguments, "--data-dir", small_data, "--limit-test", 10, cwd=folder)
    without_torch = "import sys; sys.modules['torch'] = None\n"
    check(without_torch + ONNX, folder, child_environment, "-I")  # -I: nothing of ours can be imported


@pytest.mark.parametrize("program", [HUB, ENGINE, ONNX], ids=["torch.hub", "engine", "onnxruntime"])
def test_the_programs_are_short(program: str) -> None:
    imports = re.findall(r"^(?:import|from) .*\n", program, re.MULTILINE)
    assert len([line for line in program.splitlines() if line]) - len(imports) <= 10
