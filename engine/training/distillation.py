"""Learning from a teacher: a trained full-precision network whose softened outputs are a second target.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import checkpoints, cli
from engine.cli import UserError
from engine.training.run import Run
from models.bitpack import fold_normalization


def add_teacher_options(parser: cli.ArgumentParser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", type=Path, metavar="CKPT", help="learn from this full-precision checkpoint too")
    divides, share = (
        "divides the logits of both networks before they are compared",
        "share of the teacher in the loss",
    )
    group.add_argument("--temperature", type=cli.number(0, above=True, maximum=1000), default=4.0, help=divides)
    group.add_argument("--teacher-weight", type=cli.number(0, maximum=1), default=0.9, help=share)


def load_teacher(run: Run) -> checkpoints.Checkpoint | None:
    """The checkpoint of --teacher, of any architecture, or None.

    Raises UserError unless its weights are full-precision ones, and unless a resumed run is given the teacher that
    it began with, under whatever name.
    """
    path = run.args.teacher
    if path is None:
        return None
    loaded = checkpoints.load(path)
    if run.resumed and loaded.sha256 != run.resumed.raw.get("teacher_sha256"):
        raise UserError(f"--teacher {path}: not the file that {run.resumed.path} was run with; name the one that is")
    if loaded.kind not in ("float", "unknown"):
        raise UserError(f"--teacher {path}: its weights are {loaded.kind}; a full-precision checkpoint is needed")
    return loaded


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) of the softened outputs: logits (N, 10) each -> mean in nats."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def make_criterion(
    run: Run, teacher_checkpoint: checkpoints.Checkpoint | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of a run: (logits float32 (N, 10), images, labels) -> mean over the batch, in nats.

    Cross-entropy with label smoothing; with a teacher a weighted mean of that and `distillation_loss`.
    """
    args = run.args

    def cross_entropy(logits: Tensor, _images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)

    if teacher_checkpoint is None:
        return cross_entropy
    teacher = run.to_device(fold_normalization(teacher_checkpoint.model()))  # folded: less work

    def distilled(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), run.autocast():
            teacher_logits = teacher(images)
        learned = distillation_loss(logits, teacher_logits.float(), args.temperature)
        return args.teacher_weight * learned + (1 - args.teacher_weight) * cross_entropy(logits, images, labels)

    return distilled
