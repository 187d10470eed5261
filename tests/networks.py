"""Networks and checkpoints for tests that need weights but no training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from engine import checkpoints
from models import ResNetS, build
from models.binaryconnect import binarize_model


def random_network(arch: str = "resnet20", seed: int = 0) -> ResNetS:
    """Latent weights in [-1, 1]; BatchNorms with scales of both signs and one of zero each.

    Their statistics are those of the network with its signs for weights, on coarse random patterns: without that, the
    logits would hardly depend on the image, and a test on them would see nothing.
    """
    torch.manual_seed(seed)
    model = build(arch)
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)):
        torch.nn.init.uniform_(layer.weight, -1, 1)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 0.8, 0.6)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = 1.0  # the statistics of the last batch
        norm.weight.data[0] = -norm.weight.data[0].abs()
        norm.weight.data[1] = 0
    torch.nn.init.normal_(model.linear.bias)
    latent = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("weight")}
    binarize_model(model)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3))
    model.load_state_dict(latent, strict=False)
    return model.eval()


class OtherNetwork(torch.nn.Module):
    """No ResNet: its BatchNorm comes after the ReLU, and no name is that of a ResNet's layer. 2,668 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x).relu()).flatten(1))


def binary_network(arch: str = "resnet20", seed: int = 0) -> ResNetS:
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
