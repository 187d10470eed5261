"""Numbers and checkpoints in words, for the scripts that only look."""

from __future__ import annotations

import warnings
from typing import Any

from engine.checkpoints import BINARY_1BIT, Checkpoint

_KIND_WORDS = {
    "float": "full-precision weights",
    "latent": "latent weights of BinaryConnect, real-valued",
    "binary": "binary weights, -1 and +1, each a float32",
    BINARY_1BIT: "binary weights, one bit each",
    "unknown": "weights of unknown kind",
}


def what_it_is(loaded: Checkpoint) -> str:
    """Architecture and kind of the weights, with the quantizer of latent weights where it is not a sign."""
    if loaded.other_quantizer:
        return f"{loaded.arch}, latent weights of the quantizer {loaded.quantizer!r:.60}, real-valued"
    return f"{loaded.arch}, {_KIND_WORDS[loaded.kind]}"


def headline(loaded: Checkpoint) -> list[str]:
    """What a checkpoint is, in a few lines: path, architecture, kind, epoch, recorded accuracy, notes on reading."""
    lines = [str(loaded.path), f"  {what_it_is(loaded)}"]
    if _is_number(loaded.epoch, 10**9):
        lines.append(f"  epoch {loaded.epoch}")
    metrics = loaded.metrics
    if loaded.kind == BINARY_1BIT:  # its metadata is short
        metrics = {"test_accuracy": loaded.raw.get("accuracy"), "test_images": loaded.raw.get("test_images")}
    for split, images in (("test", "test images"), ("val", "held-out images")):
        accuracy, count = metrics.get(f"{split}_accuracy"), metrics.get(f"{split}_images")
        if _is_number(accuracy, 100):
            scored = f"{count:,} {images}" if _is_number(count, 10**9) else images
            quantized = "quantized" if loaded.other_quantizer else "binarized"
            how = f", {quantized}" if loaded.kind == "latent" else ""
            lines.append(f"  recorded accuracy {accuracy:.2f}% on {scored}{how}")
    return lines + notes(loaded)


def short_headline(loaded: Checkpoint) -> list[str]:
    """Path, architecture and kind on one line, notes on reading."""
    return [f"{loaded.path}: {loaded.arch}, {loaded.kind} weights", *notes(loaded)]


def notes(loaded: Checkpoint) -> list[str]:
    """How the file was read, where that was not plain."""
    return [f"  {note}" for note in loaded.notes]


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
    text = f"{100 * part / max(whole, 1):.2f}%"
    if text == "0.00%" and part:
        return "<0.01%"
    return ">99.99%" if text == "100.00%" and part < whole else text


def fixed(value: float) -> str:
    """`value` in at most 8 characters: with four decimals, or with an exponent where those would not show it."""
    value = value + 0.0  # -0.0 is 0
    text = f"{value:.4f}"
    return f"{value:.1e}" if len(text) > 8 or (value != 0 and abs(value) < 0.0005) else text
