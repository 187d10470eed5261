"""The loop that both trainings share: epochs, progress, scoring, saving, resuming.

A script makes a `Run` (run.py), builds its network and optimizers, and gives `fit` the function that does one
step. The step itself is in the script.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from engine import checkpoints, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import Interrupted, UserError, reason
from engine.evaluate import Scores, evaluate
from engine.training import distributed
from engine.training.run import Run, plain_options
from engine.training.schedule import repeat_steps, warmup_steps, warmup_then_cosine
from engine.training.state import check_best, check_form, check_history, in_own_memory, state_after_a_step
from engine.training.tracking import END_PATIENCE, WandbRun, draw_curves, write_metrics
from models import weight_layers

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (images, labels) -> (loss, logits)
_LOOK_SECONDS = 0.5  # how often the numbers are fetched from the device for the progress bar
_CURVES_SECONDS = 60.0  # drawing takes about a second: not at the end of every short epoch


class Loader(Protocol):
    """The training batches of one process: see cifar10.TrainLoader."""

    steps_per_epoch: int
    labels: Tensor  # of all the images, in file order

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class EvaluationData(Protocol):
    """The images to score on: see cifar10.Data."""

    def count(self, split: str) -> int: ...

    def batches(self, split: str, device: torch.device, rank: int, world_size: int) -> Iterator: ...


class EpochMeter(Protocol):
    """Something that measures a whole epoch: see tracking.FlipRateMeter."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...


