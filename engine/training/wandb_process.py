"""The process that talks to Weights & Biases for a training run: started by `tracking.WandbRun`, never by hand.

wandb may wait for a network for as long as it likes, here and at the exit of the process that has imported it. So it
has a process of its own, which can be left waiting, or ended, without the training taking harm.

stdin: lines of JSON: first what `wandb.init` needs, then rows {"row": {...}}, at last {"exit_code": n}.
stdout: one line of JSON, {"url": ...} or {"error": ..., "installed": ...}. wandb's own output goes nowhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def end_all() -> None:
    """End this process and what wandb has started from it (the process group is our own on POSIX)."""
    if os.name == "posix":
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    here = Path(__file__).resolve().parent  # holds modules with names like `run`, which are not for wandb to find
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    about = json.loads(sys.stdin.readline())
    patience = about.pop("patience")
    try:
        import wandb
    except Exception as error:
        return answer(error=type(error).__name__, installed=False)
    try:
        settings = wandb.Settings(silent=True, console="off", init_timeout=patience, program=about.pop("program"))
        run = wandb.init(**about, settings=settings)
    except Exception as error:
        answer(error=type(error).__name__, installed=True)
        end_all()
    answer(url=run.url)
    exit_code = 1  # that of a training process that ended without a word
    for line in sys.stdin:
        message = json.loads(line)
        if "row" in message:
            run.log(message["row"], step=int(message["row"]["epoch"]))
        exit_code = message.get("exit_code", exit_code)
    watchdog = threading.Timer(patience, end_all)
    watchdog.daemon = True
    watchdog.start()
    run.finish(exit_code=exit_code)
    end_all()


if __name__ == "__main__":
    main()
