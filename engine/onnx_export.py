"""A binary ResNet as an ONNX file whose weights are one bit each, and such a file as a network.

The input `images` is uint8 (N, 32, 32, 3): RGB pixels as image libraries give them; the normalization is part of the
graph. The output `logits` is float32 (N, 10).

All signs lie in one uint8 tensor, laid out as in models/bitpack.py. Standard operators unpack it: BitShift and
BitwiseAnd extract the bits, Cast, Mul and Sub make them -1 and +1, Split and Reshape give each layer its weights.
They depend on constants only, so a runtime does this once, when it loads the file.

In the int8 form activations are quantized to 8 bits; weights are the int8 values -1 and +1 with the channel's scale
as their quantization step, so the weights are not rounded. QuantizeLinear and DequantizeLinear surround each operator
("QDQ"), and the runtime replaces the three by an integer kernel.

`onnx` and `onnxruntime` (requirements-onnx.txt) are imported where they are used.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.cli import UserError, reason
from models import ResNetS, weight_layers
from models.bitpack import conv_norm_pairs, pack_bits, scale_and_shift

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the first with BitwiseAnd
IR_VERSION = 8  # that of the same ONNX release, so that older runtimes read the file
FLOAT, INT8, INT32 = 1, 3, 6  # onnx.TensorProto.FLOAT and so on


def require(*packages: str) -> None:
    """Raise UserError where one of `packages` ("onnx", "onnxruntime") cannot be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"ONNX: {package} cannot be imported ({reason(error)}); pip install -r requirements-onnx.txt"
            ) from error


def check_exportable(model: nn.Module, where: Path | str) -> None:
    """Raise UserError, naming `where`, unless the model is one of models/resnet_s.py, the only ones exported."""
    if not isinstance(model, ResNetS):
        raise UserError(f"{where}: only the ResNets of models/resnet_s.py can be exported to ONNX")


class _Graph:
    """Nodes and constants under short names, which keep the file small."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple, str] = {}
        self._names = 0

    def new_name(self) -> str:
        self._names += 1
        return np.base_repr(self._names, 36).lower()

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant; equal ones are stored once."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.new_name()
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def add(self, operator: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node whose outputs have these names, by default a new one; return the first."""
        from onnx import helper

        outputs = outputs or [self.new_name()]
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]


