"""The ONNX export: one bit a weight in the file, the same network as in torch, integer kernels in the int8 form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import binary_network, register_new_networks, save_checkpoint

import cifar10
from engine import onnx_export
from engine.checkpoints import BEST
from engine.cli import UserError

ACCURACY = re.compile(r"^Test Accuracy: (\d+\.\d\d)%$", re.MULTILINE)


@pytest.fixture(scope="module")
def pixels(small_data: Path) -> torch.Tensor:
    return cifar10.load(small_data).train.images


@pytest.fixture(scope="module")
def exports(pixels: torch.Tensor) -> dict[str, bytes]:
    """Of one network, whose scales are positive, negative and zero, the two forms."""
    model = binary_network()
    means = (cifar10.MEAN, cifar10.STD)
    return {
        "float": onnx_export.export(model, *means),
        "int8": onnx_export.export(model, *means, pixels.numpy()),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to how much the logits vary from image to image."""
    return float((found - expected).square().mean().sqrt() / expected.std(0).square().mean().sqrt())


def after_loading(content: bytes, folder: Path) -> onnx.ModelProto:
    """The graph as onnxruntime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


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
def test_one_bit_a_weight_in_the_file(exports: dict[str, bytes], form: str) -> None:
    assert len(exports[form]) < 50_000
    tensors = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load_from_string(exports[form]).graph.initializer}
    largest = sorted(tensors.values(), key=lambda x: -x.nbytes)
    assert (largest[0].dtype, largest[0].nbytes) == (np.uint8, 33_542)
    assert largest[1].nbytes <= 2560  # the classifier's input has 64 channels: no other tensor holds weights


def test_the_runtime_unpacks_at_load_and_runs_integer_convolutions(exports: dict[str, bytes], tmp_path: Path) -> None:
    run = Counter(node.op_type for node in after_loading(exports["int8"], tmp_path).graph.node)
    assert run["QLinearConv"] == 19
    assert run["Conv"] == 0
    assert run["QLinearAdd"] == 9
    assert not {"BitShift", "BitwiseAnd", "Split", "Reshape"} & set(run)


def test_float_form_is_folded_at_load(exports: dict[str, bytes], tmp_path: Path) -> None:
    run = Counter(node.op_type for node in after_loading(exports["float"], tmp_path).graph.node)
    assert run["Conv"] + run["FusedConv"] == 19
    assert run["Mul"] <= 1  # that of the normalization; none is left on weights
    assert not {"BitShift", "BitwiseAnd", "Split", "Reshape"} & set(run)


def test_other_depths_and_batch_sizes(pixels: torch.Tensor) -> None:
    model = binary_network("resnet32")
    network = onnx_export.OnnxNetwork(onnx_export.export(model, cifar10.MEAN, cifar10.STD))
    with torch.no_grad():
        expected = model(cifar10.normalize(pixels[:7]))
    for part in (slice(0, 1), slice(0, 7)):
        torch.testing.assert_close(network(pixels[part]), expected[part], rtol=1e-4, atol=1e-4)


def test_what_is_no_onnx_file_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a network")
    for name in ("a.onnx", "b.onnx"):
        with pytest.raises(UserError, match=re.escape(name)):
            onnx_export.OnnxNetwork(tmp_path / name)


def test_another_network_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    register_new_networks(monkeypatch)
    with pytest.raises(UserError, match=r"^SmallVGG: only the ResNets[^\n]*$"):
        onnx_export.export(binary_network("small_vgg"), cifar10.MEAN, cifar10.STD)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-onnx\.txt"):
        onnx_export.require("onnxruntime")


def test_scripts_export_and_run_the_file(tmp_path: Path, small_data: Path, run_script: Callable) -> None:
    save_checkpoint(tmp_path / BEST, "latent")
    arguments = ("--data-dir", small_data, "--onnx", "float.onnx")
    printed = run_script("save_binary_model.py", *arguments, cwd=tmp_path).stdout
    assert printed.count("Same predictions on 100 of 100 images") == 2
    shown = run_script("load_binarized_example.py", "float.onnx", "--data-dir", small_data, cwd=tmp_path).stdout
    assert ACCURACY.findall(shown) == ACCURACY.findall(printed)[-1:]
    assert shown.count("classified as") == 5
    assert "Scored on 100 test images\n" in shown


def test_onnx_options_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import save_binary_model

    monkeypatch.chdir(tmp_path)
    for given, message in ((["--int8"], "--onnx FILE"), (["--onnx", BEST], "does not end in")):
        monkeypatch.setattr("sys.argv", ["save_binary_model.py", *given])
        with pytest.raises(UserError, match=message):
            save_binary_model.main()
    Path("a file").touch()
    monkeypatch.setattr("sys.argv", ["save_binary_model.py", "--onnx", "a file/model.onnx"])
    with pytest.raises(UserError, match="--onnx: folder a file: cannot be written to: is not a folder"):
        save_binary_model.main()


def test_int8_that_costs_too_much_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import save_binary_model
    from engine.evaluate import Scores

    def scores(correct: int) -> Scores:
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion[0, 0], confusion[0, 1] = correct, 10_000 - correct
        return Scores(0.0, confusion, 1.0)

    class Packed:
        def model(self, *, fold: bool) -> None:
            return None

    class Data:
        class train:
            images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)

    monkeypatch.setattr(onnx_export, "export", lambda *_: b"content")
    monkeypatch.setattr(onnx_export, "OnnxNetwork", lambda _: None)
    args = save_binary_model.make_parser().parse_args(["--onnx", str(tmp_path / "a.onnx"), "--int8"])
    for correct, written in ((8970, False), (8985, True)):
        monkeypatch.setattr(save_binary_model, "score", lambda *_, n=correct: (scores(n), torch.zeros(1, 10)))
        if written:
            save_binary_model.save_onnx(args, Packed(), Data(), (scores(9000), torch.zeros(1, 10)))
        else:
            with pytest.raises(UserError, match=r"costs 0\.30 points"):
                save_binary_model.save_onnx(args, Packed(), Data(), (scores(9000), torch.zeros(1, 10)))
        assert (tmp_path / "a.onnx").exists() == written
