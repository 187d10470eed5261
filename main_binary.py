"""Train a CIFAR-10 ResNet whose weights are one bit each, with BinaryConnect.

    python3 main_binary.py                             150 epochs of ResNet-20
    python3 main_binary.py --epochs 10                 a short run
    python3 main_binary.py --teacher best_model.pth    learn from a full-precision network too
    python3 main_binary.py --resume                    go on after an interruption

Courbariaux, Bengio and David, "BinaryConnect", 2015 (arXiv:1511.00363), algorithm 1: `train_step` below.
Writes best_model.pth (latent weights in [-1, 1], chosen on the accuracy of their signs), final_model.pth,
checkpoint_last.pth, metrics.csv and training_curves.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

import cifar10
from engine import checkpoints, cli
from engine.cli import UserError
from engine.training import distributed
from engine.training.distillation import add_teacher_options, load_teacher, make_criterion
from engine.training.loop import Trainer
from engine.training.muon import Muon
from engine.training.run import Run, add_training_options, closing_run
from engine.training.tracking import FlipRateMeter
from models import BC, build
from models.quantizers import deterministic_sign, stochastic_sign

# Optimizers of the latent weights: class, peak learning rate, further arguments (docs/experiments.md, 1, 2 and 19).
# --weight-decay is not for them: an optimizer with a decay of its own, such as AdamW, needs "weight_decay": 0.
LATENT_OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float, dict[str, Any]]] = {
    "muon": (Muon, 0.01, {}),
    "adam": (Adam, 0.01, {"fused": True}),
    "sgd": (SGD, 10.0, {"momentum": 0.9, "nesterov": True, "fused": True}),
}


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a CIFAR-10 ResNet whose weights are one bit each, with BinaryConnect.")
    add_training_options(parser, lr=0.1, weight_decay=1e-4)
    group = parser.add_argument_group("BinaryConnect (--lr and --weight-decay are those of all other parameters)")
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate, _) in LATENT_OPTIMIZERS.items())
    group.add_argument(
        "--optimizer", choices=LATENT_OPTIMIZERS, default="muon", help="optimizer of the latent weights"
    )
    group.add_argument(
        "--latent-lr",
        type=cli.number(0),
        help=f"peak learning rate of the latent weights (default: {rates})",
    )
    group.add_argument(
        "--logit-scale",
        type=cli.number(0, above=True, maximum=checkpoints.LARGEST_LOGIT_SCALE),
        default=0.125,
        help="constant on the network's whole output, in the loss only: it changes no prediction",
    )
    group.add_argument(
        "--stochastic", action="store_true", help="draw the signs at random, as the paper's section 2.3"
    )
    group.add_argument("--init", type=Path, metavar="CKPT", help="start from these weights, clipped to [-1, 1]")
    add_teacher_options(parser)
    return parser


def load_init(run: Run) -> checkpoints.Checkpoint | None:
    """The checkpoint of --init; None for a resumed run, which has its weights already.

    Raises UserError where it is of another architecture or packed.
    """
    path, arch = run.args.init, run.args.arch
    if path is None or run.resumed:
        return None
    loaded = checkpoints.load(path)
    if loaded.arch != arch:
        raise UserError(f"--init {path}: is a {loaded.arch}, but --arch is {arch}")
    if loaded.kind == checkpoints.BINARY_1BIT:
        raise UserError(f"--init {path}: a 1-bit file has no latent weights; use the checkpoint it was made from")
    return loaded


def make_optimizers(args: argparse.Namespace, bc: BC) -> list[Optimizer]:
    """One optimizer for the latent weights, one for biases and BatchNorm.

    Weight decay would drag latent weights towards zero, where noise flips their signs: they have none.
    """
    latent = bc.targets()
    binarized = {id(weight) for weight in latent}
    others = [p for p in bc.model.parameters() if id(p) not in binarized]
    group = {"params": latent, "lr": args.latent_lr, "name": "latent_lr"}  # the name of its column in metrics.csv
    make, _, options = LATENT_OPTIMIZERS[args.optimizer]
    sgd = SGD(others, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
    return [make([group], **options), sgd]


def make_train_step(
    run: Run,
    bc: BC,
    network: Callable[[Tensor], Tensor],
    optimizers: list[Optimizer],
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The BinaryConnect step: (images, labels) -> (loss, logits), with the latent weights changed.

    network: bc, compiled and parallelized as the run wants it.
    criterion: (scaled logits, images, labels) -> loss.
    """

    def train_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        bc.binarization()  # 1. binarize: the weights become sign(w), the latent weights w are saved
        with run.autocast():
            logits = network(images)  # 2. forward with binary weights: (N, 3, 32, 32) -> (N, 10)
        loss = criterion(run.args.logit_scale * logits.float(), images, labels)
        loss.backward()  # 3. backward, with binary weights as well
        bc.restore()  # 4. the latent weights are back; the gradient is still that of the binary ones
        for optimizer in optimizers:
            optimizer.step()  # 5. optimizer step on the latent weights: small changes add up to a flip
        bc.clip()  # 6. the latent weights stay in [-1, 1]
        return loss, logits

    return train_step


def train(run: Run) -> None:
    args = run.args
    if args.latent_lr is None:
        args.latent_lr = LATENT_OPTIMIZERS[args.optimizer][1]
    init, teacher = load_init(run), load_teacher(run)
    rank, world_size = distributed.rank(), distributed.world_size()
    data, loader = cifar10.load_for_training(args, run.device, rank=rank, world_size=world_size)
    torch.manual_seed(args.seed)
    model = build(args.arch)
    if init:
        model.load_state_dict(init.state_dict)
    bc = run.to_device(BC(model, quantizer=stochastic_sign if args.stochastic else deterministic_sign))
    bc.clip()
    optimizers = make_optimizers(args, bc)
    network = run.compile_and_parallelize(bc)
    criterion = make_criterion(run, teacher)

    train_step = make_train_step(run, bc, network, optimizers, criterion)
    trainer = Trainer(
        run,
        model,
        optimizers,
        loader,
        data,
        train_step,
        scoring=bc.binarized,  # the binarized network is the result: it is what is scored and chosen
        logit_scale=args.logit_scale,
        meter=FlipRateMeter(bc),
        extra={
            "quantizer": bc.quantizer_name,
            "logit_scale": args.logit_scale,
            "teacher_sha256": teacher.sha256 if teacher else None,
        },
    )
    trainer.fit()


def main() -> None:
    with closing_run(Run.start(make_parser(), kind="latent")) as run:
        train(run)


if __name__ == "__main__":
    cli.run(main)