class _Network(_Graph):
    """Builds the graph of a network: in float32, or with 8-bit activations where `ranges` are given.

    ranges: for each place of an activation the least and the greatest value to express.
    After `build()`, `places` maps each activation's place to its tensor.
    """

    def __init__(
        self,
        model: ResNetS,
        mean: Sequence[float],
        std: Sequence[float],
        ranges: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, np.array(mean, np.float32), np.array(std, np.float32)
        self.ranges = ranges
        self.places: dict[str, str] = {}
        self.steps: dict[str, tuple[np.float32, np.uint8]] = {}  # 8 bits: tensor -> quantization step, zero point
        self.scales: dict[str, np.ndarray] = {}  # float32 (channels,), at least 0
        self.shifts: dict[str, np.ndarray] = {}
        self.weights = self._unpacked(self._signs())

    def _signs(self) -> Tensor:
        """All signs, float32 (weights,); sets `scales` and `shifts`. A channel with a negative scale has its signs
        flipped instead: exact, and a quantization step must be positive."""
        signs, norms = [], conv_norm_pairs(self.model)
        for name, layer in weight_layers(self.model):
            weight = layer.weight.detach()
            if isinstance(layer, nn.Conv2d):
                scale, shift = scale_and_shift(self.model.get_submodule(norms[name]))
                weight = torch.where(scale.view(-1, 1, 1, 1) < 0, -weight, weight)
            else:
                scale, shift = torch.ones(layer.out_features), layer.bias.detach()
            self.scales[name], self.shifts[name] = scale.abs().numpy(), shift.numpy()
            signs.append(weight.reshape(-1))
        return torch.cat(signs)

    def _unpacked(self, signs: Tensor) -> dict[str, str]:
        """Nodes that unpack the bits: for each layer the tensor of its -1 and +1, float32 or int8, in its shape."""
        packed = pack_bits(signs).numpy()  # weight i is bit i % 8 of byte i // 8
        bits = self.constant(packed[:, None]), self.constant(range(8), np.uint8)
        bits = self.add("BitwiseAnd", self.add("BitShift", *bits, direction="RIGHT"), self.constant(1, np.uint8))
        x = self.add("Cast", bits, to=INT32)  # (bytes, 8) of 0 and 1; int32: not every runtime multiplies int8
        x = self.add("Sub", self.add("Mul", x, self.constant(2, np.int32)), self.constant(1, np.int32))
        x = self.add("Reshape", self.add("Cast", x, to=INT8 if self.ranges else FLOAT), self.constant([-1], np.int64))
        layers = weight_layers(self.model)
        counts = [layer.weight.numel() for _, layer in layers]
        unused = [8 * packed.size - len(signs)] if len(signs) % 8 else []
        sizes = self.constant(counts + unused, np.int64)
        parts = [self.new_name() for _ in counts + unused]
        self.add("Split", x, sizes, outputs=parts)
        return {
            name: self.add("Reshape", part, self.constant(layer.weight.shape, np.int64))
            for (name, layer), part in zip(layers, parts, strict=False)
        }

    # Activations and weights in one of the two forms:

    def store(self, x: str, place: str) -> str:
        """An activation as it is written to memory; `place` is its name for calibration."""
        self.places[place] = x
        if not self.ranges:
            return x
        low, high = min(self.ranges[place][0], 0.0), max(self.ranges[place][1], 0.0)
        step = np.float32(max(high - low, 1e-6) / 255)
        zero = np.uint8(np.clip(round(-low / float(step)), 0, 255))
        stored = self.add("QuantizeLinear", x, self.constant(step), self.constant(zero))
        self.steps[stored] = step, zero
        return stored

    def read(self, x: str) -> str:
        """A stored activation as an operator's input."""
        if not self.ranges:
            return x
        step, zero = self.steps[x]
        return self.add("DequantizeLinear", x, self.constant(step), self.constant(zero))

    def weight_and_bias(self, name: str, x: str) -> tuple[str, str]:
        """Of a convolution whose input is the stored activation `x`."""
        if not self.ranges:
            scale = self.constant(self.scales[name][:, None, None, None])
            return self.add("Mul", self.weights[name], scale), self.constant(self.shifts[name])
        shift, step = self.shifts[name].astype(np.float64), float(self.steps[x][0])
        # The bias is an int32 multiple of step * scale. Where the scale is 0, or too small for that, the least scale
        # that can express the bias takes its place; what it lets through is below 2e-4 of the bias.
        least = np.maximum(np.abs(shift) / (step * 2.0**30), 1e-12)
        scale = np.maximum(self.scales[name], least).astype(np.float32)
        steps = self.constant(scale)
        bias_steps = self.add("Mul", steps, self.constant(step, np.float32))
        zeros = self.constant(np.zeros(len(scale), np.int8))
        bias = np.round(shift / (step * scale.astype(np.float64))).astype(np.int32)
        return (
            self.add("DequantizeLinear", self.weights[name], steps, zeros, axis=0),
            self.add("DequantizeLinear", self.constant(bias), bias_steps, axis=0),
        )

    # The network, as models/resnet_s.py has it:

    def build(self) -> onnx.ModelProto:
        from onnx import helper

        x = self.store(self._normalized("images"), "pixels")
        x = self._convolution("conv1", x, relu=True)
        for stage in ("layer1", "layer2", "layer3"):
            for number, block in enumerate(getattr(self.model, stage)):
                x = self._block(f"{stage}.{number}", block, x)
        pooled = self.store(self.add("GlobalAveragePool", self.read(x)), "pooled")
        self._classifier(self.add("Flatten", self.read(pooled)))
        images = helper.make_tensor_value_info("images", helper.TensorProto.UINT8, ["N", 32, 32, 3], "RGB pixels")
        logits = helper.make_tensor_value_info("logits", FLOAT, ["N", self.model.linear.out_features])
        made = helper.make_graph(self.nodes, "binary_resnet", [images], [logits], self.initializers)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _normalized(self, images: str) -> str:
        """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32): (x / 255 - mean) / std."""
        # One constant per value of an image, expanded at load: adding three values to planes is slow in runtimes.
        shape = self.constant([3, 32, 32], np.int64)
        scale = self.add("Expand", self.constant((1 / (255 * self.std))[:, None, None]), shape)
        shift = self.add("Expand", self.constant((-self.mean / self.std)[:, None, None]), shape)
        x = self.add("Cast", self.add("Transpose", images, perm=[0, 3, 1, 2]), to=FLOAT)
        return self.add("Add", self.add("Mul", x, scale), shift)

    def _convolution(self, name: str, x: str, *, relu: bool, stride: int = 1) -> str:
        weight, bias = self.weight_and_bias(name, x)
        strides = {} if stride == 1 else {"strides": [stride, stride]}
        y = self.add("Conv", self.read(x), weight, bias, pads=[1, 1, 1, 1], **strides)
        return self.store(self.add("Relu", y) if relu else y, name)

    def _block(self, name: str, block: nn.Module, x: str) -> str:
        y = self._convolution(f"{name}.conv1", x, relu=True, stride=block.stride)
        y = self._convolution(f"{name}.conv2", y, relu=False)
        added = self.add("Add", self.read(y), self.read(self._shortcut(block, x)))
        return self.store(self.add("Relu", added), name)

    def _shortcut(self, block: nn.Module, x: str) -> str:
        """Every stride-th pixel, and new channels of zeros before and after the old ones."""
        if block.stride == 1 and block.added == 0:
            return x
        # The maximum over one pixel is that pixel: runtimes have a faster kernel for it than for slices with steps.
        strided = self.add("MaxPool", x, kernel_shape=[1, 1], strides=[block.stride] * 2)
        pads = self.constant([0, block.added // 2, 0, 0, 0, block.added - block.added // 2, 0, 0], np.int64)
        zero = self.constant(0, np.uint8 if self.ranges else np.float32)  # after a ReLU the zero point is 0
        shortcut = self.add("Pad", strided, pads, zero)
        if self.ranges:
            self.steps[shortcut] = self.steps[x]  # moved, not computed with
        return shortcut

    def _classifier(self, features: str) -> None:
        """In float32 in both forms: 640 products need no speed."""
        weight = self.weights["linear"]
        if self.ranges:
            weight = self.add("Cast", weight, to=FLOAT)
        self.add("Gemm", features, weight, self.constant(self.shifts["linear"]), transB=1, outputs=["logits"])


def export(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], calibration: np.ndarray | None = None
) -> bytes:
    """The content of an ONNX file for `model`, whose weights are -1 and +1, its BatchNorms (or scales) not folded.

    mean, std: of the normalization, one value a channel, where pixels go from 0 to 1.
    calibration: uint8 (N, 32, 32, 3), training images whose activations set the ranges of the int8 form; None for
        the float form.
    Raises UserError for another network than a ResNetS, and what the ONNX checker raises for an invalid graph.
    """
    check_exportable(model, type(model).__name__)
    import onnx

    network = _Network(model, mean, std)
    made = network.build()
    if calibration is not None:
        ranges = _activation_ranges(made, network.places, calibration)
        made = _Network(model, mean, std, ranges).build()
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def _activation_ranges(
    made: onnx.ModelProto, places: dict[str, str], images: np.ndarray, batch: int = 100
) -> dict[str, tuple[float, float]]:
    """For each place the range to divide into 256 steps: all but a hundred-thousandth of the activations at each end.

    The few beyond are clipped; a range that held them would make all steps coarser. On a network of 82.9 % this kept
    the logits closest: 18 of 4,000 predictions changed, with the full range 33, with a ten-thousandth 26.
    """
    from onnx import helper

    made.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in places.values())
    session = start_session(made.SerializeToString())
    ends: dict[str, list[np.ndarray]] = {place: [] for place in places}
    for start in range(0, len(images), batch):
        found = session.run(list(places.values()), {"images": images[start : start + batch]})
        for place, values in zip(places, found, strict=True):
            ends[place].append(np.quantile(values, [1e-5, 1 - 1e-5]))
    return {place: tuple(np.mean(each, axis=0).tolist()) for place, each in ends.items()}


def start_session(content: bytes) -> Any:
    """An onnxruntime session of an ONNX file's content, on the CPU with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised as well
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_network(args: argparse.Namespace) -> OnnxNetwork:
    """The network of the ONNX file args.checkpoint.

    Raises UserError, also for options that are for other files: the graph normalizes by itself.
    """
    for name in ("weights_key", "mean", "std"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is not for an ONNX file; leave it out")
    return OnnxNetwork(args.checkpoint)


class OnnxNetwork(nn.Module):
    """An ONNX file run by onnxruntime on the CPU. forward: uint8 (N, 32, 32, 3) pixels -> float32 (N, 10) logits.

    file: its path, or its content.
    Raises UserError where onnxruntime is missing, or where the file is no such network.
    """

    def __init__(self, file: Path | bytes) -> None:
        super().__init__()
        require("onnxruntime")
        try:
            self.session = start_session(file if isinstance(file, bytes) else file.read_bytes())
            inputs = [(x.name, x.type, x.shape[1:]) for x in self.session.get_inputs()]
            if inputs != [("images", "tensor(uint8)", [32, 32, 3])] or self.session.get_outputs()[0].name != "logits":
                raise ValueError("its input is not uint8 images of 32 x 32 x 3, or its output not logits")
        except Exception as error:  # onnxruntime has many of its own
            name = "the exported network" if isinstance(file, bytes) else file
            raise UserError(f"{name}: not an ONNX file of save_binary_model.py: {reason(error)}") from error

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"images": images.numpy()})[0])
