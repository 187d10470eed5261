"""Networks and checkpoints for tests that need weights but no training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import checkpoints
from models import ARCHITECTURES, build, weight_layers
from models.binaryconnect import binarize_model


class SmallVGG(nn.Module):
    """Every layer in a Sequential, with biases; the last BatchNorm follows a Linear."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(16 * 16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class PreActivationBlock(nn.Module):
    """BatchNorm - ReLU - convolution, twice: neither bn1 nor the order of registration belongs to conv1's output."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class PreActivationResNet(nn.Module):
    """He et al. 2016, "Identity Mappings in Deep Residual Networks". Only conv1 -> bn2 of a block can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.Sequential(PreActivationBlock(8), PreActivationBlock(8))
        self.bn1 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.bn1(self.blocks(self.conv1(x)))).mean((2, 3)))


NEW_NETWORKS = {"small_vgg": SmallVGG, "preactivation": PreActivationResNet}


def register_new_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter NEW_NETWORKS in the registry for the rest of a test."""
    for name, network in NEW_NETWORKS.items():
        monkeypatch.setitem(ARCHITECTURES, name, network)


def random_network(arch: str = "resnet20", seed: int = 0) -> nn.Module:
    """Latent weights in [-1, 1]; BatchNorms with scales of both signs and one of zero each.

    Their statistics are those of the network with its signs for weights, on coarse random patterns. Without that the
    logits would hardly depend on the image, and a test on them would see nothing.
    """
    torch.manual_seed(seed)
    model = build(arch)
    layers = [layer for _, layer in weight_layers(model)]
    for layer in layers:
        nn.init.uniform_(layer.weight, -1, 1)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 0.8, 0.6)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = 1.0  # the statistics of the last batch
        norm.weight.data[0] = -norm.weight.data[0].abs()
        norm.weight.data[1] = 0
    for layer in layers:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    latent = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("weight")}
    binarize_model(model)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3))
    model.load_state_dict(latent, strict=False)
    return model.eval()


def binary_network(arch: str = "resnet20", seed: int = 0) -> nn.Module:
    """`random_network` with its signs for weights."""
    model = random_network(arch, seed)
    binarize_model(model)
    return model


def save_checkpoint(path: Path, kind: str, *, arch: str = "resnet20", seed: int = 0) -> Path:
    """Save a random network as a checkpoint of that kind; return `path`."""
    model = (binary_network if kind == "binary" else random_network)(arch, seed)
    more = {"epoch": 3, "metrics": {"val_accuracy": 12.5}, "config": {"seed": seed}, "logit_scale": 0.125}
    checkpoints.save(path, checkpoints.make(arch, kind, model.state_dict(), **more))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
