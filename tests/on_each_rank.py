"""Run a training script as one of torchrun's processes, and save what this process saw (for test_distributed.py).

    torchrun --nproc_per_node=2 tests/on_each_rank.py FOLDER SCRIPT OPTIONS ...

Writes FOLDER/rank<N>.pth: `signs`, a digest of the binary weights of every BinaryConnect step; `weights`, the
parameters after the last step. Fails where a thread of the process group has outlived the run.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import checkpoints  # noqa: E402 - needs the path
from engine.training import distributed  # noqa: E402 - needs the path
from engine.training.loop import Trainer  # noqa: E402
from models import BC  # noqa: E402

signs: list[str] = []
binarize, finish = BC.binarization, Trainer.finish


def binarize_and_note(self: BC) -> None:  # a step of training; scoring does not call binarization()
    binarize(self)
    signs.append(checkpoints.digest([weight.detach() for weight in self.targets()]))


def note_and_finish(self: Trainer) -> None:
    weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
    torch.save({"signs": signs, "weights": weights}, folder / f"rank{distributed.rank()}.pth")
    finish(self)


folder = Path(sys.argv[1])
script = ROOT / sys.argv[2]
sys.argv = [str(script), *sys.argv[3:]]
BC.binarization, Trainer.finish = binarize_and_note, note_and_finish
runpy.run_path(str(script), run_name="__main__")

# Such a thread may free a tensor while the interpreter shuts down, and then the process aborts: rarely, under load.
for task in Path("/proc/self/task").glob("*/comm"):  # Linux
    assert "gloo" not in task.read_text(encoding="utf-8"), "a thread of the process group has outlived the run"
