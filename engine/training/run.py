"""One training run: its options, its machine, its folder, and what it resumes.

`Run.start` refuses what options, folder and checkpoint show to be wrong, before any data is fetched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import checkpoints, cli, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import UserError, reason
from engine.files import FolderLock, archive, remove_leftovers
from engine.training import distributed
from engine.training.curves import CURVES
from engine.training.tracking import METRICS
from models import ARCHITECTURES

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
    smoothing = "share of a target given to all classes alike"
    model.add_argument("--label-smoothing", type=cli.number(0, maximum=1), default=0.1, help=smoothing)
    warmup = "epochs of linear warm-up; cosine annealing after it"
    model.add_argument("--warmup-epochs", type=cli.number(0), default=5.0, help=warmup)
    model.add_argument("--seed", type=cli.integer(0), default=0, help="seed of initialization, order, augmentation")
    cli.add_data_options(parser, batch_size=128)
    data = parser.add_argument_group("data for trials")
    held_out = "hold out N training images and choose the best epoch on them"
    most = 49_990  # of 50,000; one of each class must be left
    data.add_argument("--val-size", type=cli.integer(0, maximum=most), default=0, metavar="N", help=held_out)
    data.add_argument("--limit-train", type=cli.integer(2), metavar="N", help="train on N images only")
    run = parser.add_argument_group("run")
    cli.add_output_option(run)
    resume = f"go on from CKPT (default: {LAST} in the output folder); options not given are those of the run, but "
    resume += "for folders, device, threads and wandb"
    run.add_argument("--resume", nargs="?", const="", metavar="CKPT", help=resume)
    compiling = "torch.compile the network (default: on CUDA devices where it works)"
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compiling)
    precision = "format of convolutions in training; auto: bfloat16 where the hardware has units for it"
    run.add_argument("--precision", choices=("auto", *runtime.PRECISIONS), default="auto", help=precision)
    wandb = "Weights & Biases; auto: online where an API key is configured, else offline"
    run.add_argument("--wandb", choices=("auto", "online", "offline", "disabled"), default="auto", help=wandb)


@dataclass
class Run:
    """One training run. To be made with `start`. Its args are resolved: no option is left to be chosen."""

    args: argparse.Namespace
    device: torch.device
    folder: Path
    kind: str  # of the weights that are saved: "float" or "latent"
    resumed: checkpoints.Checkpoint | None
    lock: FolderLock | None

    @classmethod
    def start(cls, parser: cli.ArgumentParser, kind: str) -> Run:
        """Read the command line and make the run ready, together with the other processes where there are any."""
        runtime.silence_compiler()
        runtime.keep_freed_memory()
        distributed.start()
        args = parser.parse_args()
        must_compile = args.compile is True
        if args.resume == "" and not args.output_dir.exists():
            raise UserError(f"--resume: there is no {args.output_dir / LAST}; start without --resume")
        folder = cli.prepare_output_dir(args.output_dir)
        lock = FolderLock(folder) if distributed.is_writer() else None
        if lock:
            remove_leftovers(folder, RUN_FILES, sole_writer=True)
        resumed = None
        if args.resume is not None:
            resumed = _load_resumable(Path(args.resume) if args.resume else folder / LAST, kind)
            args = _adopt_options(parser, resumed)
        device = distributed.own_device(cli.select_device(args.device, args.threads))
        processes = distributed.world_size()
        if args.batch_size % processes:
            raise UserError(f"--batch-size {args.batch_size} cannot be shared by {processes} processes")
        args.precision = runtime.choose_precision(args.precision, device)
        args.compile, notice = runtime.choose_compile(args.compile, device, required=must_compile)
        distributed.agree(f"{plain_options(args)}", "their options, precision or mode")
        distributed.agree(resumed.sha256 if resumed else "", "the checkpoint they resume")
        run = cls(args, device, folder, kind, resumed, lock)
        if notice:
            run.print_once(notice)
        return run

    def resumes_its_own_folder(self) -> bool:
        """Whether the checkpoint that is resumed is this folder's own: the files beside it are then of this run."""
        path = self.resumed.path if self.resumed else None
        return path is not None and path.name == LAST and path.parent.samefile(self.folder)

    def resume_command(self) -> str:
        """What to type to go on with this run: with those options of now that its checkpoint does not hold."""
        processes = distributed.world_size()
        start = "python3" if processes == 1 else f"torchrun --nproc_per_node={processes}"
        return self.command(Path(sys.argv[0]).name, "--resume", places=PLACE_OPTIONS, start=start)

    def command(self, script: str, argument: object, *, places: Iterable[str], start: str = "python3") -> str:
        """What to type for a script beside this one; of the options `places` those that this run was given."""
        path = os.path.join(os.path.dirname(sys.argv[0]), script)
        words = [start, cli.as_typed(path), cli.as_typed(argument)]
        for name in places:
            option = f"--{name.replace('_', '-')}"
            if any(word.split("=")[0] == option for word in sys.argv):
                words += [option, cli.as_typed(getattr(self.args, name))]
        return " ".join(words)

    def check_folder(self) -> None:
        """To be called before anything is written there: see `FolderLock.check`."""
        if self.lock:
            self.lock.check()

    def archive_previous_run(self) -> None:
        """Move the files of an earlier run in this folder aside; a teacher among them is then found there."""
        if not distributed.is_writer():
            return
        self.check_folder()
        moved = archive(self.folder, RUN_FILES)
        if not moved:
            return
        self.print_once(f"The files of the previous run were moved to {moved}.")
        teacher = self.args.teacher
        if teacher and not teacher.exists() and (moved / teacher.name).exists():
            self.args.teacher = moved / teacher.name

    def print_once(self, text: str = "") -> None:
        """Print one line, in the writing process only, above the progress bar."""
        if distributed.is_writer():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def autocast(self) -> AbstractContextManager[None]:
        return runtime.autocast(self.args.precision, self.device)

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format that is fastest there."""
        return model.to(self.device, memory_format=torch.channels_last)

    def compile_and_parallelize(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network as the step calls it: over several processes and compiled, where that is wanted.

        Compiled with static shapes, for full batches. The short last batch of an epoch takes the plain network:
        compiling a second time for it would take longer than it saves.
        """
        plain = distributed.data_parallel(network, self.device)
        if not self.args.compile:
            return plain
        full = self.args.batch_size // distributed.world_size()
        compiled = torch.compile(plain, dynamic=False)
        return lambda images: (compiled if len(images) == full else plain)(images)


