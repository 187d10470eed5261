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

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import cifar10
from engine import checkpoints, cli
from engine.cli import UserError
from engine.evaluate import Scores, evaluate
from engine.training import distributed
from engine.training.loop import EVAL_BATCH, fit
from engine.training.muon import Muon
from engine.training.run import Run, add_training_options, closing
from engine.training.tracking import SignWatch
from models import BC, build
from models.bitpack import fold_normalization
from models.quantizers import deterministic_sign, stochastic_sign


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a CIFAR-10 ResNet whose weights are one bit each, with BinaryConnect.")
    add_training_options(parser, lr=0.1, weight_decay=1e-4)
    group = parser.add_argument_group("BinaryConnect (--lr and --weight-decay are those of all other parameters)")
    group.add_argument(
        "--optimizer", choices=("muon", "adam", "sgd"), default="muon", help="optimizer of the latent weights"
    )
    group.add_argument(
        "--latent-lr", type=cli.number(0), default=0.01, help="peak learning rate of the latent weights"
    )
    group.add_argument(
        "--latent-decay-power",
        type=cli.number(0, above=True, maximum=100),
        metavar="P",
        help="let the latent learning rate fall as (1 - t)^P, t from 0 to 1 after the warm-up (default: a cosine)",
    )
    group.add_argument(
        "--latent-weight-decay",
        type=cli.number(0),
        default=0.0,
        help="L2 penalty on the latent weights, for adam and sgd",
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
    group.add_argument("--teacher", type=Path, metavar="CKPT", help="distill from this full-precision checkpoint")
    group.add_argument(
        "--temperature",
        type=cli.number(0, above=True, maximum=1000),
        default=4.0,
        help="softens both outputs in the distillation",
    )
    group.add_argument(
        "--teacher-weight",
        type=cli.number(0, maximum=1),
        default=0.9,
        help="share of the teacher in the loss",
    )
    return parser


def load_init(path: Path | None, arch: str) -> checkpoints.Checkpoint | None:
    """The checkpoint of --init. Raises UserError where it is of another architecture or packed."""
    if path is None:
        return None
    loaded = checkpoints.load(path)
    if loaded.arch != arch:
        raise UserError(f"--init {path}: is a {loaded.arch}, but --arch is {arch}")
    if loaded.kind == checkpoints.BINARY_1BIT:
        raise UserError(f"--init {path}: a 1-bit file has no latent weights; use the checkpoint it was made from")
    return loaded


def load_teacher(path: Path | None, resumed: checkpoints.Checkpoint | None) -> checkpoints.Checkpoint | None:
    """The checkpoint of --teacher, of any architecture. Raises UserError unless it is one in full precision, and,
    for a run that is resumed, the one it began with, whatever its name and place are now."""
    if path is None:
        return None
    loaded = checkpoints.load(path)
    if resumed and loaded.sha256 != resumed.raw.get("teacher_sha256"):
        raise UserError(f"--teacher {path}: not the file that {resumed.path} was run with; name the one that is")
    if loaded.kind not in ("float", "unknown"):
        raise UserError(f"--teacher {path}: its weights are {loaded.kind}; a full-precision checkpoint is needed")
    return loaded


def make_optimizers(args: object, bc: BC) -> list[Optimizer]:
    """One optimizer for the latent weights, one for biases and BatchNorm.

    Weight decay would drag latent weights towards zero, where signs flip at random: they have their own.
    """
    latent = bc.targets()
    ours = {id(weight) for weight in latent}
    others = [p for p in bc.model.parameters() if id(p) not in ours]
    group = {"params": latent, "name": "latent_lr"}
    if args.latent_decay_power is not None:
        group["decay_power"] = args.latent_decay_power
    if args.optimizer == "muon":
        first: Optimizer = Muon([group], lr=args.latent_lr)
    elif args.optimizer == "adam":
        first = torch.optim.Adam([group], lr=args.latent_lr, weight_decay=args.latent_weight_decay, fused=True)
    else:
        first = torch.optim.SGD(
            [group],
            lr=args.latent_lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=args.latent_weight_decay,
            fused=True,
        )
    second = torch.optim.SGD(
        others, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
    )
    return [first, second]


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton, Vinyals and Dean 2015: temperature^2 * KL(teacher || student), of softened outputs (N, 10), in nats."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def make_train_step(
    run: Run,
    bc: BC,
    network: Callable[[Tensor], Tensor],
    optimizers: list[Optimizer],
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    logit_scale: float,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The BinaryConnect step: (images, labels) -> (loss, logits), with the latent weights changed.

    network: bc as the run wraps it (compiled, several processes).
    criterion: (scaled logits, images, labels) -> loss.
    """

    def train_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        bc.binarization()  # 1. binarize: the weights become sign(w), the latent weights w are put by
        with run.autocast():
            logits = network(images)  # 2. forward with binary weights: (N, 3, 32, 32) -> (N, 10)
        loss = criterion(logit_scale * logits.float(), images, labels)
        run.backward(loss, len(labels))  # 3. backward, with binary weights as well
        bc.restore()  # 4. the latent weights are back; the gradient is still that of the binary ones
        run.step(*optimizers)  # 5. optimizer step on the latent weights: small changes add up to a flip
        bc.clip()  # 6. the latent weights stay in [-1, 1]
        return loss, logits

    return train_step


def train(run: Run, init: checkpoints.Checkpoint | None, taught_by: checkpoints.Checkpoint | None) -> None:
    args = run.args
    data = cifar10.load(
        args.data_dir, val_size=args.val_size, limit_train=args.limit_train, limit_test=args.limit_test
    )
    rank, world_size = distributed.rank(), distributed.world_size()
    loader = cifar10.TrainLoader(
        data.train, args.batch_size, seed=args.seed, device=run.device, rank=rank, world_size=world_size
    )

    torch.manual_seed(args.seed)
    model = build(args.arch)
    if init:
        model.load_state_dict(init.state_dict)
    bc = run.place(BC(model, quantizer=stochastic_sign if args.stochastic else deterministic_sign))
    bc.clip()
    optimizers = make_optimizers(args, bc)
    network = run.wrap(bc, len(data.train))
    teacher = run.place(fold_normalization(taught_by.model())) if taught_by else None  # folded: less work

    def criterion(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
        if teacher is None:
            return loss
        with torch.no_grad(), run.autocast():
            teacher_logits = teacher(images)
        learned = distillation(logits, teacher_logits.float(), args.temperature)
        return args.teacher_weight * learned + (1 - args.teacher_weight) * loss

    train_step = make_train_step(run, bc, network, optimizers, criterion, args.logit_scale)

    def score(split_name: str) -> Scores:
        split = getattr(data, split_name)
        batches = cifar10.eval_batches(split, EVAL_BATCH, run.device, rank=rank, world_size=world_size)
        with bc.binarized():  # the binarized network is the result: it is what is scored and chosen
            return evaluate(model, batches, len(split), logit_scale=args.logit_scale, progress="scoring")

    run.describe(model, len(data.train), data.scored_on)
    fit(
        run,
        model,
        optimizers,
        loader,
        train_step,
        score,
        chosen_on="val" if data.val else "test",
        watch=SignWatch(bc),
        about={"logit_scale": args.logit_scale, "teacher_sha256": taught_by.sha256 if taught_by else None},
    )


def main() -> None:
    with closing(Run.start(make_parser(), kind="latent")) as run:
        # A resumed run has its weights already; the teacher it needs in any case.
        init = None if run.resumed else load_init(run.args.init, run.args.arch)
        train(run, init, load_teacher(run.args.teacher, run.resumed))


if __name__ == "__main__":
    cli.run(main)
