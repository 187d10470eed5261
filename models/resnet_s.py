"""The small ResNets for CIFAR-10: depth 6n + 2, widths 16, 32, 64, parameter-free shortcuts.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.
Module names are those of the widely used CIFAR checkpoints: conv1 bn1 layer1.0.conv1 ... linear.

| name      | layers with weights | parameters |
|-----------|---------------------|------------|
| resnet20  |                  20 |    269,722 |
| resnet32  |                  32 |    464,154 |
| resnet44  |                  44 |    658,586 |
| resnet56  |                  56 |    853,018 |
| resnet110 |                 110 |  1,727,962 |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (20, 32, 44, 56, 110)
NUM_CLASSES = 10
WIDTHS = (16, 32, 64)


def shortcut_a(x: Tensor, added: int, stride: int) -> Tensor:
    """The parameter-free shortcut "option A": every stride-th pixel, and `added` new channels of zeros.

    x: (N, C, H, W); returns (N, C + added, H / stride, W / stride). Half of the zeros go before the old
    channels and half after, as the published checkpoints assume.
    """
    if stride == 1 and added == 0:
        return x
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added - added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (N, in_planes, H, W) -> (N, planes, H / stride, W / stride)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = planes - in_planes, stride  # what the shortcut has to make up for
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut_a(x, self.added, self.stride))


class ResNetS(nn.Module):
    """A CIFAR-10 ResNet of `depth` = 6n + 2 layers with weights.

    forward: normalized images (N, 3, 32, 32) float -> logits (N, 10).
    Raises ValueError for a depth that is not 6n + 2.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2 with n >= 1")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], NUM_CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, "Delving Deep into Rectifiers"
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 3, 32, 32) -> (N, 16, 32, 32)
        x = self.layer1(x)
        x = self.layer2(x)  # (N, 32, 16, 16)
        x = self.layer3(x)  # (N, 64, 8, 8)
        return self.linear(x.mean((2, 3)))  # (N, 64) -> (N, 10)


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet20() -> ResNetS:
    """ResNet-20: 269,722 parameters."""
    return ResNetS(20)


def resnet32() -> ResNetS:
    """ResNet-32: 464,154 parameters."""
    return ResNetS(32)


def resnet44() -> ResNetS:
    """ResNet-44: 658,586 parameters."""
    return ResNetS(44)


def resnet56() -> ResNetS:
    """ResNet-56: 853,018 parameters."""
    return ResNetS(56)


def resnet110() -> ResNetS:
    """ResNet-110: 1,727,962 parameters."""
    return ResNetS(110)


def architecture_of(keys: Iterable[str]) -> str | None:
    """The ResNet whose parameter names these could be, told by the number of blocks; None if none fits.

    For files of others, which do not name their architecture.
    """
    blocks = {int(m[1]) for m in (re.match(r"layer1\.(\d{1,3})\.", key) for key in keys) if m}
    depth = 6 * len(blocks) + 2
    return f"resnet{depth}" if depth in DEPTHS and blocks == set(range(len(blocks))) else None
