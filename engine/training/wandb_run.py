"""Weights & Biases, which may wait for a network: in a process of its own, wandb_child.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, histogram

from engine.cli import as_typed, reason

PATIENCE, PATIENCE_AFTER_STOP = 18.0, 3.0  # seconds that the end of a training waits; start and steps never wait


class WandbRun:
    """Sends a training's numbers. Nothing here asks, raises, or waits before `finish`.

    mode: "online" (offline where that fails), "offline", "disabled", or "auto": what WANDB_MODE says, else online.
    epochs: of the whole run, before and after a stop. say: prints one line. init: arguments of wandb.init.
    """

    def __init__(self, mode: str, folder: Path, epochs: int, say: Callable[[str], None], **init: Any) -> None:
        self._folder, self._epochs, self._say, self._process = folder / "wandb", epochs, say, None
        self._feed = self._folder / "feed.jsonl"
        mode = (os.environ.get("WANDB_MODE") or "online") if mode == "auto" else mode
        if mode == "disabled":
            return
        init |= {"project": "binaryconnect-cifar10", "resume": "allow", "dir": str(folder)}
        init["settings"] = {"silent": True, "console": "off", "init_timeout": 7, "program": sys.argv[0]}
        child = [sys.executable, Path(__file__).with_name("wandb_child.py"), str(os.getpid()), as_typed(self._folder)]
        how = {"stderr": subprocess.DEVNULL, "env": os.environ | {"WANDB_MODE": mode}}
        try:
            self._folder.mkdir(exist_ok=True)
            self._feed.write_text(json.dumps(init) + "\n")
            with open(self._feed) as feed:  # in a session of its own: Ctrl-C is for the training only
                self._process = subprocess.Popen(child, stdin=feed, start_new_session=True, **how)
        except OSError as error:
            say(f"Weights & Biases: not used ({reason(error)})")

    def log(self, row: dict[str, float], weights: Callable[[], Tensor] | None = None) -> None:
        """Send one epoch's numbers, every tenth epoch and in the last one with the histogram of weights(), (n,)."""
        message: dict[str, Any] = {"row": row}
        if self._process and weights and (row["epoch"] % 10 == 0 or row["epoch"] == self._epochs):
            values = weights().float().cpu()
            edge = max(1.0, float(values.abs().max()))
            message["histogram"] = [part.tolist() for part in histogram(values, 64, range=(-edge, edge))]
        self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process:
            with suppress(OSError), open(self._feed, "a") as feed:  # a full disk, for example
                feed.write(json.dumps(message) + "\n")

    def finish(self, exit_code: int, summary: dict[str, float]) -> None:
        """Send the training's exit status and the summary; wait until all is uploaded, after a stop only briefly."""
        self._send({"exit_code": exit_code, "summary": summary})
        if self._process is None:
            return
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE if exit_code == 0 else PATIENCE_AFTER_STOP)
        finally:  # also after Ctrl-C
            self._process.kill()
            with suppress(OSError, AttributeError):  # wandb's own processes: all have ended; Windows
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.wait() != 0:
            upload = f"wandb sync {as_typed(self._folder)}/*run-*"
            self._say(f"Weights & Biases has not received everything; to upload it later: {upload}")
        self._feed.unlink(missing_ok=True)
