"""What the network is: architectures, quantizers, binary weights, one bit per weight. Imports nothing else of ours.

To add a network, write its class in a new file here and enter it in ARCHITECTURES below: training, resuming,
evaluation, binarizing and packing find it by that name, which every file of theirs records. ONNX export, and files
without a name, are for the ResNets. `--logit-scale` 1/8 was chosen for a classifier with 64 inputs; another number of
them may need another scale.

- It takes normalized images, float (N, 3, 32, 32), and returns logits (N, 10).
- `ARCHITECTURES[name]()` always builds the same layers, newly initialized.
- Packing folds a BatchNorm that directly follows a convolution into it, if torch.fx can trace `forward`: no `if` on
  a tensor's values or shape. Every other BatchNorm is kept as it is.
"""

from collections.abc import Callable

from torch import nn

from models.binaryconnect import BC, weight_layers
from models.resnet_s import ResNetS, resnet20, resnet32, resnet44, resnet56, resnet110

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}


def build(arch: str) -> nn.Module:
    """The network of a name in ARCHITECTURES, newly initialized. Raises ValueError for another name."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]()


__all__ = [
    "ARCHITECTURES",
    "BC",
    "ResNetS",
    "build",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "weight_layers",
]
