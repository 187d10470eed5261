"""The numbers of a run: metrics.csv, and how many weights flip in an epoch of BinaryConnect."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from engine.files import atomic_write
from models import BC

METRICS = "metrics.csv"


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """Write metrics.csv, one line an epoch, whole and atomically: a resumed run neither repeats nor lacks a line."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in history for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
    atomic_write(folder / METRICS, text.getvalue().encode())


class FlipRateMeter:
    """Over one epoch of BinaryConnect, in percent: `flipped`, the share of weights whose quantized value (their sign,
    unless another quantizer is used) changed over the epoch; `saturated`, the share of latent weights at -1 or +1."""

    def __init__(self, bc: BC) -> None:
        self._bc = bc

    def begin(self) -> None:
        """To be called before the epoch's first step."""
        self.before = self._quantized()

    def end(self) -> dict[str, float]:
        now = self._quantized()
        saturated = sum((w.abs() >= 1).sum() for w in self._bc.latent_weights())
        flipped = (now != self.before).sum()
        return {"flipped": 100 * float(flipped) / len(now), "saturated": 100 * float(saturated) / len(now)}

    def _quantized(self) -> Tensor:
        """The weights as they are scored, of all layers, (n,)."""
        return torch.cat([w.reshape(-1) for w in self._bc.quantized_weights()])
