"""Where a run's numbers go: metrics.csv, training_curves.png and, where it is available, Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cli import as_typed, reason
from engine.files import atomic_write
from engine.training.curves import CURVES, draw_curves
from models import BC

__all__ = ["CURVES", "END_PATIENCE", "METRICS", "FlipRateMeter", "WandbRun", "draw_curves", "write_metrics"]

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


START_PATIENCE, END_PATIENCE = 9.0, 9.5  # seconds: the end of a training waits for both, its start for neither


class WandbRun:
    """Weights & Biases in a process of its own, wandb_child.py: nothing here asks, raises, or waits before `finish`.

    mode: "online" (offline where that fails), "offline", "disabled", or "auto": what WANDB_MODE says, else online.
    epochs: of the whole run, before and after a stop. say: prints one line.
    """

    def __init__(
        self, mode: str, folder: Path, *, name: str, config: dict, run_id: str, epochs: int, say: Callable
    ) -> None:
        self._folder, self._epochs, self._say = folder / "wandb", epochs, say
        self._feed, self._started = self._folder / "feed.jsonl", time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        mode = (os.environ.get("WANDB_MODE") or "online") if mode == "auto" else mode
        if mode == "disabled":
            return
        settings = {"silent": True, "console": "off", "init_timeout": START_PATIENCE - 2, "program": sys.argv[0]}
        init = {"project": "binaryconnect-cifar10", "name": name, "id": run_id, "resume": "allow", "config": config}
        child = [Path(__file__).with_name("wandb_child.py"), str(os.getpid()), as_typed(self._folder)]
        quiet = {"stderr": subprocess.DEVNULL, "env": os.environ | {"WANDB_MODE": mode}}
        try:
            self._folder.mkdir(exist_ok=True)
            self._feed.write_text(json.dumps(init | {"dir": str(folder), "settings": settings}) + "\n")
            with open(self._feed) as feed:  # in a session of its own: Ctrl-C is for the training only
                self._process = subprocess.Popen(
                    [sys.executable, *child], stdin=feed, start_new_session=True, **quiet
                )
        except OSError as error:
            say(f"Weights & Biases: not used ({reason(error)})")

    def log(self, row: dict[str, float], weights: Callable[[], Tensor] | None = None) -> None:
        """Send one epoch's numbers, every tenth epoch and in the last one with the histogram of weights(), (n,)."""
        message: dict[str, Any] = {"row": row}
        if self._process and weights and (row["epoch"] % 10 == 0 or row["epoch"] == self._epochs):
            values = weights().float().cpu()
            edge = max(1.0, float(values.abs().max()))
            message["histogram"] = [part.tolist() for part in torch.histogram(values, 64, range=(-edge, edge))]
        self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process:
            with contextlib.suppress(OSError), open(self._feed, "a") as feed:  # a full disk, for example
                feed.write(json.dumps(message) + "\n")

    def finish(self, status: int, patience: float = END_PATIENCE, summary: dict[str, float] | None = None) -> None:
        """Send the training's exit status and the summary; wait at most `patience` seconds until all is uploaded."""
        self._send({"exit_code": status, "summary": summary or {}})
        if self._process is None:
            return
        starting = max(0.0, self._started + START_PATIENCE - time.monotonic())
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(starting + patience)
        finally:  # also after Ctrl-C
            self._process.kill()
            with contextlib.suppress(OSError, AttributeError):  # all have ended; Windows
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.wait() != 0:
            upload = f"wandb sync {as_typed(self._folder)}/*run-*"
            self._say(f"Weights & Biases has not received everything; to upload it later: {upload}")
        self._feed.unlink(missing_ok=True)
