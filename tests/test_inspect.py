"""inspect_saved_model.py: what it shows of files of ours and of others, and that no file can harm it."""

from __future__ import annotations

import functools
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import binary_network, random_network, sha256
from runs import caller

from engine import checkpoints
from models import weight_layers
from models.bitpack import pack_model


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """call("x.pth", "--all"): main() in this process; what it printed."""
    return functools.partial(caller(tmp_path, monkeypatch, capsys), "inspect_saved_model")


def row_of(printed: str, name: str) -> list[str]:
    """The cells of the table's line that begins with `name`, without the name."""
    found = re.findall(rf"^{re.escape(name)}\s+(.+)$", printed, re.M)
    assert len(found) == 1, (name, found)
    return found[0].split()


def last_checkpoint(path: Path) -> Path:
    """Something like checkpoint_last.pth, with the state of an optimizer and a history of 30 epochs."""
    state = random_network().state_dict()
    moments = {index: {"step": torch.tensor(7.0), "exp_avg": torch.full((2, 3), float(index))} for index in range(20)}
    training = {
        "optimizers": [{"state": moments, "param_groups": [{"lr": 0.125, "params": list(range(20))}]}],
        "totals": torch.tensor([1.0, 2.0, 2.0]),
        "history": [{"epoch": epoch, "train_loss": 2.0 / epoch} for epoch in range(1, 31)],
        "best": {"epoch": 29, "metrics": {"test_accuracy": 81.25}, "state_dict": state},
    }
    about = {"epoch": 30, "config": {"lr": 0.1, "arch": "resnet20"}, "training": training}
    checkpoints.save(path, checkpoints.make("resnet20", "latent", state, **about))
    return path


def test_a_checkpoint_to_resume_from(tmp_path: Path, run_script: Callable) -> None:
    path = last_checkpoint(tmp_path / "checkpoint_last.pth")
    printed = run_script("inspect_saved_model.py", path.name, cwd=tmp_path).stdout
    size = path.stat().st_size
    assert f"File: checkpoint_last.pth\n  {size:,} bytes ({size / 1e6:.2f} MB)\n  SHA-256 {sha256(path)}\n" in printed
    assert "What it is: a file of this collection\nFits: ✓ resnet20, latent weights of BinaryConnect" in printed
    assert "Keys: 116 tensors under 'state_dict'\n" in printed
    assert "  epoch: 30\n  config: {'arch': 'resnet20', 'lr': 0.1}\n" in printed
    assert "    history: [30 items, the last {'epoch': 30, 'train_loss': 0.06667}]\n" in printed
    best = "{'epoch': 29, 'metrics': {'test_accuracy': 81.25}, 'state_dict': {116 tensors}}"
    assert best in " ".join(printed.split())

    weight = random_network().layer3[2].conv2.weight.detach()
    low, high, distinct = f"{weight.min():.4g}", f"{weight.max():.4g}", str(len(weight.unique()))
    assert row_of(printed, "layer3.2.conv2.weight") == ["64x64x3x3", "float32", "147456", low, high, distinct]
    seen = str(int(random_network().layer1[0].bn1.num_batches_tracked))
    assert row_of(printed, "layer1.0.bn1.num_batches_tracked") == ["scalar", "int64", "8", seen, seen, "1"]
    moments = row_of(printed, "optimizers[*].state[*].exp_avg (20 tensors)")
    assert moments == ["2x3", "float32", "480", "0", "19", "20"]
    assert row_of(printed, "totals") == ["3", "float32", "12", "1", "2", "2"]
    assert row_of(printed, "best.state_dict.* (116 tensors)")[:2] == ["various", "various"]
    numbers = 2 * (269_722 + 1_376 + 19) + 20 * 7 + 3
    assert f"Total: {116 * 2 + 41} tensors, {numbers:,} values, {4 * (numbers + 2 * 19):,} bytes of" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_all_lists_every_tensor_by_itself(tmp_path: Path, call: Callable) -> None:
    printed = call(last_checkpoint(tmp_path / "x.pth"), "--all")
    assert row_of(printed, "optimizers[0].state[19].exp_avg") == ["2x3", "float32", "24", "19", "19", "1"]
    assert len(re.findall(r"^optimizers\[0\]\.state\[\d+\]\.step ", printed, re.M)) == 20
    assert len(re.findall(r"^best\.state_dict\.", printed, re.M)) == 116


