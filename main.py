"""Train a CIFAR-10 ResNet in full precision.

    python3 main.py                    150 epochs of ResNet-20
    python3 main.py --epochs 10        a short run
    python3 main.py --resume           go on after an interruption

Writes best_model.pth, final_model.pth, checkpoint_last.pth, metrics.csv and training_curves.png.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

import cifar10
from engine import cli
from engine.training import distributed
from engine.training.distillation import add_teacher_options, load_teacher, make_criterion
from engine.training.loop import Trainer
from engine.training.run import Run, add_training_options, closing_run
from models import build


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a CIFAR-10 ResNet in full precision.")
    add_training_options(parser, lr=0.1, weight_decay=1e-3)
    add_teacher_options(parser)
    return parser


def make_train_step(
    run: Run,
    network: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The step: (images, labels) -> (loss, logits), with the weights changed.

    network: compiled and parallelized as the run wants it. criterion: (logits, images, labels) -> loss.
    """

    def train_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        with run.autocast():
            logits = network(images)  # (N, 3, 32, 32) -> (N, 10)
        loss = criterion(logits.float(), images, labels)
        loss.backward()
        optimizer.step()
        return loss, logits

    return train_step


def train(run: Run) -> None:
    args = run.args
    teacher = load_teacher(run)
    rank, world_size = distributed.rank(), distributed.world_size()
    data, loader = cifar10.load_for_training(args, run.device, rank=rank, world_size=world_size)
    torch.manual_seed(args.seed)
    model = run.to_device(build(args.arch))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
    )
    network = run.compile_and_parallelize(model)
    criterion = make_criterion(run, teacher)

    train_step = make_train_step(run, network, optimizer, criterion)
    extra = {"teacher_sha256": teacher.sha256 if teacher else None}
    Trainer(run, model, [optimizer], loader, data, train_step, extra=extra).fit()


def main() -> None:
    with closing_run(Run.start(make_parser(), kind="float")) as run:
        train(run)


if __name__ == "__main__":
    cli.run(main)
