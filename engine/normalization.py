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
    recorded = {} if loaded.foreign else loaded.raw.get("normalization", {})
    try:
        found = {name: tuple(map(float, recorded[name])) for name in ("mean", "std") if recorded}
        fits = all(len(values) == 3 and all(map(math.isfinite, values)) for values in found.values())
        if not fits or (found and min(found["std"]) <= 0):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{loaded.path}: its normalization is not a mean and a std of three numbers each") from None
    return found
