"""The ONNX export: one bit a weight in the file, the same network as in torch, integer kernels in the int8 form."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import binary_network, register_new_networks

import cifar10
import save_binary_model
from engine import onnx_export
from engine.checkpoints import BEST
from engine.cli import UserError
from engine.evaluate import Scores


@pytest.fixture(scope="module")
def pixels(small_data: Path) -> torch.Tensor:
    return cifar10.load(small_data).train.images


@pytest.fixture(scope="module")
def exports(pixels: torch.Tensor) -> dict[str, bytes]:
    """Of one network, whose scales are positive, negative and zero, the two forms."""
    arguments = binary_network(), cifar10.MEAN, cifar10.STD
    return {"float": onnx_export.export(*arguments), "int8": onnx_export.export(*arguments, pixels.numpy())}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to how much the logits vary from image to image."""
    return float((found - expected).square().mean().sqrt() / expected.std(0).square().mean().sqrt())


def operators_after_loading(content: bytes, folder: Path) -> Counter[str]:
    """How many there are of each in the graph as onnxruntime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    assert not {"BitShift", "BitwiseAnd", "Split", "Reshape"} & set(found)
    return found


@pytest.mark.slow
def test_exports_compute_what_torch_computes(exports: dict[str, bytes], pixels: torch.Tensor) -> None:
    """And the bounds mean something: with one of 688 scales negated they do not hold."""
    model = binary_network()
    with torch.no_grad():
        expected = model(cifar10.normalize(pixels))
        model.layer1[0].bn1.weight[0].mul_(-1)
        other = model(cifar10.normalize(pixels))
    for form, bound in (("float", 1e-4), ("int8", 0.2)):
        found = onnx_export.OnnxNetwork(exports[form])(pixels)
        assert relative_error(found, expected) <= bound < relative_error(found, other)


@pytest.mark.parametrize("form", ["float", "int8"])
def test_one_bit_a_weight_in_the_file(exports: dict[str, bytes], form: str, tmp_path: Path) -> None:
    """The runtime unpacks and folds at load, and runs the int8 form with integer kernels."""
    assert len(exports[form]) < 50_000
    tensors = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load_from_string(exports[form]).graph.initializer}
    largest = sorted(tensors.values(), key=lambda x: -x.nbytes)
    assert (largest[0].dtype, largest[0].nbytes) == (np.uint8, 33_542)
    assert largest[1].nbytes <= 2560  # the classifier's input has 64 channels: no other tensor holds weights

    run = operators_after_loading(exports[form], tmp_path)
    if form == "int8":
        assert (run["QLinearConv"], run["QLinearAdd"], run["Conv"]) == (19, 9, 0)
    else:
        assert run["Conv"] + run["FusedConv"] == 19
        assert run["Mul"] <= 1  # that of the normalization; none is left on weights


def test_other_depths_and_batch_sizes(pixels: torch.Tensor) -> None:
    model = binary_network("resnet32")
    network = onnx_export.OnnxNetwork(onnx_export.export(model, cifar10.MEAN, cifar10.STD))
    with torch.no_grad():
        expected = model(cifar10.normalize(pixels[:7]))
    for part in (slice(0, 1), slice(0, 7)):
        torch.testing.assert_close(network(pixels[part]), expected[part], rtol=1e-4, atol=1e-4)


def test_another_network_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    register_new_networks(monkeypatch)
    with pytest.raises(UserError, match="SmallVGG: "):
        onnx_export.export(binary_network("small_vgg"), cifar10.MEAN, cifar10.STD)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-onnx\.txt"):
        onnx_export.require("onnxruntime")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--int8"], "--int8"),
        (["--onnx", BEST], "--onnx"),
        (["--onnx", "a file/model.onnx"], "--onnx: folder a file"),
    ],
)
def test_onnx_options_are_checked_first(
    given: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    monkeypatch.setattr("sys.argv", ["save_binary_model.py", *given])
    with pytest.raises(UserError, match=named):
        save_binary_model.main()


@pytest.mark.parametrize(("correct", "written"), [(8970, False), (8985, True)])
def test_int8_that_costs_too_much_is_not_written(
    correct: int, written: bool, tmp_path: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9,000 right ones in 10,000."""

    def scores(correct: int) -> Scores:
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion[0, 0], confusion[0, 1] = correct, 10_000 - correct
        return Scores(0.0, confusion, torch.zeros(1, 10), 1.0)

    monkeypatch.setattr(onnx_export, "export", lambda *_, **__: b"content")
    monkeypatch.setattr(onnx_export, "OnnxNetwork", lambda _: None)
    monkeypatch.setattr(save_binary_model, "score", lambda *_: scores(correct))
    args = SimpleNamespace(onnx=tmp_path / "a.onnx", int8=True)
    packed = SimpleNamespace(model=lambda *, fold: None)
    data = SimpleNamespace(train=SimpleNamespace(images=pixels))
    with contextlib.nullcontext() if written else pytest.raises(UserError, match=r"--int8: costs 0\.30 points"):
        save_binary_model.save_onnx(args, packed, data, scores(9000), {})
    assert args.onnx.exists() == written