@pytest.mark.parametrize("keep", [False, True])
def test_a_one_bit_file_is_explained(tmp_path: Path, call: Callable, keep: bool) -> None:
    model = binary_network()
    plus = sum(int((layer.weight > 0).sum()) for _, layer in weight_layers(model))
    packed = pack_model(model, "resnet20", keep_batchnorm=keep)
    checkpoints.save(tmp_path / "x.pth", checkpoints.make("resnet20", checkpoints.BINARY_1BIT, None) | packed)
    printed = call(tmp_path / "x.pth")
    words = " ".join(printed.split())
    assert "Fits: ✓ resnet20, binary weights, one bit each" in words
    assert "the 268,336 weights of 20 layers" in words
    assert f"1 is +1 ({plus:,}, {100 * plus / 268_336:.2f}%), 0 is -1 ({268_336 - plus:,}," in words
    assert ("running mean" in words) == keep
    assert row_of(printed, "signs") == ["33542", "uint8", "33542", "0", "255", "256"]
    assert row_of(printed, "floats")[:3] == (["2762", "float32", "11048"] if keep else ["1386", "float32", "5544"])


def test_prefixes_and_what_they_become(tmp_path: Path, call: Callable) -> None:
    bare = random_network().state_dict()
    stack = {
        f"_orig_mod.module.model.{key}" if "bn" in key else f"module.{key}": value for key, value in bare.items()
    }
    torch.save({"net": stack, "acc": 91.5, "epoch": 7}, tmp_path / "x.pth")
    printed = call(tmp_path / "x.pth")
    assert "What it is: a file that others made\nFits: ✓ resnet20, weights of unknown kind" in printed
    assert "Keys: 116 tensors under 'net'\n" in printed
    words = " ".join(printed.split())
    assert "prefix 'module.' dropped from 21 names" in words
    assert "prefix '_orig_mod.module.model.' dropped from 95 names" in words
    assert "  acc: 91.5\n  epoch: 7\n" in printed

    torch.save(bare, tmp_path / "bare.pth")
    assert "Keys: 116 tensors at the top level\n" in call(tmp_path / "bare.pth")
    torch.save({"weights": bare, "ema": bare}, tmp_path / "two.pth")
    assert "--weights-key" in call(tmp_path / "two.pth")
    assert "Keys: 116 tensors under 'ema'\n" in call(tmp_path / "two.pth", "--weights-key", "ema")


def test_a_network_of_others_is_shown_and_why_it_does_not_fit(tmp_path: Path, call: Callable) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5)).state_dict(), tmp_path / "x.pth")
    printed = call(tmp_path / "x.pth")
    assert "Fits: ✗ none of our networks: not a ResNet-20/32/44/56/110 of ours" in printed
    assert row_of(printed, "1.weight")[:3] == ["5x2", "float32", "40"]
    assert f"{tmp_path}" not in printed.split("\n", 1)[1]


def test_nan_and_infinity_are_shown_and_not_refused(tmp_path: Path, call: Callable) -> None:
    state = random_network().state_dict()
    state["linear.bias"] = torch.tensor([float("nan")] * 2 + [float("inf"), -float("inf")] + [1.5] * 6)
    torch.save(state, tmp_path / "x.pth")
    printed = call(tmp_path / "x.pth")
    assert "linear.bias holds NaN or infinite values" in " ".join(printed.split())
    assert row_of(printed, "linear.bias") == ["10", "float32", "40", "-inf", "inf", "4"]
    assert "\n  ⚠ 2 NaN and 2 infinite\n" in printed


WEIRD = {
    "complex": (torch.tensor([1j, 1j, 2]), "3 complex64 24 - - 2"),
    "bool": (torch.tensor([True, False]), "2 bool 2 0 1 2"),
    "int8": (torch.tensor([-3, 4], dtype=torch.int8), "2 int8 2 -3 4 2"),
    "empty": (torch.empty(0, 3), "0x3 float32 0 - - 0"),
    "scalar": (torch.tensor(2.5), "scalar float32 4 2.5 2.5 1"),
    "only_nan": (torch.tensor([float("nan")] * 2), "2 float32 8 - - 1"),
    "zeros": (torch.tensor([0.0, -0.0]), "2 float32 8 0 0 1"),
    "bfloat16": (torch.tensor([1.5, -2]).bfloat16(), "2 bfloat16 4 -2 1.5 2"),
    "wide": (torch.tensor([1e300, -1e-300], dtype=torch.float64), "2 float64 16 -1e-300 1e+300 2"),
    "strided": (torch.arange(99).as_strided((2, 2), (50, 1)), "2x2 int64 32 0 51 4"),
    "parameter": (torch.nn.Parameter(torch.ones(2)), "2 float32 8 1 1 1"),
}