class Trainer:
    """Runs the epochs of one run and keeps its files. Use through `fit`."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizers: list[Optimizer],
        loader: Loader,
        step: Step,
        score: Callable[[str], Scores],
        chosen_on: str,
        meter: EpochMeter | None,
        extra: dict[str, Any],
    ) -> None:
        self.run, self.model, self.optimizers, self.loader = run, model, optimizers, loader
        self.step, self.score, self.chosen_on, self.meter, self.extra = step, score, chosen_on, meter, extra
        self.forms = [state_after_a_step(optimizer) for optimizer in optimizers]
        epochs, steps = run.args.epochs, loader.steps_per_epoch
        warmup = warmup_steps(epochs, run.args.warmup_epochs, steps)
        if not run.resumed and warmup != round(run.args.warmup_epochs * steps):
            short = f"--epochs {epochs} is that short"
            run.print_once(f"Warm-up shortened to one fifth of the run, {warmup} steps: {short}.")
        self.schedulers = [warmup_then_cosine(optimizer, epochs * steps, warmup) for optimizer in optimizers]
        self.epoch = 0  # finished epochs
        self.owns_folder = run.resumes_its_own_folder()  # checkpoint_last.pth there, if any, is this run's
        self.totals = torch.zeros(3, device=run.device)  # sum of loss, correct, images: of the epoch under way
        self.steps_done, self.seconds = 0, 0.0  # of the epoch under way
        self.scoring_seconds = 0.0  # of the last epoch
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.wandb_id = uuid.uuid4().hex[:8]
        self._curves_drawn = time.perf_counter()

    # -- state ---------------------------------------------------------------------------------------------

    def checkpoint(self, epoch: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
        """The dictionary of a checkpoint with the weights of now; `more` adds or overrides entries."""
        config, versions = plain_options(self.run.args), checkpoints.library_versions()
        entries = self.extra | {"config": config, "versions": versions} | more
        state = self.model.state_dict()
        return checkpoints.make(self.run.args.arch, self.run.kind, state, epoch=epoch, metrics=metrics, **entries)

    def best_checkpoint(self) -> dict[str, Any]:
        return self.checkpoint(self.best["epoch"], self.best["metrics"], state_dict=self.best["state_dict"])

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights. Schedules are functions of the step: they need no state."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generators": runtime.generator_states(self.run.device),
            "processes": distributed.world_size(),
            "threads": torch.get_num_threads(),
            "labels": checkpoints.digest(self.loader.labels),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "wandb_id": self.wandb_id,
        }

    def resume(self, resumed: checkpoints.Checkpoint) -> None:
        """Take up the state that a checkpoint holds. Raises UserError where it does not fit this run."""
        expected = self.training_state()  # outside of the try: its failure is not the file's fault
        try:
            self._load_training_state(resumed, expected)
        except (LookupError, ArithmeticError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{resumed.path}: its training state does not fit: {reason(error)}") from error

    def _load_training_state(self, resumed: checkpoints.Checkpoint, expected: dict[str, Any]) -> None:
        state = resumed.raw["training"]
        if state["labels"] != expected["labels"]:
            raise UserError(f"{resumed.path}: was run on other training images than --data-dir holds; use the same")
        if state["processes"] != expected["processes"]:
            raise UserError(
                f"{resumed.path}: is a run of {state['processes']} processes, resumed by {expected['processes']}; "
                "start as many"
            )
        history, best = state["history"], state["best"]
        check_history(history, state["epoch"], self.run.args.epochs, {"epoch", f"{self.chosen_on}_accuracy"})
        check_best(best, history, self.model.state_dict())
        for name in ("threads", "wandb_id"):
            check_form(state[name], expected[name], name)
        kinds = {"cpu", *(expected["generators"].keys() & state["generators"])}  # it may go on on another device
        generators = {kind: state["generators"][kind] for kind in kinds}
        check_form(generators, {kind: expected["generators"][kind] for kind in kinds}, "generators")

        repeat_steps(self.schedulers, state["epoch"] * self.loader.steps_per_epoch)
        for saved, form, mine in zip(state["optimizers"], self.forms, self.optimizers, strict=True):
            check_form(saved["state"], form["state"], "optimizers")
            check_form(saved["param_groups"], mine.state_dict()["param_groups"], "optimizers", equal=True)
            mine.load_state_dict(in_own_memory(saved, mine))
        self.model.load_state_dict(resumed.state_dict)
        runtime.restore_generators(generators)
        self.epoch, self.history, self.best = state["epoch"], history, best
        self.wandb_id = state["wandb_id"]
        if self.run.device.type == "cpu" and state["threads"] != expected["threads"]:
            before, now = state["threads"], expected["threads"]
            self.run.print_once(f"It ran on --threads {before} and now runs on {now}: not the same bits any more.")

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the run's checkpoints, in the writing process."""
        if distributed.is_writer():
            self.run.check_folder()
            checkpoints.save(self.run.folder / name, content)

    def _check_finite(self) -> None:
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise self.diverged()

    def diverged(self) -> UserError:
        run = self.run
        first = run.resumed.path if run.resumed else getattr(run.args, "init", None)
        files = [str(path) for path in (first, run.args.teacher) if path]
        began = f", in a run that began with {' and '.join(files)}" if files else ""  # one of them may be the cause
        saved = f"{run.folder / LAST} still holds the last good epoch; " if self.epoch else ""
        return UserError(
            f"the loss or a weight became NaN or infinite in epoch {self.epoch + 1}{began}; {saved}"
            "start anew with smaller learning rates"
        )

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> None:
        run = self.run
        if run.resumed:
            self.resume(run.resumed)
        if not run.resumes_its_own_folder():
            run.archive_previous_run()
            self.owns_folder = True
        if run.resumed:
            self.save(LAST, self.checkpoint(self.epoch, self.history[-1], training=self.training_state()))
            self.save(BEST, self.best_checkpoint())  # a kill may have left that of an epoch that is done again
            if self.epoch == run.args.epochs:
                run.print_once(f"{run.resumed.path}: this run is finished, all {self.epoch} epochs of it.")
                return
            run.print_once(f"Resuming {run.resumed.path} at epoch {self.epoch + 1}.")
        tracker = WandbRun(
            run.args.wandb if distributed.is_writer() else "disabled",
            run.folder,
            epochs=run.args.epochs,
            name=f"{run.args.arch}-{run.kind}-seed{run.args.seed}",
            config=plain_options(run.args),
            run_id=self.wandb_id,
            say=run.print_once,
        )
        status, patience = 1, 3.0
        try:
            while self.epoch < run.args.epochs:
                self.train_epoch()
                self.finish_epoch()
                tracker.log(self.history[-1], self.latent_weights if run.kind == "latent" else None)
            status, patience = 0, END_PATIENCE
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
        self.totals.zero_()
        self.steps_done = 0
        if self.meter:
            self.meter.begin()
        self.model.train()
        started = looked = time.perf_counter()
        steps = self.loader.steps_per_epoch
        with self._bar() as bar:
            for images, labels in self.loader.epoch(self.epoch):
                loss, logits = self._step(images, labels)
                for scheduler in self.schedulers:
                    scheduler.step()
                self._count(loss.detach(), logits, labels)
                self.steps_done += 1
                bar.update()
                now = time.perf_counter()
                self.seconds = now - started
                if now - looked > _LOOK_SECONDS or self.steps_done == steps:
                    looked = now
                    self._show(bar)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.step(images, labels)
        except ValueError:  # BC refuses a weight that is NaN, which a finite loss may have left behind
            self._check_finite()
            raise

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self.diverged()  # elsewhere reading the loss would stall the device: `_show` looks at it
        count = len(labels)
        correct = (logits.argmax(1) == labels).sum()
        self.totals += torch.stack([loss.float() * count, correct.float(), correct.new_tensor(count).float()])

    def finish_epoch(self) -> None:
        """Score the network after an epoch's last step and write the run's files."""
        loss, accuracy, count = _means(distributed.sum_over_ranks(self.totals))
        self._check_finite()
        started = time.perf_counter()
        scores = self._score(self.chosen_on)
        self.scoring_seconds = time.perf_counter() - started
        row = {"epoch": self.epoch + 1, "train_loss": loss, "train_accuracy": accuracy}
        row[f"{self.chosen_on}_loss"] = scores.loss
        row[f"{self.chosen_on}_accuracy"] = scores.accuracy
        row[f"{self.chosen_on}_images"] = scores.images
        row |= {
            group.get("name", "lr"): group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups
        }
        row |= self.meter.end() if self.meter else {}
        row |= {"seconds": self.seconds, "images_per_second": count / max(self.seconds, 1e-9)}
        improved = not self.best or scores.accuracy > self.best["metrics"][f"{self.chosen_on}_accuracy"]
        if improved:
            state = checkpoints.plain_state(self.model.state_dict(), copy=True)
            self.best = {"epoch": self.epoch + 1, "metrics": row, "state_dict": state}
        self.history.append(row)
        self.epoch, self.steps_done = self.epoch + 1, 0
        self.save(LAST, self.checkpoint(self.epoch, row, training=self.training_state()))
        if improved:
            self.save(BEST, self.best_checkpoint())
        self.write_records()
        self.run.print_once(self._epoch_line(row))

    def _score(self, split: str) -> Scores:
        try:
            return self.score(split)
        except ValueError as error:  # the outputs are NaN though each weight is finite
            raise self.diverged() from error

    def write_records(self, *, always: bool = False) -> None:
        """Write metrics.csv and, now and then or `always`, training_curves.png."""
        if not distributed.is_writer():
            return
        self.run.check_folder()
        write_metrics(self.run.folder, self.history)
        if always or time.perf_counter() - self._curves_drawn > _CURVES_SECONDS:
            how = "full precision" if self.run.kind == "float" else "BinaryConnect, scored with binary weights"
            draw_curves(self.run.folder, self.history, f"{self.run.args.arch}, {how}")
            self._curves_drawn = time.perf_counter()

    def finish(self) -> None:
        """Score the final and the best epoch on the test set, and write what is not there yet."""
        run = self.run
        self.save(FINAL, self.checkpoint(self.epoch, self.history[-1]))
        self.write_records(always=True)
        final = self._score("test")
        run.print_once(f"\nFinal epoch ({self.epoch}), {FINAL}, on {final.images:,} test images:")
        run.print_once(final.accuracy_line())
        how = (
            "on the test set itself, so this figure is optimistic"
            if self.chosen_on == "test"
            else "on held-out images"
        )
        run.print_once(f"Best epoch ({self.best['epoch']}), {BEST}, chosen {how}:")
        self.model.load_state_dict(self.best["state_dict"])
        run.print_once(self._score("test").accuracy_line())
        script = "eval.py" if run.kind == "float" else "eval_binarized.py"
        run.print_once(f"\nNext: {run.command(script, run.folder / BEST, places=('data_dir',))}")

    def interrupt_message(self) -> str:
        """What to say after a signal: what is saved, and what to type."""
        last = self.run.folder / LAST
        if self.owns_folder and last.exists():
            epoch = checkpoints.load(last).epoch  # a signal may come just after it was written
            saved = f"{last} holds {epoch} of {self.run.args.epochs} epochs"
            return f"Stopped. {saved}. Go on with: {self.run.resume_command()}"
        if self.run.resumed:
            return "Stopped before the first step: nothing was saved; start again with the same command."
        return "Stopped in the first epoch: nothing is saved yet; start again without --resume."

    # -- what is shown -------------------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.loader.steps_per_epoch,
            desc=f"epoch {self.epoch + 1}/{self.run.args.epochs}",
            leave=False,
            disable=not (sys.stderr.isatty() and distributed.is_writer()),
            bar_format="{desc} |{bar}|",
            dynamic_ncols=True,
        )

    def _show(self, bar: tqdm) -> None:
        loss, accuracy, count = _means(self.totals)
        if not math.isfinite(loss):
            raise self.diverged()
        speed = count * distributed.world_size() / max(self.seconds, 1e-9)
        bar.set_description_str(
            f"epoch {self.epoch + 1}/{self.run.args.epochs}  loss {loss:.3f}  acc {accuracy:.1f}%  "
            f"{speed:,.0f} images/s  {self._time_left()} left"
        )

    def _time_left(self) -> str:
        per_epoch = self.seconds * self.loader.steps_per_epoch / self.steps_done if self.steps_done else self.seconds
        left = (self.run.args.epochs - self.epoch) * (per_epoch + self.scoring_seconds)
        return tqdm.format_interval(left - self.seconds if self.steps_done else left)

    def _epoch_line(self, row: dict[str, float]) -> str:
        """At most 80 columns. Images/s stand in metrics.csv and, on a terminal, in the bar."""
        where, epochs = self.chosen_on, self.run.args.epochs
        flips = f"  flips {row['flipped']:.1f}%" if "flipped" in row else ""
        return (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.1f}%  {where} {row[f'{where}_accuracy']:.2f}%{flips}  "
            f"{self._time_left()} left"
        )


