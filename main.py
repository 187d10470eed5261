"""Train a CIFAR-10 ResNet in full precision.

    python3 main.py                    150 epochs of ResNet-20
    python3 main.py --epochs 10        a short run
    python3 main.py --resume           go on after an interruption

Writes best_model.pth, final_model.pth, checkpoint_last.pth, metrics.csv and training_curves.png.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import cifar10
from engine import cli
from engine.evaluate import Scores, evaluate
from engine.training import distributed
from engine.training.loop import EVAL_BATCH, fit
from engine.training.run import Run, add_training_options, closing
from models import build


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a CIFAR-10 ResNet in full precision.")
    add_training_options(parser, lr=0.1, weight_decay=1e-3)
    return parser


def make_train_step(
    run: Run, network: Callable[[Tensor], Tensor], optimizer: Optimizer, label_smoothing: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The step: (images, labels) -> (loss, logits), with the weights changed. network: as the run wraps it."""

    def train_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        with run.autocast():
            logits = network(images)  # (N, 3, 32, 32) -> (N, 10)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        run.backward(loss, len(labels))
        run.step(optimizer)
        return loss, logits

    return train_step


def train(run: Run) -> None:
    args = run.args
    data = cifar10.load(
        args.data_dir, val_size=args.val_size, limit_train=args.limit_train, limit_test=args.limit_test
    )
    rank, world_size = distributed.rank(), distributed.world_size()
    loader = cifar10.TrainLoader(
        data.train, args.batch_size, seed=args.seed, device=run.device, rank=rank, world_size=world_size
    )

    torch.manual_seed(args.seed)
    model = run.place(build(args.arch))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
    )
    network = run.wrap(model, len(data.train))

    train_step = make_train_step(run, network, optimizer, args.label_smoothing)

    def score(split_name: str) -> Scores:
        split = getattr(data, split_name)
        batches = cifar10.eval_batches(split, EVAL_BATCH, run.device, rank=rank, world_size=world_size)
        return evaluate(model, batches, len(split), progress="scoring")

    run.describe(model, len(data.train), data.scored_on)
    fit(run, model, [optimizer], loader, train_step, score, chosen_on="val" if data.val else "test")


def main() -> None:
    with closing(Run.start(make_parser(), kind="float")) as run:
        train(run)


if __name__ == "__main__":
    cli.run(main)
