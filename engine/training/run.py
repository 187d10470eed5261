"""One training run: its options, its machine, its folder, and what it resumes.

`Run.start` refuses what options, folder and checkpoint show to be wrong, before any data is fetched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from engine import checkpoints, cli, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import UserError, reason
from engine.files import FolderLock, remove_leftovers, set_aside, undo_unfinished_moves
from engine.training import distributed
from engine.training.tracking import CURVES, METRICS
from models import ARCHITECTURES
from models.resnet_s import weight_layers

RUN_FILES = (BEST, FINAL, LAST, METRICS, CURVES)
# What may differ between the two parts of a resumed run; every other option must be what it was.
PLACE_OPTIONS = ("output_dir", "data_dir", "device", "threads", "wandb")
FREE_OPTIONS = {"resume", "debug", *PLACE_OPTIONS}


def add_training_options(parser: cli.ArgumentParser, *, lr: float, weight_decay: float) -> None:
    """The options that main.py and main_binary.py share."""
    model = parser.add_argument_group("network and schedule")
    model.add_argument("--arch", choices=ARCHITECTURES, default="resnet20", help="network")
    model.add_argument("--epochs", type=cli.integer(1), default=150, help="passes over the training set")
    model.add_argument("--lr", type=cli.number(0), default=lr, help="peak learning rate")
    model.add_argument("--weight-decay", type=cli.number(0), default=weight_decay, help="L2 penalty")
    model.add_argument(
        "--label-smoothing",
        type=cli.number(0, maximum=1),
        default=0.1,
        help="share of a target given to all classes alike",
    )
    model.add_argument(
        "--warmup-epochs",
        type=cli.number(0),
        default=5.0,
        help="epochs of linear warm-up; cosine annealing after it",
    )
    model.add_argument("--seed", type=cli.integer(0), default=0, help="seed of initialization, order, augmentation")
    cli.add_data_options(parser, batch_size=128)
    data = parser.add_argument_group("data for trials")
    data.add_argument(
        "--val-size",
        type=cli.integer(0, maximum=49_990),  # of 50,000; one of each class must be left
        default=0,
        metavar="N",
        help="hold out N training images and choose the best epoch on them",
    )
    data.add_argument("--limit-train", type=cli.integer(2), metavar="N", help="train on N images only")
    run = parser.add_argument_group("run")
    cli.add_output_option(run)
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CKPT",
        help=f"go on from CKPT (default: {LAST} in the output folder); options not given are those of the run, but "
        "for folders, device, threads and wandb",
    )
    run.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the network (default: on a GPU, where the run is long enough to repay it)",
    )
    run.add_argument(
        "--precision",
        choices=("auto", *runtime.PRECISIONS),
        default="auto",
        help="format of convolutions in training; auto: bfloat16 or float16 where the hardware has units for it",
    )
    run.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        default="auto",
        help="Weights & Biases; auto: online where an API key is configured, else offline",
    )


def parse(parser: cli.ArgumentParser) -> tuple[argparse.Namespace, set[str]]:
    """The parsed options, and the names of those given on the command line."""
    args = parser.parse_args()
    unset = object()
    given = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    return args, {name for name, value in vars(given).items() if value is not unset}


@dataclass
class Run:
    """One training run: its options, its machine, its folder, and what it resumes. To be made with `start`."""

    args: argparse.Namespace
    device: torch.device
    folder: Path
    kind: str  # of the weights that are saved: "float" or "latent"
    resumed: checkpoints.Checkpoint | None
    lock: FolderLock | None
    _: KW_ONLY
    given: frozenset[str] = frozenset()  # names of the options on the command line
    precision: str = "float32"
    compiled: bool = False
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))

    @classmethod
    def start(cls, parser: cli.ArgumentParser, kind: str) -> Run:
        """Read the command line and make the run ready, together with the other processes where there are any."""
        runtime.silence_compiler()
        runtime.keep_freed_memory()
        distributed.start()
        with distributed.one_message():
            return cls._start(parser, kind)

    @classmethod
    def _start(cls, parser: cli.ArgumentParser, kind: str) -> Run:
        args, given = parse(parser)
        device = distributed.own_device(cli.select_device(args.device, args.threads))
        if args.resume == "" and not args.output_dir.exists():
            raise UserError(f"--resume: there is no {args.output_dir / LAST}; start without --resume")
        folder = cli.prepare_output_dir(args.output_dir)
        lock = FolderLock(folder) if distributed.is_writer() else None
        if lock:  # before the checkpoint is read: it may be among what is put back
            remove_leftovers(folder, (*RUN_FILES, cli.PROBE), sole_writer=True)
            undo_unfinished_moves(folder)
        distributed.barrier()
        resumed = None
        if args.resume is not None:
            resumed = _load_resumable(Path(args.resume) if args.resume else folder / LAST, kind)
            _adopt_options(parser, args, given, resumed)
        if args.batch_size % distributed.world_size():
            raise UserError(
                f"--batch-size {args.batch_size} cannot be shared by {distributed.world_size()} processes"
            )
        run = cls(args, device, folder, kind, resumed, lock, given=frozenset(given))
        run.precision = _precision(args, device, resumed)
        run.scaler = runtime.gradient_scaler(run.precision, device)
        distributed.agree(f"{plain_options(args)} {run.precision}", "their options or precision")
        distributed.agree(resumed.sha256 if resumed else "", "the checkpoint they resume")
        return run

    def resumes_its_own_folder(self) -> bool:
        """Whether the checkpoint that is resumed is this folder's own: the files beside it are then of this run."""
        return self.resumed is not None and _place(self.resumed.path) == _place(self.folder / LAST)

    def resume_command(self) -> str:
        """What to type to go on with this run: with those options of now that its checkpoint does not hold."""
        processes = distributed.world_size()
        start = "python3" if processes == 1 else f"torchrun --nproc_per_node={processes}"
        words = [start, cli.as_typed(sys.argv[0]), "--resume"]
        for name in PLACE_OPTIONS:
            value = getattr(self.args, name)
            if name in self.given:
                words += [f"--{name.replace('_', '-')}", cli.as_typed(value)]
        return " ".join(words)

    def check_folder(self) -> None:
        """To be called before anything is written there: see `FolderLock.check`."""
        if self.lock:
            self.lock.check()

    def make_room(self) -> None:
        """Move the files of an earlier run in this folder aside; a teacher among them is then found there."""
        if not distributed.is_writer():
            return
        self.check_folder()
        moved = set_aside(self.folder, RUN_FILES)
        if not moved:
            return
        self.say(f"The files of the previous run were moved to {moved}.")
        teacher = getattr(self.args, "teacher", None)
        if teacher and not teacher.exists() and (moved / teacher.name).exists():
            self.args.teacher = moved / teacher.name

    def say(self, text: str = "") -> None:
        """Print one line, in the writing process only."""
        if distributed.is_writer() and text is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def describe(self, model: nn.Module, train_images: int, scored_on: str) -> None:
        """Print the head of the run: the network, the data, the machine."""
        args = self.args
        total = sum(p.numel() for p in model.parameters())
        weights = sum(layer.weight.numel() for _, layer in weight_layers(model))
        binary = f", {weights:,} of them binary" if self.kind == "latent" else ""
        several = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        mode = "compiled" if self.compiled else "eager"
        self.say(f"{args.arch}: {total:,} parameters{binary}")
        self.say(f"data: {train_images:,} training images, scored on {scored_on}")
        self.say(f"run: {args.epochs} epochs of batches of {args.batch_size}, seed {args.seed}, into {self.folder}/")
        self.say(f"machine: {runtime.describe(self.device)}{several}, {self.precision}, {mode}")
        if runtime.may_be_emulated(self.precision, self.device):
            self.say("Note: neither AMX nor AVX-512 BF16 found: bfloat16 may be emulated, many times slower.")

    def autocast(self) -> AbstractContextManager[None]:
        return runtime.autocast(self.precision, self.device)

    def backward(self, loss: Tensor, images: int) -> None:
        """loss.backward(), for a loss that is the mean over this process's `images` images.

        The loss is weighted for the average over processes, and scaled where float16 gradients would vanish.
        """
        self.scaler.scale(loss * distributed.gradient_share(images)).backward()

    def step(self, *optimizers: Optimizer) -> None:
        """optimizer.step() of each, with gradients scaled back where `backward` scaled them."""
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format that is fastest there."""
        return model.to(self.device, memory_format=torch.channels_last)

    def wrap(self, network: nn.Module, train_images: int) -> Callable[[Tensor], Tensor]:
        """The network as the step calls it: over several processes and compiled, where that is wanted.

        Compiled with static shapes, for full batches. The short last batch of an epoch takes the plain network:
        compiling a second time for it would take longer than it saves.
        """
        args = self.args
        was = self.resumed.raw["training"]["compiled"] if self.resumed else None
        self.compiled, notice = runtime.choose_compile(args.compile, self.device, train_images * args.epochs, was=was)
        if notice:
            self.say(notice)
        plain = distributed.data_parallel(network, self.device)
        if not self.compiled:
            return plain
        full = args.batch_size // distributed.world_size()
        compiled = torch.compile(plain, dynamic=False)
        return lambda images: (compiled if len(images) == full else plain)(images)


def _place(path: Path) -> tuple[str, str]:
    """Folder and name. The file may be a link to another folder's, but what lies beside it is what matters."""
    return os.path.realpath(path.parent), path.name