def _means(totals: Tensor) -> tuple[float, float, float]:
    loss, correct, count = totals.tolist()
    return loss / max(count, 1), 100 * correct / max(count, 1), count


def fit(
    run: Run,
    model: nn.Module,
    optimizers: list[Optimizer],
    loader: Loader,
    data: EvaluationData,
    step: Step,
    *,
    scoring: Callable[[], AbstractContextManager] = nullcontext,
    logit_scale: float = 1.0,
    meter: EpochMeter | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Train `model` with `step` for the run's epochs, with everything around it, and print how it ended.

    model: the bare network, whose state_dict is saved; its weights are what the optimizers change.
    step: (images, labels) -> (loss, logits); does everything one step of training does, schedule apart.
    data: the best epoch is chosen on its split "val", or on "test" where there is none.
    scoring: the context in which the network is scored, for example with its weights binarized.
    meter: measures a whole epoch. extra: further entries for the checkpoints.
    Raises UserError where the loss is not finite; after Ctrl-C or SIGTERM Interrupted, which says what is saved.
    """

    def score(split: str) -> Scores:
        batches = data.batches(split, run.device, distributed.rank(), distributed.world_size())
        with scoring():
            return evaluate(model, batches, data.count(split), logit_scale=logit_scale, progress="scoring")

    chosen_on = "val" if data.count("val") else "test"
    trainer = Trainer(run, model, optimizers, loader, step, score, chosen_on, meter, extra or {})
    try:
        trainer.train()
        trainer.finish()
    except Interrupted as stop:
        stop.message = trainer.interrupt_message() if distributed.is_writer() else ""
        raise
