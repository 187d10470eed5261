"""Where a run's numbers go: metrics.csv, training_curves.png and, where it can be had, Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import netrc
import os
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import torch
from torch import Tensor

from engine.cli import as_typed, reason
from engine.files import atomic_write
from models.binaryconnect import BC, binary_sign

METRICS = "metrics.csv"
CURVES = "training_curves.png"
START_PATIENCE, END_PATIENCE = 9.0, 9.5  # seconds that Weights & Biases may cost at the start and at the end
WANDB_MODES = ("online", "offline", "disabled")


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """Write metrics.csv, a line an epoch, whole and atomically: a resumed run neither repeats nor lacks a line."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in history for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
    atomic_write(folder / METRICS, text.getvalue().encode())


PANELS = (
    ("loss (nats)", ("train_loss", "val_loss", "test_loss"), "linear"),
    ("accuracy (%)", ("train_accuracy", "val_accuracy", "test_accuracy"), "linear"),
    ("learning rate at the end of the epoch", ("lr", "latent_lr"), "log"),
    ("weights (%)", ("flipped", "saturated"), "log"),
)


def draw_curves(folder: Path, history: list[dict[str, float]], title: str) -> None:
    """Save training_curves.png: loss, accuracy, learning rate; for BinaryConnect flipped and saturated weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {key for row in history for key in row}
    panels = [(label, [key for key in keys if key in known], scale) for label, keys, scale in PANELS]
    panels = [panel for panel in panels if panel[1]]
    across, down = (2, 2) if len(panels) == 4 else (len(panels), 1)
    figure = Figure(figsize=(4.6 * across, 3.4 * down + 0.4))
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flat
    for axes, (label, keys, scale) in zip(grid, panels, strict=True):
        for key in keys:
            _draw_line(axes, history, key, scale)
        axes.set_title(label)
        _label_axes(axes, history, scale)
    figure.suptitle(title)
    # Fixed margins: the automatic ones take longer than all the rest.
    figure.subplots_adjust(0.16 / across, 0.15 / down, 0.98, 1 - 0.2 / down, 0.2, 0.36)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    atomic_write(folder / CURVES, image.getvalue())


def _draw_line(axes: Any, history: list[dict[str, float]], key: str, scale: str) -> None:
    """One column of metrics.csv over the epochs; on a logarithmic axis without what is not positive."""
    points = [(row["epoch"], row[key]) for row in history if key in row and (scale != "log" or row[key] > 0)]
    label = key.replace("_", " ")
    if key in ("val_accuracy", "test_accuracy"):
        best = max(points, key=lambda point: point[1])
        label += f" (best {best[1]:.2f})"
        axes.plot(*best, marker="o", fillstyle="none", color="black")
    axes.plot([x for x, _ in points], [y for _, y in points], label=label, marker="." if len(history) < 40 else "")


def _label_axes(axes: Any, history: list[dict[str, float]], scale: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_xlim(0, history[-1]["epoch"] + 1)  # the same in all panels
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A run of one epoch ends it at a rate of 0: no point to show, and matplotlib has no such logarithmic axis.
    if scale == "log" and any(len(line.get_ydata()) for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend()


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
    """Weights & Biases, which may be slow, offline or broken without the run taking harm: see wandb_process.py.

    mode: "auto" (what WANDB_MODE says, else online where an API key is configured, else offline), "online",
    "offline" or "disabled". Online has START_PATIENCE seconds to begin; after that it is offline.
    say: is given a line now and then on what becomes of it. Nothing here asks a question, raises, or waits in `log`.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        *,
        name: str,
        config: dict[str, Any],
        run_id: str,
        say: Callable[[str], None],
    ) -> None:
        self._say, self._folder = say, folder
        self._process: subprocess.Popen[str] | None = None
        self._online = False
        self._about = {
            "project": "binaryconnect-cifar10",
            "name": name,
            "dir": str(folder),
            "config": config,
            "id": run_id,
            "resume": "allow",
            "program": sys.argv[0],
        }
        if mode == "auto":
            asked = os.environ.get("WANDB_MODE", "")
            mode = asked if asked in WANDB_MODES else "online" if _has_api_key() else "offline"
        if mode == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            say("Weights & Biases is not installed; the run goes on without it.")
            return
        if mode == "online":
            self._begin(mode)
            if self._began(START_PATIENCE):
                return
        self._begin("offline")
        say(f"Weights & Biases: offline; to upload it later: wandb sync {as_typed(folder / 'wandb')}/offline-run-*")

    def _begin(self, mode: str) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("wandb_process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the training, which then ends this in order
            )
        except OSError as error:
            self._say(f"Weights & Biases could not be started: {reason(error)}; the run goes on without it.")
            return
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        for target, pipe, queue in (
            (_feed, self._process.stdin, self._lines),
            (_receive, self._process.stdout, self._answers),
        ):
            threading.Thread(target=target, args=(pipe, queue), daemon=True).start()
        about = self._about | {"mode": mode, "patience": START_PATIENCE - 2 if mode == "online" else END_PATIENCE}
        self._lines.put(json.dumps(about))

    def _began(self, seconds: float) -> bool:
        """Whether it is online now, or must be done without; otherwise the process is gone."""
        if self._process is None:
            return True
        try:
            answer = self._answers.get(timeout=seconds)
        except Empty:
            answer = {"error": f"no answer within {seconds:.0f} s", "installed": True}
        if "url" in answer:
            self._say(f"Weights & Biases: {answer['url']}")
            self._online = True
            return True
        self._end()
        self._say(f"Weights & Biases could not be started online ({answer['error']}).")
        return not answer["installed"]

    def log(self, row: dict[str, float]) -> None:
        """Queue one epoch's numbers; returns at once."""
        if self._process:
            self._lines.put(json.dumps({"row": row}))

    def finish(self, exit_code: int, seconds: float) -> None:
        """Hand over what is left, for at most `seconds`."""
        if self._process is None:
            return
        self._lines.put(json.dumps({"exit_code": exit_code}))
        self._lines.put(None)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            where = f"{as_typed(self._folder / 'wandb')}/*run-*"
            self._say(f"Weights & Biases has not taken everything; to upload it later: wandb sync {where}")
            self._end()
            return
        self._end()
        if not self._online:
            answer = self._answers.get()  # the first: how it began
            if "error" in answer:
                self._say(f"Weights & Biases was not used ({answer['error']}).")

    def _end(self) -> None:
        """End the process and what it has started. It has already, as a rule."""
        process, self._process = self._process, None
        if process is None:
            return
        if os.name == "posix":
            with contextlib.suppress(OSError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _feed(pipe: IO[str], lines: SimpleQueue[str | None]) -> None:
    """Write lines to a process until None comes or the process has gone."""
    with contextlib.suppress(OSError), pipe:
        for line in iter(lines.get, None):
            pipe.write(line + "\n")
            pipe.flush()


def _receive(pipe: IO[str], answers: SimpleQueue[dict[str, Any]]) -> None:
    """Read what a process answers, until it ends."""
    with contextlib.suppress(OSError, ValueError), pipe:
        for line in pipe:
            answers.put(json.loads(line))
    answers.put({"error": "it ended", "installed": True})


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    home = Path.home()
    for path in (os.environ.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False
