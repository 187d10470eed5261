"""Numbers and checkpoints in words, for the scripts that only look."""

from __future__ import annotations

import math
from typing import Any

from engine.checkpoint import BINARY_1BIT, Checkpoint

KIND_WORDS = {
    "float": "full-precision weights",
    "latent": "latent weights of BinaryConnect, real-valued",
    "binary": "binary weights, -1 and +1, each a float32",
    BINARY_1BIT: "binary weights, one bit each",
    "unknown": "weights of a kind that the file does not tell",
}


def headline(loaded: Checkpoint) -> list[str]:
    """What a checkpoint is, in a few lines: path, architecture, kind, epoch, the accuracy it recorded."""
    lines = [str(loaded.path), f"  {loaded.arch}, {KIND_WORDS[loaded.kind]}"]
    if loaded.epoch is not None:
        lines.append(f"  epoch {loaded.epoch}")
    return lines + [f"  recorded {words}" for words in recorded_accuracies(loaded)]


def recorded_accuracies(loaded: Checkpoint) -> list[str]:
    """The accuracies that the file says were measured on it; those of latent weights are those of their signs."""
    names = {"test_accuracy": "test images", "val_accuracy": "held-out images"}
    of = ", binarised" if loaded.kind == "latent" else ""
    found = []
    for key, images in names.items():
        if is_number(loaded.metrics.get(key)):
            count = loaded.metrics.get(key.replace("accuracy", "images"))
            scored = f"{count:,} {images}" if isinstance(count, int) else images
            found.append(f"accuracy {loaded.metrics[key]:.2f}% on {scored}{of}")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def share(part: int, whole: int) -> str:
    """part / whole in per cent with two decimals; 0.00% and 100.00% only where they are exact."""
    if 0 < part < whole:
        per_cent = 100 * part / whole
        if per_cent < 0.005:
            return "<0.01%"
        if per_cent >= 99.995:
            return ">99.99%"
        return f"{per_cent:.2f}%"
    return f"{100 * part / max(whole, 1):.2f}%"


def fixed(value: float) -> str:
    """`value` in at most 8 characters: with four decimals, or in powers of ten where those would not show it."""
    value = value + 0.0  # -0.0 is 0
    text = f"{value:.4f}"
    if len(text) > 8 or (value != 0 and abs(value) < 0.0005):
        text = f"{value:.1e}"
    return text
