"""The loop that both trainings share: schedule, progress, stopping, resuming, saving.

A script makes a `Run` (engine/run.py), builds its network and optimizers, and gives `fit` the function that does one
step. The step itself is in the script.
"""

from __future__ import annotations

import itertools
import math
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, PolynomialLR, SequentialLR
from tqdm import tqdm

from engine import checkpoints, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import Interrupted, UserError, reason
from engine.evaluate import Scores
from engine.training import distributed
from engine.training.run import Run, plain_options
from engine.training.state import check_training_state, moments_in_own_memory
from engine.training.tracking import END_PATIENCE, WandbRun, draw_curves, write_metrics
from models.resnet_s import weight_layers

EVAL_BATCH = 500  # images per batch when scoring; any size gives the same figures but for rounding
_LOOK_SECONDS = 0.5  # how often the numbers are fetched from the device for the progress bar
_CURVES_SECONDS = 60.0  # drawing takes about a second: not at the end of every short epoch


class Loader(Protocol):
    """Batches of one split: see cifar10.TrainLoader."""

    steps_per_epoch: int
    labels: Tensor  # of all the images, in file order

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class EpochWatch(Protocol):
    """Something that measures a whole epoch: see tracking.FlipRateMeter."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...


def make_schedulers(run: Run, optimizers: list[Optimizer], steps_per_epoch: int) -> list[LRScheduler]:
    """Linear warm-up, then cosine annealing to zero (Loshchilov and Hutter 2017, without restarts), step by step.

    An optimizer whose parameter group has a "decay_power" p falls to zero as (1 - t)^p instead, t from 0 to 1.
    """
    args = run.args
    total = args.epochs * steps_per_epoch
    if args.warmup_epochs == 0 or args.epochs > 2 * args.warmup_epochs:
        warmup = round(args.warmup_epochs * steps_per_epoch)
    else:
        warmup = total // 5
        if not run.resumed:  # said when it began
            short = f"--epochs {args.epochs} is that short"
            run.say(f"Warm-up shortened to one fifth of the run, {warmup} steps: {short}.")
    # In older versions of torch SequentialLR calls step() in a way that step() itself warns of.
    warnings.filterwarnings("ignore", r"The epoch parameter in `scheduler\.step\(\)`", UserWarning)
    schedulers: list[LRScheduler] = []
    for optimizer in optimizers:
        power = optimizer.param_groups[0].get("decay_power")
        if power is None:
            falling: LRScheduler = CosineAnnealingLR(optimizer, T_max=total - warmup)
        else:
            falling = PolynomialLR(optimizer, total_iters=total - warmup, power=power)
        if warmup == 0:
            schedulers.append(falling)
            continue
        linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
        schedulers.append(SequentialLR(optimizer, [linear, falling], milestones=[warmup]))
    return schedulers


class _Signals:
    """Ctrl-C and SIGTERM while training: noted, and acted upon between two steps.

    Where there is nothing new to save they act at once: before the first step of this process, which may take half
    a minute to compile, while scoring, and after the last epoch. So does a second one; within a second it counts
    as the same, as some wrappers pass on what the terminal has sent already.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.at_once = True
        self._since = 0.0

    def __enter__(self) -> _Signals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        again = self.signum != 0 and now - self._since > 1
        if not self.signum:
            self.signum, self._since = signum, now
        if self.at_once or again:
            raise Interrupted(self.signum)

    def act_at_once(self) -> None:
        """Act at once from here on, also on what was noted just now."""
        self.at_once = True
        if self.signum:
            raise Interrupted(self.signum)


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
        self.scoring_seconds = 0.0  # of the last epoch scored by this process
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.wandb_id = uuid.uuid4().hex[:8]
        self.saved: tuple[int, int] | None = None  # finished epochs and steps in this run's checkpoint_last.pth
        self.signals = _Signals()
        self._curves_drawn = time.perf_counter()
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

    def training_state(self, totals: Tensor) -> dict[str, Any]:
        """What a resumed run needs beside the weights. totals: of all processes, (processes, 3)."""
        return {
            "precision": self.run.precision,
            "compiled": self.run.compiled,
            "threads": torch.get_num_threads(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.run.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": runtime.device_generator_state(self.run.device),
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "totals": totals.cpu(),
            "seconds": self.seconds,
            "watch": {},
            "history": self.history,
            "best": self.best,
            "wandb_id": self.wandb_id,
            "labels": checkpoints.digest(self.loader.labels),
        }

    def resume(self, resumed: checkpoints.Checkpoint) -> None:
        """Take up the state that a checkpoint holds. Raises UserError where it does not fit this run."""
        expected = self.training_state(distributed.all_ranks(self.totals))  # its failure is not the file's fault
        try:
            self._load_training_state(resumed, expected)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{resumed.path}: its training state does not fit: {reason(error)}") from error

    def _load_training_state(self, resumed: checkpoints.Checkpoint, expected: dict[str, Any]) -> None:
        state = resumed.raw["training"]
        if state["labels"] != checkpoints.digest(self.loader.labels):
            raise UserError(f"{resumed.path}: was run on other training images than --data-dir holds; use the same")
        totals = state["totals"].view(-1, 3)
        if len(totals) != distributed.world_size():
            raise UserError(
                f"{resumed.path}: is a run of {len(totals)} processes, resumed by {distributed.world_size()}; start "
                "as many (the result depends on it: BatchNorm statistics are each process's own)"
            )
        check_training_state(
            state | {"totals": totals},
            expected,
            self.model,
            self.optimizers,
            epochs=self.run.args.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            accuracy=f"{self.chosen_on}_accuracy",
        )
        self.model.load_state_dict(resumed.state_dict)
        for mine, saved in zip(self.optimizers, state["optimizers"], strict=True):
            mine.load_state_dict(moments_in_own_memory(saved, mine))
        for mine, saved in zip(self.schedulers, state["schedulers"], strict=True):
            mine.load_state_dict(saved)
        self.run.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        runtime.restore_device_generator(self.run.device, state["device_rng"])
        self.epoch, self.steps_done = state["epoch"], state["steps_done"]
        self.totals.copy_(totals[distributed.rank()])
        self.seconds = state["seconds"]
        self.history, self.best, self.wandb_id = state["history"], state["best"], state["wandb_id"]

    def save_last(self) -> None:
        """Write checkpoint_last.pth. Raises UserError, the file untouched, where the weights have diverged."""
        if not self._is_finite():
            self._diverged()
        state = self.training_state(distributed.all_ranks(self.totals))
        if distributed.is_writer():
            self._write_last(self.checkpoint(self.epoch, self.latest_metrics(), training=state))

    def _write_last(self, content: dict[str, Any]) -> None:
        self.run.check_folder()
        checkpoints.save(self.run.folder / LAST, content)
        self.saved = (self.epoch, self.steps_done)

    def _is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    def save_best(self) -> None:
        """Write best_model.pth from the best weights kept in memory, which checkpoint_last.pth holds too."""
        if distributed.is_writer() and self.best:
            self.run.check_folder()
            checkpoints.save(self.run.folder / BEST, self._best_content())

    def _best_content(self) -> dict[str, Any]:
        return self.checkpoint(self.best["epoch"], self.best["metrics"], state_dict=self.best["state_dict"])

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> None:
        run = self.run
        if run.resumed:
            self.resume(run.resumed)
        if run.resumes_its_own_folder():
            self.saved = (self.epoch, self.steps_done)
        else:
            run.make_room()
            self.save_last()  # from here on the run can be resumed
        if run.resumed and self.epoch == run.args.epochs:
            run.say(f"{run.resumed.path}: this run is finished, all {self.epoch} epochs of it.")
            return
        if run.resumed:
            run.say(f"Resuming {run.resumed.path} at epoch {self.epoch + 1}, after its step {self.steps_done}.")
            threads, now = run.resumed.raw["training"].get("threads"), torch.get_num_threads()
            if run.device.type == "cpu" and threads not in (None, now):
                run.say(f"It ran on --threads {threads} and now runs on {now}: not the same bits any more.")
        tracker = WandbRun(
            run.args.wandb if distributed.is_writer() else "disabled",
            run.folder,
            name=f"{run.args.arch}-{run.kind}-seed{run.args.seed}",
            config=plain_options(run.args),
            run_id=self.wandb_id,
            epochs=run.args.epochs,
            say=run.say,
        )
        status, patience = 1, 3.0
        try:
            while self.epoch < run.args.epochs:
                self.train_epoch()
                tracker.log(self.finish_epoch(), self.latent_weights if run.kind == "latent" else None)
                self._stop_where_asked()
            status, patience = 0, END_PATIENCE
        except Interrupted as stop:
            status = stop.exit_status
            raise
        finally:
            tracker.finish(status, patience, self.summary())

    def latent_weights(self) -> Tensor:
        """All of them, (n,)."""
        return torch.cat([layer.weight.detach().reshape(-1) for _, layer in weight_layers(self.model)])

    def summary(self) -> dict[str, float]:
        """What Weights & Biases shows of the whole run."""
        if not self.history:
            return {}
        accuracy = f"{self.chosen_on}_accuracy"
        found = {f"best_{accuracy}": self.best["metrics"][accuracy], f"final_{accuracy}": self.history[-1][accuracy]}
        if self.run.kind == "latent":
            found["one_bit_bytes"] = math.ceil(len(self.latent_weights()) / 8)  # of the signs alone
        return found

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
            for images, labels in itertools.islice(self.loader.epoch(self.epoch), self.steps_done, None):
                loss, logits = self._step(images, labels)
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

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.step(images, labels)
        except ValueError:  # BC names a weight that is NaN before any loss shows it
            if not self._is_finite():
                self._diverged()
            raise

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
            bar_format="{desc} |{bar}|",
            dynamic_ncols=True,
        )

    def _show(self, bar: tqdm) -> None:
        loss, accuracy, count = self._means(self.totals)
        if not math.isfinite(loss):
            self._diverged()
        self._speed = count * distributed.world_size() / max(self.seconds, 1e-9)
        bar.set_description_str(
            f"epoch {self.epoch + 1}/{self.run.args.epochs}  loss {loss:.3f}  acc {accuracy:.1f}%  "
            f"{self._speed:,.0f} images/s  {self._time_left()} left"
        )

    @staticmethod
    def _means(totals: Tensor) -> tuple[float, float, float]:
        loss, correct, count = totals.tolist()
        return loss / max(count, 1), 100 * correct / max(count, 1), count

    def _time_left(self) -> str:
        steps = self.loader.steps_per_epoch
        left = (self.run.args.epochs - self.epoch) * steps - self.steps_done
        training = left * self.seconds / max(self.steps_done, 1)
        return tqdm.format_interval(training + (self.run.args.epochs - len(self.history)) * self.scoring_seconds)

    def _diverged(self) -> None:
        run = self.run
        first = run.resumed.path if run.resumed else getattr(run.args, "init", None)
        files = [str(path) for path in (first, getattr(run.args, "teacher", None)) if path]
        began = f", in a run that began with {' and '.join(files)}" if files else ""  # one of them may be the cause
        raise UserError(
            f"the loss or a weight became NaN or infinite in epoch {self.epoch + 1}{began}; {run.folder / LAST} "
            "still holds the last good state; start anew with smaller learning rates"
        )

    def _stop_where_asked(self) -> None:
        signum = distributed.any_rank(self.signals.signum)
        if signum:
            self.save_last()
            raise Interrupted(signum)

    def finish_epoch(self) -> dict[str, float]:
        """Score the network after an epoch's last step, write the run's files, and go on to the next epoch."""
        loss, accuracy, count = self._means(distributed.sum_over_ranks(self.totals))
        row = {"epoch": self.epoch + 1, "train_loss": loss, "train_accuracy": accuracy}
        started = time.perf_counter()
        scores = self._score_stoppably()
        self.scoring_seconds = time.perf_counter() - started
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
        return row

    def _score_stoppably(self) -> Scores:
        """Score the network; a signal meanwhile saves the state after the epoch's last step and acts at once."""
        if not self._is_finite():
            self._diverged()
        try:
            if distributed.world_size() > 1:  # the processes must leave together: see `_stop_where_asked`
                return self.score(self.chosen_on)
            # Of now: an interrupted scoring may leave binary weights in the network.
            weights = checkpoints.plain_state(self.model.state_dict(), copy=True)
            state = self.training_state(distributed.all_ranks(self.totals))
            before = self.checkpoint(self.epoch, self.latest_metrics(), state_dict=weights, training=state)
            try:
                self.signals.act_at_once()
                scores = self.score(self.chosen_on)
                self.signals.at_once = False
                return scores
            except Interrupted:
                self._write_last(before)
                raise
        except ValueError:  # the outputs are NaN though each weight is finite
            self._diverged()

    def _named_groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield group.get("name", "lr"), group

    def _epoch_line(self, row: dict[str, float], left: str) -> str:
        """At most 80 columns. Images/s stand in metrics.csv and, on a terminal, in the bar."""
        where, epochs = self.chosen_on, self.run.args.epochs
        flips = f"  flips {row['flipped']:.1f}%" if "flipped" in row else ""
        return (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.1f}%  {where} {row[f'{where}_accuracy']:.2f}%{flips}  {left} left"
        )

    def write_records(self, *, always: bool = False) -> None:
        if not distributed.is_writer() or not self.history:
            return
        self.run.check_folder()
        write_metrics(self.run.folder, self.history)
        if always or time.perf_counter() - self._curves_drawn > _CURVES_SECONDS:
            how = "full precision" if self.run.kind == "float" else "BinaryConnect, scored with binary weights"
            draw_curves(self.run.folder, self.history, f"{self.run.args.arch}, {how}")
            self._curves_drawn = time.perf_counter()

    def farewell(self) -> str:
        """What to say after a signal."""
        last = self.run.folder / LAST
        if self.saved is None or not last.exists():
            return "Stopped before the first step; nothing was saved."
        self.write_records(always=True)
        epochs, steps = self.saved
        return (
            f"Stopped. {last} holds {epochs} of {self.run.args.epochs} epochs and {steps} of "
            f"{self.loader.steps_per_epoch} steps. Go on with: {self.run.resume_command()}"
        )

    # -- the end -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Score the final and the best epoch on the test set, and write what is not there yet."""
        run = self.run
        self.signals.act_at_once()  # all that follows can be done again from checkpoint_last.pth
        if distributed.is_writer():
            self._write_where_it_differs(BEST, self._best_content())
            self._write_where_it_differs(FINAL, self.checkpoint(self.epoch, self.latest_metrics()))
        self.write_records(always=True)
        final = self._score_at_the_end()
        run.say(f"\nFinal epoch ({self.epoch}), {FINAL}, on {final.images:,} test images:")
        run.say(final.accuracy_line())
        how = (
            "on the test set itself, so this figure is optimistic"
            if self.chosen_on == "test"
            else "on held-out images"
        )
        run.say(f"Best epoch ({self.best['epoch']}), {BEST}, chosen {how}:")
        self.model.load_state_dict(self.best["state_dict"])
        run.say(self._score_at_the_end().accuracy_line())

    def _score_at_the_end(self) -> Scores:
        try:
            return self.score("test")
        except ValueError as error:  # of weights that a file has brought: training would have stopped before
            raise UserError(f"{self.run.folder / LAST}: {reason(error)}; the weights in it are of no use") from error

    def _write_where_it_differs(self, name: str, content: dict[str, Any]) -> None:
        """A file that is missing, damaged, or left by an epoch that a resumed run has done again."""
        path = self.run.folder / name
        try:
            found, _ = checkpoints.read(path)
            same = isinstance(found, dict) and found.get("checksum") == checkpoints.digest(content)
        except UserError:
            same = False
        if not same:
            self.run.check_folder()
            checkpoints.save(path, content)


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

    model: the bare network, whose state_dict is saved; its weights are what the optimizers change.
    step: (images, labels) -> (loss, logits); does everything one step of training does, schedule apart.
    score: the name of a split, "val" or "test", -> what the network scores on it.
    chosen_on: the split on which the best epoch is chosen.
    watch: measures that need a whole epoch. about: further entries for the checkpoints.
    Raises Interrupted after Ctrl-C or SIGTERM, with everything saved; UserError where the loss is not finite.
    """
    trainer = Trainer(run, model, optimizers, loader, step, score, chosen_on, watch, about or {})
    try:
        with trainer.signals:
            trainer.train()
            trainer.finish()
    except Interrupted as stop:
        stop.message = trainer.farewell()
        raise
