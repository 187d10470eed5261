"""Where a run's numbers go: metrics.csv, training_curves.png and, where it can be had, Weights & Biases."""

from __future__ import annotations

import csv
import io
import netrc
import os
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import atomic_write
from models.binaryconnect import BC, binary_sign

METRICS = "metrics.csv"
CURVES = "training_curves.png"
PATIENCE = 10.0  # seconds that Weights & Biases may cost at the start, and again at the end


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """Write metrics.csv, a line an epoch, whole and atomically: a resumed run neither repeats nor lacks a line."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in history for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
    atomic_write(folder / METRICS, text.getvalue().encode())


def draw_curves(folder: Path, history: list[dict[str, float]], title: str) -> None:
    """Save training_curves.png: loss, accuracy, learning rate; for BinaryConnect flipped and saturated weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("loss (nats)", ["train_loss", "val_loss", "test_loss"], "linear"),
        ("accuracy (%)", ["train_accuracy", "val_accuracy", "test_accuracy"], "linear"),
        ("learning rate", ["lr", "latent_lr"], "log"),
        ("weights (%)", ["flipped", "saturated"], "log"),
    ]
    panels = [(label, [k for k in keys if any(k in row for row in history)], scale) for label, keys, scale in panels]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, keys, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if key in row]
            if scale == "log":
                points = [(x, y) for x, y in points if y > 0]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                label=key.replace("_", " "),
                marker="." if len(history) < 40 else "",
            )
        axes.set(xlabel="epoch", title=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    atomic_write(folder / CURVES, image.getvalue())


class SignWatch:
    """Over an epoch of BinaryConnect: `flipped`, the share of weights whose sign at its end is another than at its
    beginning, and `saturated`, the share of latent weights at -1 or +1 at its end; both in per cent."""

    def __init__(self, bc: BC) -> None:
        self._bc = bc
        self._before = self._signs()[:0]

    def _signs(self) -> Tensor:
        return torch.cat([binary_sign(w).reshape(-1) > 0 for w in self._bc.latent_weights()])

    def begin(self) -> None:
        self._before = self._signs()

    def end(self) -> dict[str, float]:
        now = self._signs()
        saturated = sum((w.abs() >= 1).sum() for w in self._bc.latent_weights())
        flipped = (now != self._before).sum()
        self._before = now[:0]
        return {"flipped": 100 * float(flipped) / len(now), "saturated": 100 * float(saturated) / len(now)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"signs": self._before.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._before = state["signs"].to(self._before.device)


class WandbRun:
    """Weights & Biases, which may be slow, offline or broken without the run taking harm.

    mode: "auto" (online where an API key is configured, else offline), "online", "offline" or "disabled".
    Never asks a question and never raises; `notice` is a line on what became of it, or "".
    """

    def __init__(self, mode: str, folder: Path, *, name: str, config: dict[str, Any], run_id: str | None) -> None:
        self._run: Any = None
        self.notice = ""
        self.id = run_id
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
        if mode == "disabled":
            return

        def begin(mode: str) -> Callable[[], Any]:
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE - 2)
            return lambda: wandb.init(
                project="binaryconnect-cifar10",
                name=name,
                mode=mode,
                dir=str(folder),
                config=config,
                id=run_id,
                resume="allow" if run_id else None,
                settings=settings,
            )

        try:
            start = begin(mode)
        except Exception as error:
            self.notice = f"Weights & Biases is not used: {type(error).__name__}."
            return
        self._run, problem = _within(PATIENCE, start)
        if self._run is None:
            self.notice = f"Weights & Biases could not be started ({problem}); the run goes on without it."
        else:
            self.id = self._run.id

    def log(self, row: dict[str, float]) -> None:
        """Queue one epoch's numbers; returns at once."""
        if self._run is None:
            return
        try:
            self._run.log(row, step=int(row["epoch"]))
        except Exception as error:
            self.notice = f"Weights & Biases stopped: {type(error).__name__}."
            self._run = None

    def finish(self, exit_code: int = 0) -> None:
        if self._run is not None:
            _within(PATIENCE, lambda: self._run.finish(exit_code=exit_code))
            self._run = None


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _within(seconds: float, call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of `call`, or (None, why) where it fails or takes longer; it is then left to end by itself."""
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if "result" in outcome:
        return outcome["result"], ""
    return None, type(outcome["error"]).__name__ if "error" in outcome else f"no answer within {seconds:.0f} s"
