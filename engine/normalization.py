"""Scoring on the test images, and with which mean and standard deviation they are normalized."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.checkpoints import Checkpoint
from engine.cli import UserError
from engine.evaluate import Scores, evaluate
from engine.onnx_export import OnnxNetwork

if TYPE_CHECKING:
    from cifar10 import Split

Triple = tuple[float, float, float]  # R, G, B, where 255 is 1
Normalization = dict[str, Triple]  # "mean" and "std"; empty for the training set's own


def choose(loaded: Checkpoint, args: argparse.Namespace, mean: Triple, std: Triple) -> Normalization:
    """What --mean and --std say, else what the file recorded; empty where that is `mean` and `std`, the default.

    Prints one line for a file of others, and where it is not the default.
    Raises UserError where a file of ours does not record three numbers each.
    """
    default = {"mean": mean, "std": std}
    given = {name: tuple(getattr(args, name)) for name in default if getattr(args, name) is not None}
    chosen = default | _recorded(loaded) | given
    words = ", ".join(f"{name} {' '.join(f'{value:.4g}' for value in values)}" for name, values in chosen.items())
    if loaded.foreign and not given:
        print(f"Normalization assumed: {words} (change: --mean, --std)")
    elif loaded.foreign or chosen != default:
        print(f"Normalization: {words}")
    return chosen if chosen != default else {}


def _recorded(loaded: Checkpoint) -> Normalization:
    if loaded.foreign or "normalization" not in loaded.raw:
        return {}
    try:
        mean, std = (tuple(map(float, loaded.raw["normalization"][name])) for name in ("mean", "std"))
        if len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0:
            return {"mean": mean, "std": std}
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{loaded.path}: its normalization is not a mean and a std of three numbers each")


def score(
    model: nn.Module,
    test: Split,
    args: argparse.Namespace,
    eval_batches: Callable,
    used: Normalization,
    logit_scale: float = 1.0,
) -> Scores:
    """Scores of a network of args.checkpoint on `test`; moves it to args.device. An OnnxNetwork takes the pixels.

    eval_batches: that of cifar10.py. used: see `choose`.
    """
    if isinstance(model, OnnxNetwork):
        batches = zip(test.images.split(args.batch_size), test.labels.split(args.batch_size), strict=True)
    else:
        model.to(args.device, memory_format=torch.channels_last)
        batches = eval_batches(test, args.batch_size, args.device, **used)
    return evaluate(model, batches, len(test), logit_scale=logit_scale, progress="test", path=args.checkpoint)
