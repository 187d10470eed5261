"""Numbers and checkpoints in words, for the scripts that only look."""

from __future__ import annotations

import warnings
from typing import Any

from engine.checkpoints import BINARY_1BIT, Checkpoint

KIND_WORDS = {
    "float": "full-precision weights",
    "latent": "latent weights of BinaryConnect, real-valued",
    "binary": "binary weights, -1 and +1, each a float32",
    BINARY_1BIT: "binary weights, one bit each",
    "unknown": "weights of a kind that the file does not tell",
}


def what_it_is(loaded: Checkpoint) -> str:
    """Architecture and kind of the weights."""
    return f"{loaded.arch}, {KIND_WORDS[loaded.kind]}"


def headline(loaded: Checkpoint) -> list[str]:
    """What a checkpoint is, in a few lines: path, architecture, kind, epoch, the accuracy it recorded."""
    lines = [str(loaded.path), f"  {what_it_is(loaded)}"]
    if _is_number(loaded.epoch, 10**9):
        beyond = f" and {counted(loaded.steps_beyond, 'step')}" if loaded.steps_beyond else ""
        lines.append(f"  epoch {loaded.epoch}{beyond}")
    return lines + [f"  recorded {words}" for words in recorded_accuracies(loaded)]


def recorded_accuracies(loaded: Checkpoint) -> list[str]:
    """The accuracies that the file says were measured on it; those of latent weights are those of their signs.

    A run stopped within an epoch records those of the end of the epoch before, and of other weights than its own.
    """
    names = {"test_accuracy": "test images", "val_accuracy": "held-out images"}
    of = ", binarized" if loaded.kind == "latent" else ""
    of += ", before those steps" if loaded.steps_beyond else ""
    metrics = loaded.metrics
    if loaded.kind == BINARY_1BIT:  # its metadata is short
        metrics = {"test_accuracy": loaded.raw.get("accuracy"), "test_images": loaded.raw.get("test_images")}
    found = []
    for key, images in names.items():
        value, count = metrics.get(key), metrics.get(key.replace("accuracy", "images"))
        if _is_number(value, 100):
            scored = f"{count:,} {images}" if type(count) is int and 0 <= count <= 10**9 else images
            found.append(f"accuracy {value:.2f}% on {scored}{of}")
    return found


def draw_title(figure: Any, title: str, **placed: Any) -> None:
    """The title of a matplotlib figure, which may hold the name of a file, and so any character and no formula."""
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # the picture shows a box for it
    shown = "".join(c if c.isprintable() else "?" for c in title)
    figure.suptitle(shown, fontsize=14, parse_math=False, **placed)


def counted(count: int, thing: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{count:,} {thing}" + ("s" if count != 1 else "")


def _is_number(value: Any, most: int) -> bool:
    """Whether a value from a file is a number between 0 and `most`; it may be anything else."""
    return type(value) in (int, float) and 0 <= value <= most


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
