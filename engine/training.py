"""What both trainings share: options, schedule, the loop, progress, stopping, resuming, saving.

A script makes a `Run` (device, folder, what it resumes), builds its network and optimisers, and gives `fit` the
function that does one step. The step itself is in the script.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from engine import checkpoint as checkpoints
from engine import cli, distributed, runtime
from engine.checkpoint import BEST, FINAL, LAST
from engine.cli import Interrupted, UserError
from engine.evaluate import Scores
from engine.files import FolderLock, remove_leftovers, set_aside
from engine.tracking import CURVES, METRICS, WandbRun, draw_curves, write_metrics
from models import ARCHITECTURES
from models.resnet_s import weight_layers

RUN_FILES = (BEST, FINAL, LAST, METRICS, CURVES)
# What may differ between the two parts of a resumed run; every other option must be what it was.
FREE_OPTIONS = {"resume", "debug", "data_dir", "output_dir", "device", "threads", "wandb"}
EVAL_BATCH = 500  # images per batch when scoring; any size gives the same figures but for rounding
_LOOK_SECONDS = 0.5  # how often the numbers are fetched from the device for the progress bar
_CURVES_SECONDS = 60.0  # drawing takes about a second: not at the end of every short epoch


class Loader(Protocol):
    """Batches of one split: see cifar10.TrainLoader."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class EpochWatch(Protocol):
    """Something that measures a whole epoch, with a state of its own so that it survives a stop within one."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def add_training_options(parser: cli.ArgumentParser, *, lr: float, weight_decay: float) -> None:
    """The options that main.py and main_binary.py share."""
    model = parser.add_argument_group("network and schedule")
    model.add_argument("--arch", choices=ARCHITECTURES, default="resnet20", help="network")
    model.add_argument("--epochs", type=cli.integer(1), default=150, help="passes over the training set")
    model.add_argument("--lr", type=cli.number(0), default=lr, help="peak learning rate")
    model.add_argument("--weight-decay", type=cli.number(0), default=weight_decay, help="L2 penalty")
    model.add_argument("--label-smoothing", type=cli.number(0, maximum=1), default=0.1, help="label smoothing")
    model.add_argument(
        "--warmup-epochs",
        type=cli.number(0),
        default=5.0,
        help="epochs of linear warm-up; cosine annealing after it",
    )
    model.add_argument("--seed", type=cli.integer(0), default=0, help="seed of initialisation, order, augmentation")
    cli.add_data_options(parser, batch_size=128)
    data = parser.add_argument_group("data for trials")
    data.add_argument(
        "--val-size",
        type=cli.integer(0),
        default=0,
        metavar="N",
        help="hold out N training images, choose on them",
    )
    data.add_argument("--limit-train", type=cli.integer(2), metavar="N", help="train on N images only")
    run = parser.add_argument_group("run")
    cli.add_output_option(run)
    run.add_argument(
        "--resume",
        nargs="?",
        const=LAST,
        metavar="CKPT",
        help=f"go on from CKPT (default: {LAST} in the output folder); options not given are those of the run",
    )
    run.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the network (default: where it works and the run is long enough to repay it)",
    )
    run.add_argument(
        "--precision",
        choices=("auto", *runtime.PRECISIONS),
        default="auto",
        help="of the convolutions in training; auto: bfloat16 or float16 where the hardware has units for it",
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
    """One training run: its options, its machine, its folder, and what it resumes.

    Everything that can be refused is refused here, before any data is fetched.
    """

    args: argparse.Namespace
    device: torch.device
    folder: Path
    kind: str  # of the weights that are saved: "float" or "latent"
    resumed: checkpoints.Checkpoint | None
    lock: FolderLock | None
    precision: str = "float32"
    compiled: bool = False
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))

    @classmethod
    def start(
        cls, parser: cli.ArgumentParser, kind: str, check: Callable[[argparse.Namespace], None] | None = None
    ) -> Run:
        """Read the command line and make the run ready.

        check: looks at the options once they are complete; raises UserError.
        """
        runtime.silence_compiler()
        runtime.keep_freed_memory()
        args, given = parse(parser)
        resumed = None
        if args.resume is not None:
            path = args.output_dir / LAST if args.resume == LAST else Path(args.resume)
            resumed = _load_resumable(path, kind)
            _adopt_options(args, given, resumed)
        if check:
            check(args)
        device = distributed.start(cli.select_device(args.device, args.threads))
        if args.batch_size % distributed.world_size():
            raise UserError(
                f"--batch-size {args.batch_size} cannot be shared by {distributed.world_size()} processes"
            )
        folder = cli.prepare_output_dir(args.output_dir)
        lock = FolderLock(folder) if distributed.is_writer() else None
        if lock:
            remove_leftovers(folder, RUN_FILES, sole_writer=True)
        run = cls(args, device, folder, kind, resumed, lock)
        run.precision = (
            resumed.raw["training"]["precision"] if resumed else runtime.choose_precision(args.precision, device)
        )
        run.scaler = runtime.gradient_scaler(run.precision, device)
        return run

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

    def autocast(self) -> AbstractContextManager[None]:
        return runtime.autocast(self.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """loss.backward(), with the loss scaled where float16 gradients would otherwise vanish."""
        self.scaler.scale(loss).backward()

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
        wanted = self.resumed.raw["training"]["compiled"] if self.resumed else args.compile
        self.compiled, notice = runtime.choose_compile(wanted, self.device, train_images * args.epochs)
        if notice:
            self.say(notice)
        plain = distributed.data_parallel(network, self.device)
        if not self.compiled:
            return plain
        full = args.batch_size // distributed.world_size()
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


def _adopt_options(args: argparse.Namespace, given: set[str], resumed: checkpoints.Checkpoint) -> None:
    """Take the options of the run that is resumed. Raises UserError for one given now that contradicts it."""
    for name, value in vars(args).items():
        if name in FREE_OPTIONS or name not in resumed.config:
            continue
        before = resumed.config[name]
        now = str(value) if isinstance(value, Path) else value
        if name in given and now != before:
            raise UserError(
                f"--{name.replace('_', '-')} {now} contradicts {resumed.path}, which was run with {before}; "
                "leave it out, or start a new run"
            )
        setattr(args, name, before)


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved options as plain values, for a checkpoint; places and the like, which change nothing, left out."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in FREE_OPTIONS
    }


def make_schedulers(run: Run, optimizers: list[Optimizer], steps_per_epoch: int) -> list[LRScheduler]:
    """Linear warm-up, then cosine annealing to zero (Loshchilov and Hutter 2017, without restarts), step by step."""
    args = run.args
    total = args.epochs * steps_per_epoch
    warmup = round(args.warmup_epochs * steps_per_epoch)
    if args.warmup_epochs > 0 and args.epochs <= 2 * args.warmup_epochs:
        warmup = total // 5
        run.say(f"Warm-up shortened to one fifth of the run, {warmup} steps: --epochs {args.epochs} is that short.")
    schedulers: list[LRScheduler] = []
    for optimizer in optimizers:
        cosine = CosineAnnealingLR(optimizer, T_max=total - warmup)
        if warmup == 0:
            schedulers.append(cosine)
            continue
        linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
        schedulers.append(SequentialLR(optimizer, [linear, cosine], milestones=[warmup]))
    return schedulers


class _Signals:
    """Ctrl-C and SIGTERM while training: noted, and acted upon between two steps.

    Before the first step of this process, which may take half a minute to compile, there is nothing new to
    save, so they act at once. So does a second one.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.at_once = True

    def __enter__(self) -> _Signals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _frame: object) -> None:
        again = self.signum != 0
        self.signum = signum
        if self.at_once or again:
            raise Interrupted(signum)


