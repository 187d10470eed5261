"""One bit per weight: the codec, and the packed dictionary <-> the model.

The packed dictionary holds two tensors, because `torch.save` costs about 285 bytes a tensor:

    signs   uint8, ceil(weights / 8): bit i % 8 of byte i // 8 is 1 where weight i is +1. All Conv2d and Linear
            weights one after the other, in the order of the network, each in row-major order.
    floats  float32: for each BatchNorm its scales, then its shifts (`batchnorm` "folded"), or its weight, bias,
            running mean and running variance (`batchnorm` "kept"); last the bias of the classifier.

Which weights these are follows from the architecture's name alone, so a file cannot declare a size of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.binaryconnect import is_binary
from models.resnet_s import ResNetS, build, weight_layers

KIND = "binary_1bit"
_KEPT = ("weight", "bias", "running_mean", "running_var")


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


def norm_name(conv_name: str) -> str:
    """The name of the normalization that follows a convolution: layer1.0.conv2 -> layer1.0.bn2."""
    return conv_name.replace("conv", "bn")


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 (C,) each, of a BatchNorm in evaluation mode or of a ScaleShift.

    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale; worked out in float64.
    """
    if isinstance(norm, ScaleShift):
        return norm.scale, norm.shift
    weight, bias, mean, variance = (getattr(norm, field).detach().cpu().double() for field in _KEPT)  # MPS has none
    scale = weight / (variance + norm.eps).sqrt()
    shift = bias - mean * scale
    device = norm.weight.device
    return scale.float().to(device), shift.float().to(device)


def pack_model(model: ResNetS, arch: str, *, keep_batchnorm: bool = False) -> dict[str, Any]:
    """The packed dictionary of a network whose Conv2d and Linear weights are all -1 or +1.

    Returns arch, kind, batchnorm, signs and floats (see the module's docstring).
    Raises ValueError naming the layer where a weight is neither.
    """
    for name, layer in weight_layers(model):
        if not is_binary(layer.weight):
            raise ValueError(f"{name}.weight holds values other than -1 and +1")
    signs = pack_bits(torch.cat([layer.weight.detach().reshape(-1) for _, layer in weight_layers(model)]))
    floats: list[Tensor] = []
    for norm in _norms(model):
        floats += [getattr(norm, field).detach() for field in _KEPT] if keep_batchnorm else scale_and_shift(norm)
    floats.append(model.linear.bias.detach())
    return {
        "arch": arch,
        "kind": KIND,
        "batchnorm": "kept" if keep_batchnorm else "folded",
        "signs": signs,
        "floats": torch.cat([f.cpu().float() for f in floats]),
    }


def unpack_model(packed: dict[str, Any], *, fold: bool = True) -> ResNetS:
    """The network of a packed dictionary, on the CPU, in evaluation mode.

    fold: multiply the scales into the convolutions, whose weights are then +-scale, and drop the normalization
    (the fast form; equal to the other to float rounding). With fold=False the weights are -1 and +1, each
    convolution followed by its ScaleShift, or by its BatchNorm where the file kept it.
    Raises ValueError for an unknown architecture or tensors that are not those of the architecture.
    """
    model = build(packed["arch"])
    layers = [layer for _, layer in weight_layers(model)]
    counts = [layer.weight.numel() for layer in layers]
    with torch.no_grad():
        for layer, signs in zip(layers, unpack_bits(packed["signs"], sum(counts)).split(counts), strict=True):
            layer.weight.copy_(signs.view_as(layer.weight))
    _load_floats(model, packed["floats"], kept=packed["batchnorm"] == "kept")
    model.eval()
    return fold_normalization(model) if fold else model


def _load_floats(model: ResNetS, floats: Tensor, *, kept: bool) -> None:
    norms = _norms(model)
    fields = 4 if kept else 2
    sizes = [norm.num_features for norm in norms for _ in range(fields)] + [model.linear.bias.numel()]
    if floats.dtype != torch.float32 or tuple(floats.shape) != (sum(sizes),):
        raise ValueError(f"{sum(sizes)} float32 values are needed, not {tuple(floats.shape)} of {floats.dtype}")
    if not floats.isfinite().all():
        raise ValueError("a scale, shift or bias is not finite")
    parts = list(floats.split(sizes))
    if kept and any((variance < 0).any() for variance in parts[3::4]):
        raise ValueError("a running variance is negative")
    with torch.no_grad():
        model.linear.bias.copy_(parts.pop())
        for i, (name, _) in enumerate(_convolutions(model)):
            values = parts[i * fields : (i + 1) * fields]
            if kept:
                for field, value in zip(_KEPT, values, strict=True):
                    getattr(norms[i], field).copy_(value)
            else:
                model.set_submodule(norm_name(name), ScaleShift(*(v.clone() for v in values)))


@torch.no_grad()
def fold_normalization(model: ResNetS) -> ResNetS:
    """Multiply each scale into its convolution and add the shift as its bias; changes `model` and returns it.

    w' = w * scale per output channel, b' = shift: exact but for float rounding, in evaluation mode only.
    """
    for name, conv in _convolutions(model):
        scale, shift = scale_and_shift(model.get_submodule(norm_name(name)))
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(shift.clone(), requires_grad=False)
        model.set_submodule(norm_name(name), nn.Identity())
    return model.eval()


def _convolutions(model: ResNetS) -> list[tuple[str, nn.Conv2d]]:
    return [(name, layer) for name, layer in weight_layers(model) if isinstance(layer, nn.Conv2d)]


def _norms(model: ResNetS) -> list[nn.Module]:
    return [model.get_submodule(norm_name(name)) for name, _ in _convolutions(model)]


def information_bytes(model: ResNetS, *, float_bytes: int = 4) -> int:
    """Bytes that the packed network cannot do without: one bit a weight, one scale and one shift a channel, and
    the classifier's bias. 39,086 for ResNet-20 with 4-byte floats, 36,314 with 2-byte ones."""
    weights = sum(layer.weight.numel() for _, layer in weight_layers(model))
    channels = sum(conv.out_channels for _, conv in _convolutions(model))
    return (weights + 7) // 8 + float_bytes * (2 * channels + model.linear.bias.numel())