def _precision(args: argparse.Namespace, device: torch.device, resumed: checkpoints.Checkpoint | None) -> str:
    """The precision to train in; a resumed run keeps its own. Raises UserError where the device does not have it."""
    if not resumed:
        return runtime.choose_precision(args.precision, device)
    precision = resumed.raw["training"]["precision"]
    if precision == "float16" and device.type != "cuda":
        raise UserError(f"{resumed.path}: was run in float16, which is for CUDA devices only; resume it on one")
    return precision


def _load_resumable(path: Path, kind: str) -> checkpoints.Checkpoint:
    loaded = checkpoints.load(path)
    training = loaded.raw.get("training")
    if not isinstance(training, dict):
        raise UserError(f"{path}: holds weights but no training state; --resume needs a {LAST}")
    if loaded.kind != kind:
        other = {"float": "main.py", "latent": "main_binary.py"}.get(loaded.kind, "another script")
        raise UserError(f"{path}: its weights are {loaded.kind!r}: it is a run of {other}; resume it with that")
    if training.get("precision") not in list(runtime.PRECISIONS) or not isinstance(training.get("compiled"), bool):
        raise UserError(f"{path}: does not say in which precision and mode it was run; use another copy")
    return loaded


def _adopt_options(
    parser: cli.ArgumentParser, args: argparse.Namespace, given: set[str], resumed: checkpoints.Checkpoint
) -> None:
    """Take the options of the run that is resumed. Raises UserError for one given now that contradicts it."""
    unknown = [name for name in resumed.config if name in FREE_OPTIONS or name not in vars(args)]
    if unknown:
        raise UserError(f"{resumed.path}: its options are not those of this script: {unknown[0]!r} is none")
    try:
        before = parser.parse_args(_as_arguments(resumed.config, parser))  # holds them to the same rules
    except UserError as error:
        raise UserError(f"{resumed.path}: its options are not those of this script: {reason(error)}") from error
    training = resumed.raw["training"]
    became = {"compile": training["compiled"], "precision": training["precision"]}  # of a choice left to the script
    for name, value in vars(args).items():
        recorded = getattr(before, name)
        if name in FREE_OPTIONS or (name == "teacher" and name in given and recorded):  # whose content is compared
            continue
        if name in given and value not in (recorded, became.get(name, recorded)):
            raise UserError(
                f"{_in_words(name, value)} contradicts {resumed.path}, which was run with "
                f"{_in_words(name, became.get(name, recorded))}; leave it out, or start a new run"
            )
        setattr(args, name, recorded)


def _as_arguments(options: dict[str, Any], parser: cli.ArgumentParser) -> list[str]:
    """Options as `plain_options` gives them, as the command line that says the same."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            if value != parser.get_default(name):
                arguments.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return arguments


def _in_words(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return f"--{option}" if value else f"no --{option}"
    return f"--{option} {value}"


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved options as plain values, for a checkpoint; places and the like, which change nothing, left out."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in FREE_OPTIONS
    }


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Release the folder at the end of a run, however it ends, and leave the other processes."""
    try:
        with distributed.one_message():
            yield run
        distributed.stop()  # after a failure the end of the process does that: the others may be waiting for it
    finally:
        if run.lock:
            run.lock.release()