def test_weird_tensors_and_values(tmp_path: Path, call: Callable) -> None:
    tensors = {name: tensor for name, (tensor, _) in WEIRD.items()}
    values: dict[str, Any] = {
        "nothing": None,
        "large": 2**63,
        "set": {1, 2},
        "nan": float("nan"),
        "none at all": {},
        "ordered": OrderedDict(a=[]),
        "deep": {"a": {"b": {"c": {"d": [1, [2, [3]]]}}}},
        "long": "y" * 5000,
        "many": list(range(1000)),
        "\x1b[31mred\n": "\x1b[2J",
    }
    torch.save(tensors | values, tmp_path / "x.pth")
    printed = call(tmp_path / "x.pth")
    for name, (_, cells) in WEIRD.items():
        assert row_of(printed, name) == cells.split(), name
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert "  large: 9223372036854775808\n  set: {1, 2}\n  nan: nan\n" in printed
    assert "  many: [1,000 items, the last 999]\n" in printed
    assert "  '\\x1b[31mred\\n': '\\x1b[2J'\n" in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80


CONTENTS = [([torch.ones(2), {"a": torch.zeros(3)}], 2), (torch.ones(2, 2), 1), (5, 0), (None, 0), ({}, 0), ([], 0)]


@pytest.mark.parametrize(("content", "found"), CONTENTS)
def test_what_is_no_checkpoint_at_all(tmp_path: Path, call: Callable, content: object, found: int) -> None:
    torch.save(content, tmp_path / "x.pth")
    printed = call(tmp_path / "x.pth")
    assert f"\nTotal: {found} tensor{'' if found == 1 else 's'}, " in printed
    assert "✓" not in printed


class Payload:
    """Unpickled by a careless reader it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-the-payload",)


class Looped:
    """Holds itself, and twice what it holds, ten levels down."""

    def __init__(self, depth: int = 12) -> None:
        self.me = self
        self.left = self.right = Looped(depth - 1) if depth else {"x": "y" * 5000}


def test_objects_are_listed_and_those_that_would_be_called_are_marked(
    tmp_path: Path, call: Callable, run_script: Callable
) -> None:
    content = {"net": random_network(), "x": Payload(), "loop": Looped(), "f": torch.relu, "acc": np.float64(91.5)}
    torch.save(content, tmp_path / "x.pth")
    printed = run_script("inspect_saved_model.py", "x.pth", cwd=tmp_path).stdout
    assert "Fits: ✓ resnet20" in printed
    assert not (tmp_path / "made-by-the-payload").exists()
    assert re.search(r"^ +⚠ an ordinary load calls posix\.mkdir$", printed, re.M)
    assert re.search(r"^ +⚠ an ordinary load calls models\.resnet_s\.ResNetS$", printed, re.M)
    assert re.search(r"^ +only named: torch\._C", printed, re.M)
    assert "  x: <posix.mkdir: ['made-by-the-payload']>\n" in printed
    assert "  net: <models.resnet_s.ResNetS: a whole module>\n" in printed
    assert "  acc: 91.5\n" in printed
    assert row_of(printed, "layer1.0.conv1.weight")[:2] == ["16x16x3x3", "float32"]
    assert len(printed) < 20_000
    assert max(map(len, printed.splitlines())) <= 80

    torch.save([Payload()] * 3, tmp_path / "alone.pth")
    printed = call(tmp_path / "alone.pth")
    assert "Fits: ✗ none of our networks: not a checkpoint of a network" in printed
    assert "⚠ an ordinary load calls posix.mkdir" in printed


def test_without_a_file_it_says_what_is_missing(tmp_path: Path, run_script: Callable) -> None:
    done = run_script("inspect_saved_model.py", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: .*CKPT.*--help.*\n", done.stderr)
