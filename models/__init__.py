"""What the network is: architecture, binary weight rule, one-bit packing. Imports nothing else of ours."""

from models.binaryconnect import BC
from models.resnet_s import ARCHITECTURES, ResNetS, build, resnet20, resnet32, resnet44, resnet56, resnet110

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
]
