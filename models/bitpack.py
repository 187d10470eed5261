"""One bit per weight: the codec, and the packed dictionary <-> the model.

The packed dictionary holds two tensors, because `torch.save` costs about 285 bytes a tensor:

    signs   uint8, ceil(weights / 8): bit i % 8 of byte i // 8 is 1 where weight i is +1. All Conv2d and Linear
            weights one after the other, in the order in which the network registers its layers, each row-major.
    floats  float32: all other floating-point parameters and buffers, module by module in the same order. With
            `batchnorm` "folded", a BatchNorm2d that directly follows a Conv2d is stored as a scale and a shift per
            channel, which take in the convolution's bias. With "kept" it is stored as it is, and so is any other
            BatchNorm in either form: weight, bias, running mean, running variance.

For a ResNet the folded floats are the scales, then the shifts of each BatchNorm, and last the classifier's bias.
The architecture's name alone determines how many numbers there are, so a file cannot declare a size of its own.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from models import build
from models.binaryconnect import count_binary_weights, is_binary, weight_layers

KIND = "binary_1bit"


def pack_bits(w: Tensor) -> Tensor:
    """The signs of w, any shape, as uint8 (ceil(numel / 8),), least significant bit first; +1 is the bit 1.

    Raises ValueError where w holds anything but -1 and +1.
    """
    if not is_binary(w):
        raise ValueError("only weights that are exactly -1 or +1 can be packed to one bit")
    return torch.from_numpy(np.packbits((w.detach().cpu().reshape(-1) > 0).numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` signs of a uint8 vector made by `pack_bits`, as float32 (count,) of -1 and +1.

    Raises ValueError where the vector is not exactly the one that `count` signs give: other dtype, other
    length, or bits set beyond the last sign.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != ((count + 7) // 8,):
        raise ValueError(f"{count} signs need {(count + 7) // 8} bytes, not {tuple(packed.shape)} of {packed.dtype}")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError("bits are set beyond the last sign")
    return torch.from_numpy(bits[:count].astype(np.float32) * 2 - 1)


class ScaleShift(nn.Module):
    """What is left of a BatchNorm after training: y = scale * x + shift per channel; x: (N, C, H, W)."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def scale_and_shift(norm: nn.Module, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 (C,) each, of a BatchNorm in evaluation mode or of a ScaleShift.

    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale, computed in float64.
    conv_bias: of the convolution before it; adds conv_bias * scale to the shift.
    """

    def on_cpu(t: Tensor) -> Tensor:
        return t.detach().cpu().double()  # the CPU, because MPS has no float64

    if isinstance(norm, ScaleShift):
        scale, shift = on_cpu(norm.scale), on_cpu(norm.shift)
    else:
        scale = (on_cpu(norm.weight) if norm.affine else 1) / (on_cpu(norm.running_var) + norm.eps).sqrt()
        shift = (on_cpu(norm.bias) if norm.affine else 0) - on_cpu(norm.running_mean) * scale
    if conv_bias is not None:
        shift = shift + on_cpu(conv_bias) * scale
    device = next(norm.buffers()).device
    return scale.float().to(device), shift.float().to(device)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ScaleShift) or super().is_leaf_module(m, module_qualified_name)


def conv_norm_pairs(model: nn.Module) -> dict[str, str]:
    """Which normalization directly follows which convolution: the name of the Conv2d -> the name of its BatchNorm2d
    (or ScaleShift), in the order of the forward pass.

    The forward pass is traced with torch.fx; names mean nothing. There is no pair where the convolution's output has
    a second use, where one of the two is used twice, or where BatchNorm has no running statistics. A model that
    torch.fx cannot trace has no pairs.
    """
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # tracing runs the network's own code, which may raise anything
        return {}
    uses = Counter(node.target for node in nodes if node.op == "call_module")
    uses.update(node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr")
    pairs = {}
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = model.get_submodule(before.target), model.get_submodule(node.target)
        foldable = isinstance(norm, ScaleShift) or (isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None)
        if isinstance(conv, nn.Conv2d) and foldable and uses[before.target] == uses[node.target] == 1:
            pairs[before.target] = node.target
    return pairs


@torch.no_grad()
def fold_normalization(model: nn.Module, *, into_weights: bool = True) -> nn.Module:
    """Fold normalization that directly follows a convolution (see `conv_norm_pairs`); the other stays. Changes
    `model` and returns it, in evaluation mode.

    into_weights: the scale is multiplied into the convolution and the shift is its bias, w' = w * scale per output
        channel, b' = shift: exact but for float rounding. Otherwise a ScaleShift takes the place of the BatchNorm
        and of the convolution's bias.
    """
    for conv_name, norm_name in conv_norm_pairs(model.eval()).items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        scale, shift = scale_and_shift(norm, conv.bias)
        if into_weights:
            conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
            conv.bias = nn.Parameter(shift, requires_grad=False)
            replacement = nn.Identity()
        else:
            conv.bias = None
            replacement = ScaleShift(scale, shift)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is norm:  # under each of its names
                model.set_submodule(name, replacement)
    return model


def _floats(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Everything in floating point but the binary weights, in a fixed order: (field name, tensor)."""
    binary = {id(layer.weight) for _, layer in weight_layers(model)}
    return [
        (name, t.detach())
        for module in model.modules()
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if t.is_floating_point() and id(t) not in binary
    ]