class Trainer:
    """Runs the epochs of one run and keeps its files. Use through `fit`."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizers: list[Optimizer],
        loader: Loader,
        step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        score: Callable[[str], Scores],
        chosen_on: str,
        watch: EpochWatch | None,
        about: dict[str, Any],
    ) -> None:
        self.run, self.model, self.optimizers, self.loader = run, model, optimizers, loader
        self.step, self.score, self.chosen_on, self.watch, self.about = step, score, chosen_on, watch, about
        self.schedulers = make_schedulers(run, optimizers, loader.steps_per_epoch)
        self.epoch, self.steps_done = 0, 0  # finished epochs; finished steps of the epoch under way
        self.totals = torch.zeros(3, device=run.device)  # sum of loss, correct, images: of the epoch under way
        self.seconds = 0.0  # of the epoch under way
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.wandb_id: str | None = None
        self.signals = _Signals()
        self._curves_drawn = -math.inf
        self._speed = 0.0

    # -- state ---------------------------------------------------------------------------------------------

    def checkpoint(self, epoch: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
        """The dictionary of a checkpoint with the weights of now; `more` adds or overrides entries."""
        entries = (
            self.about | {"config": plain_options(self.run.args), "versions": checkpoints.library_versions()} | more
        )
        state = self.model.state_dict()
        return checkpoints.make(self.run.args.arch, self.run.kind, state, epoch=epoch, metrics=metrics, **entries)

    def latest_metrics(self) -> dict[str, float]:
        return self.history[-1] if self.history else {}

    def training_state(self) -> dict[str, Any]:
        return {
            "precision": self.run.precision,
            "compiled": self.run.compiled,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.run.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(self.run.device) if self.run.device.type == "cuda" else None,
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "totals": self.totals.cpu(),
            "seconds": self.seconds,
            "watch": self.watch.state_dict() if self.watch else {},
            "history": self.history,
            "best": self.best,
            "wandb_id": self.wandb_id,
            "steps_per_epoch": self.loader.steps_per_epoch,
        }

    def load_training_state(self, resumed: checkpoints.Checkpoint) -> None:
        state = resumed.raw["training"]
        if state["steps_per_epoch"] != self.loader.steps_per_epoch:
            raise UserError(
                f"{resumed.path}: its epochs have {state['steps_per_epoch']} steps, with this data and these options "
                f"they have {self.loader.steps_per_epoch}; use the same data"
            )
        self.model.load_state_dict(resumed.state_dict)
        for mine, saved in zip(self.optimizers, state["optimizers"], strict=True):
            mine.load_state_dict(saved)
        for mine, saved in zip(self.schedulers, state["schedulers"], strict=True):
            mine.load_state_dict(saved)
        self.run.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.run.device.type == "cuda" and state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"], self.run.device)
        if self.watch:
            self.watch.load_state_dict(state["watch"])
        self.epoch, self.steps_done = state["epoch"], state["steps_done"]
        self.totals.copy_(state["totals"])
        self.seconds = state["seconds"]
        self.history, self.best, self.wandb_id = state["history"], state["best"], state["wandb_id"]

    def save_last(self) -> None:
        if distributed.is_writer():
            state = self.training_state()
            checkpoints.save(
                self.run.folder / LAST, self.checkpoint(self.epoch, self.latest_metrics(), training=state)
            )

    def save_best(self) -> None:
        """Write best_model.pth from the best weights kept in memory, which checkpoint_last.pth holds too."""
        if distributed.is_writer() and self.best:
            content = self.checkpoint(self.best["epoch"], self.best["metrics"], state_dict=self.best["state_dict"])
            checkpoints.save(self.run.folder / BEST, content)

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> None:
        run = self.run
        if run.resumed:
            self.load_training_state(run.resumed)
            run.say(f"Resuming {run.resumed.path} at epoch {self.epoch + 1}, step {self.steps_done}.")
        elif distributed.is_writer():
            self._start_fresh()
        tracker = WandbRun(
            run.args.wandb if distributed.is_writer() else "disabled",
            run.folder,
            name=f"{run.args.arch}-{run.kind}-seed{run.args.seed}",
            config=plain_options(run.args),
            run_id=self.wandb_id,
        )
        self.wandb_id = tracker.id
        if tracker.notice:
            run.say(tracker.notice)
        try:
            with self.signals:
                if not run.resumed:
                    self.save_last()  # from here on the run can be resumed
                while self.epoch < run.args.epochs:
                    self.train_epoch()
                    tracker.log(self.finish_epoch())
        except Interrupted as stop:
            tracker.finish(stop.exit_status)
            raise Interrupted(self.signals.signum, self._farewell()) from None
        tracker.finish()

    def _start_fresh(self) -> None:
        moved = set_aside(self.run.folder, RUN_FILES)
        if moved:
            self.run.say(f"The files of the previous run were moved to {moved}.")

    def train_epoch(self) -> None:
        """The steps of one epoch that are still to do."""
        if self.steps_done == 0:
            self.totals.zero_()
            self.seconds = 0.0
            if self.watch:
                self.watch.begin()
        self.model.train()
        started = looked = time.perf_counter()
        before = self.seconds
        steps = self.loader.steps_per_epoch
        with self._bar() as bar:
            for images, labels in self.loader.epoch(self.epoch, self.steps_done):
                loss, logits = self.step(images, labels)
                for scheduler in self.schedulers:
                    scheduler.step()
                self._count(loss, logits, labels)
                self.steps_done += 1
                self.signals.at_once = False
                bar.update()
                now = time.perf_counter()
                self.seconds = before + now - started
                if now - looked > _LOOK_SECONDS or self.steps_done == steps:
                    looked = now
                    self._show(bar)
                self._stop_where_asked()

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        loss = loss.detach()
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            self._diverged()  # elsewhere reading the loss would stall the device: it is looked at in _show
        count = len(labels)
        correct = (logits.argmax(1) == labels).sum()
        self.totals += torch.stack([loss.float() * count, correct.float(), correct.new_tensor(count).float()])

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.loader.steps_per_epoch,
            initial=self.steps_done,
            desc=f"epoch {self.epoch + 1}/{self.run.args.epochs}",
            leave=False,
            disable=not (sys.stderr.isatty() and distributed.is_writer()),
            bar_format="{desc} {percentage:3.0f}%|{bar:18}| {postfix}",
        )

    def _show(self, bar: tqdm) -> None:
        loss, accuracy, count = self._means(self.totals)
        if not math.isfinite(loss):
            self._diverged()
        self._speed = count * distributed.world_size() / max(self.seconds, 1e-9)
        bar.set_postfix_str(
            f"loss {loss:.3f}  acc {accuracy:.1f}%  {self._speed:,.0f} images/s  {self._time_left()} left"
        )

    @staticmethod
    def _means(totals: Tensor) -> tuple[float, float, float]:
        loss, correct, count = totals.tolist()
        return loss / max(count, 1), 100 * correct / max(count, 1), count

    def _time_left(self) -> str:
        steps = self.loader.steps_per_epoch
        left = (self.run.args.epochs - self.epoch) * steps - self.steps_done
        return tqdm.format_interval(left * self.seconds / max(self.steps_done, 1))

    def _diverged(self) -> None:
        kept = self.run.folder / LAST
        raise UserError(
            f"the loss became NaN or infinite in epoch {self.epoch + 1}, step {self.steps_done + 1}; {kept} still holds "
            f"the state before it; try a smaller --lr"
        )

    def _stop_where_asked(self) -> None:
        if distributed.any_rank(self.signals.signum, self.run.device):
            self.save_last()
            raise Interrupted(self.signals.signum or signal.SIGTERM)

    def finish_epoch(self) -> dict[str, float]:
        """Score the network after an epoch's last step, write the run's files, and go on to the next epoch."""
        loss, accuracy, count = self._means(distributed.sum_over_ranks(self.totals))
        row = {"epoch": self.epoch + 1, "train_loss": loss, "train_accuracy": accuracy}
        scores = self.score(self.chosen_on)
        row[f"{self.chosen_on}_loss"] = scores.loss
        row[f"{self.chosen_on}_accuracy"] = scores.accuracy
        row[f"{self.chosen_on}_images"] = scores.images
        row |= {name: group["lr"] for name, group in self._named_groups()}
        row |= self.watch.end() if self.watch else {}
        row |= {"seconds": self.seconds, "images_per_second": count / max(self.seconds, 1e-9)}
        self.history.append(row)
        if not self.best or scores.accuracy > self.best["metrics"][f"{self.chosen_on}_accuracy"]:
            state = checkpoints.plain_state(self.model.state_dict(), copy=True)
            self.best = {"epoch": self.epoch + 1, "metrics": row, "state_dict": state}
            self.save_best()
        left = self._time_left()
        self.epoch += 1
        self.steps_done = 0
        self.save_last()
        self.write_records()
        self.run.say(self._epoch_line(row, left))
        self._stop_where_asked()
        return row

    def _named_groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield group.get("name", "lr"), group

    def _epoch_line(self, row: dict[str, float], left: str) -> str:
        where = self.chosen_on
        flips = f"  flipped {row['flipped']:.2f}%" if "flipped" in row else ""
        return (
            f"epoch {int(row['epoch']):>3}/{self.run.args.epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.2f}%  {where} {row[f'{where}_accuracy']:.2f}%{flips}  "
            f"{row['images_per_second']:,.0f} images/s  {left} left"
        )

    def write_records(self, *, always: bool = False) -> None:
        if not distributed.is_writer() or not self.history:
            return
        write_metrics(self.run.folder, self.history)
        if always or time.perf_counter() - self._curves_drawn > _CURVES_SECONDS:
            draw_curves(self.run.folder, self.history, f"{self.run.args.arch}, {self.run.kind} weights")
            self._curves_drawn = time.perf_counter()

    def _farewell(self) -> str:
        if not (self.run.folder / LAST).exists():
            return "Stopped before the first step; nothing was saved."
        self.write_records(always=True)
        output = "" if self.run.folder == Path(".") else f' --output-dir "{self.run.folder}"'
        return (
            f"Stopped after {self.epoch} of {self.run.args.epochs} epochs and {self.steps_done} of "
            f"{self.loader.steps_per_epoch} steps; {self.run.folder / LAST} is saved. "
            f"Go on with: python3 {Path(sys.argv[0]).name} --resume{output}"
        )

    # -- the end -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Score the final and the best epoch on the test set, and write what is not there yet."""
        run = self.run
        if distributed.is_writer():
            for name, write in ((BEST, self.save_best), (FINAL, self._save_final)):
                if name == FINAL or not (run.folder / name).exists():
                    write()
        self.write_records(always=True)
        final = self.score("test")
        run.say(f"\nFinal epoch ({self.epoch}), {FINAL}:")
        run.say(final.accuracy_line())
        how = (
            "on the test set itself, so this figure is optimistic"
            if self.chosen_on == "test"
            else "on held-out images"
        )
        run.say(f"Best epoch ({self.best['epoch']}), {BEST}, chosen {how}:")
        self.model.load_state_dict(self.best["state_dict"])
        run.say(self.score("test").accuracy_line())

    def _save_final(self) -> None:
        if not (self.run.folder / FINAL).exists():
            checkpoints.save(self.run.folder / FINAL, self.checkpoint(self.epoch, self.latest_metrics()))


def fit(
    run: Run,
    model: nn.Module,
    optimizers: list[Optimizer],
    loader: Loader,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    score: Callable[[str], Scores],
    *,
    chosen_on: str = "test",
    watch: EpochWatch | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Train `model` with `step` for the run's epochs, with everything around it, and print how it ended.

    model: the bare network, whose state_dict is saved; its weights are what the optimisers change.
    step: (images, labels) -> (loss, logits); does everything one step of training does, schedule apart.
    score: the name of a split, "val" or "test", -> what the network scores on it.
    chosen_on: the split on which the best epoch is chosen.
    watch: measures that need a whole epoch. about: further entries for the checkpoints.
    Raises Interrupted after Ctrl-C or SIGTERM, with everything saved; UserError where the loss is not finite.
    """
    trainer = Trainer(run, model, optimizers, loader, step, score, chosen_on, watch, about or {})
    trainer.train()
    trainer.finish()


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Release the folder and leave the other processes at the end of a run, however it ends."""
    try:
        yield run
    finally:
        if run.lock:
            run.lock.release()
        distributed.stop()
