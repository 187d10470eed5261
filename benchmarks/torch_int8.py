"""A binary network on torch's own int8 convolutions (oneDNN, CPU), called directly: no compiler, no export.

`torch.ops.onednn.qconv2d_pointwise` is what torch.compile's quantized graphs call. It is not a stable interface, so
only the comparison in inference.py uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ResNetS
from models.bitpack import scale_and_shift
from models.resnet_s import shortcut_a


class _Int8Convolution:
    """A 3x3 convolution of weights -1 and +1 on uint8 activations x = step * q; its BatchNorm is in the scales."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, step: float, out_step: float) -> None:
        scale, shift = scale_and_shift(norm)
        signs = torch.where(scale.view(-1, 1, 1, 1) < 0, -conv.weight.detach(), conv.weight.detach())
        self.scale, self.bias = scale.abs().clamp(min=1e-12), shift
        self.zeros = torch.zeros(len(scale), dtype=torch.int64)
        self.step, self.out_step = step, out_step
        self.geometry = (list(conv.stride), list(conv.padding), [1, 1], 1)
        packed = signs.to(torch.int8).contiguous()
        self.weight = torch.ops.onednn.qconv_prepack(packed, self.scale, step, 0, *self.geometry, None)

    def __call__(self, x: Tensor, added: Tensor | None = None, added_step: float = 1.0) -> Tensor:
        """uint8 in, ReLU, uint8 out; `added`, uint8, is added before the ReLU and overwritten by the result."""
        given = (x, self.step, 0, self.weight, self.scale, self.zeros)
        out = (*self.geometry, self.out_step, 0, torch.uint8)
        if added is None:
            return torch.ops.onednn.qconv2d_pointwise(*given, self.bias, *out, "relu", [], "")
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *given, added, self.bias, *out, added_step, 0, "sum", 1.0, "relu", [], ""
        )


class TorchInt8Network:
    """The network on normalized float32 (N, 3, 32, 32): logits (N, 10). First convolution and classifier in float32.

    model: weights -1 and +1, not folded; folded: the same network, folded. images: normalized, for the ranges.
    """

    def __init__(self, model: ResNetS, folded: ResNetS, images: Tensor) -> None:
        self.first, self.linear = folded.conv1, folded.linear
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        steps = [step / 255 for step in _greatest_inputs(folded, images)]
        self.first_step, self.last_step = steps[0], steps[-1]
        self.blocks = []
        for i, block in enumerate(blocks):
            step, middle, after = steps[2 * i : 2 * i + 3]
            one = _Int8Convolution(block.conv1, block.bn1, step, middle)
            two = _Int8Convolution(block.conv2, block.bn2, middle, after)
            self.blocks.append((one, two, block.added, block.stride, step))

    def __call__(self, images: Tensor) -> Tensor:
        x = F.relu(self.first(images))
        x = (x / self.first_step).round_().clamp_(max=255).to(torch.uint8)
        for one, two, added, stride, step in self.blocks:
            x = two(one(x), shortcut_a(x, added, stride).contiguous(memory_format=torch.channels_last), step)
        return self.linear(x.float().mean((2, 3)) * self.last_step)


def _greatest_inputs(folded: ResNetS, images: Tensor) -> list[float]:
    """The (nearly) greatest input of each block's convolutions, in order, then of the pooling."""
    found: list[float] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor | None = None) -> None:
        values = (_inputs[0] if output is None else output).flatten()
        found.append(float(values.kthvalue(int(values.numel() * (1 - 1e-5))).values))

    blocks = [block for stage in (folded.layer1, folded.layer2, folded.layer3) for block in stage]
    handles = [conv.register_forward_pre_hook(note) for block in blocks for conv in (block.conv1, block.conv2)]
    handles.append(blocks[-1].register_forward_hook(note))
    with torch.no_grad():
        folded(images)
    for handle in handles:
        handle.remove()
    return found
