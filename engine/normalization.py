"""With which mean and standard deviation a network's images are normalized."""

from __future__ import annotations

import argparse
import math

from engine.checkpoints import Checkpoint
from engine.cli import UserError

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