def pack_model(model: nn.Module, arch: str, *, keep_batchnorm: bool = False) -> dict[str, Any]:
    """The packed dictionary of a network whose Conv2d and Linear weights are all -1 or +1.

    arch: its name in `models.ARCHITECTURES`. Returns arch, kind, batchnorm, signs and floats (see the module's
    docstring). Raises ValueError naming the layer where a weight is neither -1 nor +1.
    """
    count_binary_weights(model)
    reduced = model if keep_batchnorm else fold_normalization(copy.deepcopy(model), into_weights=False)
    return {
        "arch": arch,
        "kind": KIND,
        "batchnorm": "kept" if keep_batchnorm else "folded",
        "signs": pack_bits(torch.cat([layer.weight.detach().reshape(-1) for _, layer in weight_layers(model)])),
        "floats": torch.cat([torch.empty(0), *(t.cpu().float().reshape(-1) for _, t in _floats(reduced))]),
    }


@torch.no_grad()
def unpack_model(packed: dict[str, Any], *, fold: bool = True) -> nn.Module:
    """The network of a packed dictionary, on the CPU, in evaluation mode.

    fold: multiply the scales into the convolutions, whose weights are then +-scale, and drop the normalization
    (the fast form; equal to the other to float rounding). With fold=False the weights are -1 and +1, and each
    convolution is followed by its ScaleShift, or by its BatchNorm where the file kept it.
    Raises ValueError for an unknown architecture or tensors that are not those of the architecture.
    """
    model = build(packed["arch"]).eval()
    if packed["batchnorm"] == "folded":
        fold_normalization(model, into_weights=False)
    weights = [layer.weight for _, layer in weight_layers(model)]
    counts = [weight.numel() for weight in weights]
    for weight, signs in zip(weights, unpack_bits(packed["signs"], sum(counts)).split(counts), strict=True):
        weight.copy_(signs.view_as(weight))

    fields, floats = _floats(model), packed["floats"]
    sizes = [t.numel() for _, t in fields]
    if floats.dtype != torch.float32 or tuple(floats.shape) != (sum(sizes),):
        raise ValueError(f"{sum(sizes)} float32 values are needed, not {tuple(floats.shape)} of {floats.dtype}")
    if not floats.isfinite().all():
        raise ValueError("a scale, shift or another number is not finite")
    for (name, t), values in zip(fields, floats.split(sizes), strict=True):
        if name == "running_var" and (values < 0).any():
            raise ValueError("a running variance is negative")
        t.copy_(values.view_as(t))
    return fold_normalization(model) if fold else model


def information_bytes(model: nn.Module, *, float_bytes: int = 4) -> int:
    """Bytes that the packed network cannot do without: one bit a weight, and its folded floats.

    39,086 for ResNet-20 with 4-byte floats, 36,314 with 2-byte ones.
    """
    weights = sum(layer.weight.numel() for _, layer in weight_layers(model))
    floats = sum(t.numel() for _, t in _floats(fold_normalization(copy.deepcopy(model), into_weights=False)))
    return (weights + 7) // 8 + float_bytes * floats
