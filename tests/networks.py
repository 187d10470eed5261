"""Networks and checkpoints for tests that need weights but no training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from engine import checkpoint
from models import ResNetS, build
from models.binaryconnect import binarize_model


def random_network(arch: str = "resnet20", seed: int = 0) -> ResNetS:
    """Latent weights in [-1, 1]; BatchNorms that suit the network's signs, some scales negative, one of each zero."""
    torch.manual_seed(seed)
    model = build(arch)
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)):
        torch.nn.init.uniform_(layer.weight, -1, 1)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        fan_in = 9 * norm.num_features
        torch.nn.init.normal_(norm.weight, 0.8, 0.6)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
        norm.running_mean.normal_(0, fan_in**0.5 / 4)
        norm.running_var.uniform_(fan_in / 2, 2 * fan_in)
        norm.weight.data[0] = -norm.weight.data[0].abs()
        norm.weight.data[1] = 0
    torch.nn.init.normal_(model.linear.bias)
    return model.eval()


def binary_network(arch: str = "resnet20", seed: int = 0) -> ResNetS:
    """`random_network` with its signs for weights."""
    model = random_network(arch, seed)
    binarize_model(model)
    return model


def save_checkpoint(path: Path, kind: str, *, arch: str = "resnet20", seed: int = 0) -> Path:
    """Save a random network as a checkpoint of that kind; return `path`."""
    model = (binary_network if kind == "binary" else random_network)(arch, seed)
    more = {"epoch": 3, "metrics": {"val_accuracy": 12.5}, "config": {"seed": seed}, "logit_scale": 0.125}
    checkpoint.save(path, checkpoint.make(arch, kind, model.state_dict(), **more))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