def _load_resumable(path: Path, kind: str) -> checkpoints.Checkpoint:
    loaded = checkpoints.load(path)
    if not isinstance(loaded.raw.get("training"), dict):
        raise UserError(f"{path}: holds weights but no training state; --resume needs a {LAST}")
    if loaded.kind != kind:
        other = {"float": "main.py", "latent": "main_binary.py"}.get(loaded.kind, "another script")
        raise UserError(f"{path}: its weights are {loaded.kind!r}: it is a run of {other}; resume it with that")
    return loaded


def _adopt_options(parser: cli.ArgumentParser, resumed: checkpoints.Checkpoint) -> argparse.Namespace:
    """The command line once more, after the options of the run that is resumed, as if they had been typed.

    Raises UserError for an option given now that contradicts the run.
    """
    recorded, words = resumed.config, []
    for name, value in recorded.items():
        option = f"--{name}".replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    try:
        if recorded.keys() != plain_options(parser.parse_args()).keys():
            raise UserError("other options")
        args = parser.parse_args(words + sys.argv[1:])
    except UserError as error:  # of the file: the command line was parsed without one before
        raise UserError(f"{resumed.path}: its options are not those of this script: {reason(error)}") from error
    if args.compile is None:
        args.compile = recorded["compile"]
    for name, value in plain_options(args).items():
        if name == "compile":
            continue  # it changes nothing but rounding, and the trainer tells of that
        if name == "teacher" and value and recorded[name]:
            continue  # the file may have another name now: its content is compared when it is loaded
        if value != recorded[name]:
            given, before = _in_words(name, value), _in_words(name, recorded[name])
            raise UserError(
                f"{given} contradicts {resumed.path}, which was run with {before}; leave it out, or start a new run"
            )
    return args


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
def closing_run(run: Run) -> Iterator[Run]:
    """Release the folder at the end of a run, however it ends, and leave the other processes."""
    with run.lock or nullcontext():
        yield run
        distributed.stop()  # after a failure the end of the process does that
