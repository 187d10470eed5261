"""training_curves.png: loss, accuracy, learning rates and, for BinaryConnect, flipped and saturated weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from engine.files import atomic_write

CURVES = "training_curves.png"
PANELS = (  # title, columns of metrics.csv, scale
    ("loss (nats)", ("train_loss", "val_loss", "test_loss"), "linear"),
    ("accuracy (%)", ("train_accuracy", "val_accuracy", "test_accuracy"), "linear"),
    ("learning rate at the end of the epoch", ("lr", "latent_lr"), "rate"),
    ("weights (%)", ("flipped", "saturated"), "rate"),
)
_DECADES = 4  # below the largest value; smaller values share the linear range down to 0


def draw_curves(folder: Path, history: list[dict[str, float]], title: str) -> None:
    """Save training_curves.png in `folder`, atomically. history: the rows of metrics.csv, at least one.

    Raises UserError where the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [(label, [key for key in keys if key in history[-1]], scale) for label, keys, scale in PANELS]
    panels = [panel for panel in panels if panel[1]]
    across, down = (2, 2) if len(panels) == 4 else (len(panels), 1)
    figure = Figure(figsize=(4.6 * across, 3.5 * down + 0.4), facecolor="white")
    margin = max(0.5, 0.02 * len(history))
    for axes, (label, keys, scale) in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=True):
        for key in keys:
            _draw_line(axes, history, key)
        axes.set_title(label, pad=24)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=len(keys), frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_xlim(1 - margin, len(history) + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        if scale == "rate":
            _scale_rate(axes, [row[key] for row in history for key in keys])
    figure.suptitle(title, y=1 - 0.15 / figure.get_figheight())
    # Fixed margins: the automatic ones take longer than everything else.
    figure.subplots_adjust(0.16 / across, 0.15 / down, 0.98, 1 - 0.27 / down, 0.2, 0.46)
    atomic_write(folder / CURVES, lambda file: figure.savefig(file, format="png", dpi=110))


def _draw_line(axes: Any, history: list[dict[str, float]], key: str) -> None:
    """One column of metrics.csv over the epochs, with a ring at the best epoch of the score that chose it."""
    epochs, values = [row["epoch"] for row in history], [row[key] for row in history]
    label = key.replace("_", " ")
    if key in ("val_accuracy", "test_accuracy"):
        best = max(values)
        label += f" (best {best:.2f})"
        axes.plot(epochs[values.index(best)], best, marker="o", fillstyle="none", color="black")
    axes.plot(epochs, values, label=label, marker="." if len(history) < 40 else "")


def _scale_rate(axes: Any, values: list[float]) -> None:
    """The y axis of quantities from 0 up: logarithmic where they span decades, with 0 at its lower end."""
    largest = max(values)
    smallest = min((value for value in values if value > 0), default=largest)
    if largest <= 10 * smallest:  # on less than a decade a logarithmic axis has hardly a label
        axes.set_ylim(-0.05 * (largest or 1), 1.1 * (largest or 1))
        return
    lowest = 10.0 ** math.floor(math.log10(max(smallest, largest * 10.0**-_DECADES)))
    axes.set_yscale("symlog", linthresh=lowest, linscale=0.5)
    axes.set_ylim(-0.2 * lowest, 1.5 * largest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
