"""Score a network on a set of images: every image, exactly once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from engine.cli import UserError
from engine.normalization import Normalization
from engine.onnx_export import OnnxNetwork
from engine.training import distributed
from models.resnet_s import NUM_CLASSES

if TYPE_CHECKING:
    from cifar10 import Data


@dataclass(frozen=True, eq=False)
class Scores:
    """What a network scored.

    loss: mean cross-entropy in nats. confusion: int64 (true class, predicted class). logits: float32 (images, 10) on
    the CPU, in the order of the batches; with several processes, of the images of this one.
    """

    loss: float
    confusion: Tensor
    logits: Tensor
    seconds: float

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Percentage of the images classified correctly."""
        return 100 * self.correct / self.images

    def accuracy_line(self) -> str:
        return f"Test Accuracy: {self.accuracy:.2f}%"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    images: int,
    *,
    logit_scale: float = 1.0,
    progress: str = "",
    path: Path | None = None,
) -> Scores:
    """Score `model`, in evaluation mode and float32, on (images, labels) batches that hold `images` images in all.

    With several processes each passes its own batches, `images` counts those of all of them, and all of them take
    the writer's BatchNorm statistics: those are saved with the network.
    logit_scale: multiplies the logits in the loss; predictions do not depend on it.
    progress: the label of a progress bar, shown on a terminal only.
    path: the checkpoint that the network is from.
    Raises RuntimeError where the batches did not hold exactly that many images; for NaN logits UserError naming
    `path`, ValueError without one.
    """
    was_training = model.training
    model.eval()
    distributed.copy_buffers_from_writer(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # an ONNX network has none
    confusion = torch.zeros(NUM_CLASSES**2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    logits: list[Tensor] = []
    started = time.perf_counter()
    shown = progress and sys.stderr.isatty() and distributed.is_writer()
    try:
        with tqdm(total=images, desc=progress, unit=" images", leave=False, disable=not shown) as bar:
            for inputs, labels in batches:
                logits.append(model(inputs).float())
                loss_sum += F.cross_entropy(logits[-1] * logit_scale, labels, reduction="sum")
                cells = labels * NUM_CLASSES + logits[-1].argmax(1)
                confusion += torch.bincount(cells, minlength=NUM_CLASSES**2)
                bar.update(min(len(labels) * distributed.world_size(), images - bar.n))  # the others go as fast
    finally:
        model.train(was_training)
    confusion = distributed.sum_over_ranks(confusion).reshape(NUM_CLASSES, NUM_CLASSES).cpu()
    loss = float(distributed.sum_over_ranks(loss_sum)) / max(images, 1)
    if int(confusion.sum()) != images:
        raise RuntimeError(f"{int(confusion.sum())} of {images} images were scored")
    if loss != loss:
        problem = "the network's outputs are NaN"
        raise UserError(f"{path}: {problem}; the checkpoint is unusable") if path else ValueError(problem)
    return Scores(loss, confusion, torch.cat(logits).cpu(), time.perf_counter() - started)


def score_on_test(
    model: nn.Module, data: Data, args: argparse.Namespace, used: Normalization, *, logit_scale: float = 1.0
) -> Scores:
    """Scores of the network of args.checkpoint on the test images; moves it to args.device.

    An OnnxNetwork takes the pixels themselves. used: the normalization for any other, see `normalization.choose`.
    """
    if isinstance(model, OnnxNetwork):
        batches = zip(data.test.images.split(args.batch_size), data.test.labels.split(args.batch_size), strict=True)
    else:
        model.to(args.device, memory_format=torch.channels_last)
        batches = data.batches("test", args.device, batch_size=args.batch_size, **used)
    return evaluate(model, batches, len(data.test), logit_scale=logit_scale, progress="test", path=args.checkpoint)
