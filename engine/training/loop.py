"""The loop that both trainings share: epochs, progress, scoring, saving, resuming.

A script makes a `Run` (run.py), builds its network and optimizers, and gives `Trainer` the function of one step.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from engine import checkpoints, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import Interrupted, UserError, reason
from engine.evaluate import Scores, evaluate
from engine.report import counted
from engine.training import distributed
from engine.training.curves import draw_curves
from engine.training.run import Run, plain_options
from engine.training.schedule import make_scheduler, repeat_steps, warmup_steps
from engine.training.state import check_best, check_form, check_history, in_own_memory, state_after_a_step
from engine.training.tracking import FlipRateMeter, write_metrics
from engine.training.wandb_run import WandbRun
from models import weight_layers
from models.quantizers import SIGN_QUANTIZERS

if TYPE_CHECKING:
    from cifar10 import Data, TrainLoader

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (images, labels) -> (loss, logits)
_LOOK_SECONDS = 0.5  # how often the numbers are fetched from the device for the progress bar
_CURVES_SECONDS = 60.0  # drawing takes about a second: not at the end of every short epoch


def _mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


@dataclass(eq=False)
class Trainer:
    """One training: `Trainer(...).fit()` trains `model` with `step`, with everything around it."""

    run: Run
    model: nn.Module  # the bare network, whose state_dict is saved; its weights are what the optimizers change
    optimizers: list[Optimizer]
    loader: TrainLoader
    data: Data  # the best epoch is chosen on its split "val", or on "test" where there is none
    step: Step  # everything that one training step does, except for the schedule
    scoring: Callable[[], AbstractContextManager] = nullcontext  # the network is scored in it: binarized, for example
    logit_scale: float = 1.0
    meter: FlipRateMeter | None = None  # measures a whole epoch
    extra: dict[str, Any] = field(default_factory=dict)  # further entries of the checkpoints

    def __post_init__(self) -> None:
        run, steps = self.run, self.loader.steps_per_epoch
        self.chosen_on = "val" if self.data.count("val") else "test"
        # What a saved state must look like, to refuse others.
        self.forms = [state_after_a_step(optimizer) for optimizer in self.optimizers]
        self.warmup, total = warmup_steps(run.args.epochs, run.args.warmup_epochs, steps), run.args.epochs * steps
        self.schedulers = [make_scheduler(optimizer, total, self.warmup) for optimizer in self.optimizers]
        self.epoch = 0  # finished epochs
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.wandb_id = uuid.uuid4().hex[:8]
        self.owns_folder = run.resumes_its_own_folder()  # checkpoint_last.pth there, if any, is this run's
        self._curves_drawn = time.perf_counter()

    # -- state ---------------------------------------------------------------------------------------------

    def checkpoint(self, epoch: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
        """The dictionary of a checkpoint with the weights of now; `more` adds or overrides entries."""
        config, versions = plain_options(self.run.args), checkpoints.library_versions()
        entries = self.extra | {"config": config, "versions": versions} | more
        state = self.model.state_dict()
        return checkpoints.make(self.run.args.arch, self.run.kind, state, epoch=epoch, metrics=metrics, **entries)

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
        if not isinstance(state["generators"], dict) or not isinstance(state["optimizers"], list):
            raise TypeError("generators or optimizers of another type")  # torch warns where a tensor is taken for one
        if state["labels"] != expected["labels"]:
            raise UserError(f"{resumed.path}: was run on other training images than --data-dir holds; use the same")
        before, now = state["processes"], expected["processes"]
        if before != now:
            raise UserError(f"{resumed.path}: is a run of {before} processes, resumed by {now}; start as many")
        before, now = resumed.quantizer, self.extra.get("quantizer", resumed.quantizer)
        if before != now:
            raise UserError(f"{resumed.path}: was run with the quantizer {before!r}, but the script now has {now!r}")
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
        self.epoch, self.history, self.best, self.wandb_id = state["epoch"], history, best, state["wandb_id"]
        before, now = state["threads"], expected["threads"]
        if self.run.device.type == "cpu" and before != now:
            self.run.print_once(f"It ran on --threads {before} and now runs on {now}: not the same bits any more.")
        before, now = _mode(resumed.config["compile"]), _mode(self.run.args.compile)
        if before != now:
            self.run.print_once(f"It ran {before} and now runs {now}: not the same bits any more.")

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the run's checkpoints, in the writing process."""
        if distributed.is_writer():
            self.run.check_folder()
            checkpoints.save(self.run.folder / name, content)

    def save_last(self) -> None:
        self.save(LAST, self.checkpoint(self.epoch, self.history[-1], training=self.training_state()))

    def save_best(self) -> None:
        best = self.best
        self.save(BEST, self.checkpoint(best["epoch"], best["metrics"], state_dict=best["state_dict"]))

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

    def fit(self) -> None:
        """Train for the run's epochs, keep its files, and print how it ended.

        Raises UserError where the loss is not finite; after Ctrl-C or SIGTERM Interrupted, which says what is saved.
        """
        self.describe()
        try:
            self.train()
            self.finish()
        except Interrupted as stop:
            stop.message = self.interrupt_message() if distributed.is_writer() else ""
            raise

    def describe(self) -> None:
        """Print the head of the run: the network, the data, the machine."""
        run, args = self.run, self.run.args
        total = sum(p.numel() for p in self.model.parameters())
        weights = sum(layer.weight.numel() for _, layer in weight_layers(self.model))
        quantized = f", {weights:,} of them {self.weights_in_words}" if run.kind == "latent" else ""
        run.print_once(f"{args.arch}: {total:,} parameters{quantized}")
        run.print_once(f"data: {len(self.data.train):,} training images, scored on {self.data.scored_on}")
        schedule = f"{counted(args.epochs, 'epoch')} of batches of {args.batch_size}, seed {args.seed}"
        run.print_once(f"run: {schedule}, into {run.folder}/")
        processes = distributed.world_size()
        several = f", {processes} processes" if processes > 1 else ""
        mode = f"{args.precision}, {_mode(args.compile)}"
        run.print_once(f"machine: {runtime.describe(run.device)}{several}, {mode}")
        if runtime.may_be_emulated(args.precision, run.device):
            run.print_once("Note: neither AMX nor AVX-512 BF16 found: bfloat16 may be emulated, many times slower.")
        if not run.resumed and self.warmup != round(args.warmup_epochs * self.loader.steps_per_epoch):
            short = f"--epochs {args.epochs} is that short"
            run.print_once(f"Warm-up shortened to one fifth of the run, {self.warmup} steps: {short}.")

    def train(self) -> None:
        run = self.run
        if run.resumed:
            self.resume(run.resumed)
        if not self.owns_folder:
            run.archive_previous_run()
            self.owns_folder = True
        if run.resumed:
            self.save_last()
            self.save_best()  # a kill may have left that of an epoch that is done again
            if self.epoch == run.args.epochs:
                run.print_once(f"{run.resumed.path}: this run is finished, all {self.epoch} epochs of it.")
                return
            run.print_once(f"Resuming {run.resumed.path} at epoch {self.epoch + 1}.")
        wandb_run = WandbRun(
            run.args.wandb if distributed.is_writer() else "disabled",
            run.folder,
            run.args.epochs,
            run.print_once,
            name=f"{run.args.arch}-{run.kind}-seed{run.args.seed}",
            config=plain_options(run.args),
            id=self.wandb_id,
        )
        exit_code = 1
        try:
            while self.epoch < run.args.epochs:
                self.finish_epoch(*self.train_epoch())
                wandb_run.log(self.history[-1], self.latent_weights if run.kind == "latent" else None)
            exit_code = 0
        finally:
            wandb_run.finish(exit_code, self.summary())

    @property
    def weights_in_words(self) -> str:
        """What the latent weights are in the forward pass: "binary", or the name of another quantizer."""
        name = self.extra.get("quantizer")
        return "binary" if name in SIGN_QUANTIZERS else str(name)

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

    def train_epoch(self) -> tuple[Tensor, float]:
        """All steps of an epoch. Returns this process's sums of loss, correct and images, (3,), and the seconds."""
        if self.meter:
            self.meter.begin()
        self.model.train()
        totals = torch.zeros(3, device=self.run.device)
        started = looked = time.perf_counter()
        with self._bar() as bar:
            for images, labels in self.loader.epoch(self.epoch):
                loss, logits = self._step(images, labels)
                for scheduler in self.schedulers:
                    scheduler.step()
                totals[0] += loss.detach().float() * len(labels)
                totals[1] += (logits.argmax(1) == labels).sum()
                totals[2] += len(labels)
                bar.update(len(labels) * distributed.world_size())  # the other processes go as fast
                if time.perf_counter() - looked > _LOOK_SECONDS:
                    looked = time.perf_counter()
                    mean, accuracy, _ = self._means(totals)
                    bar.set_description_str(f"{self._position()}  loss {mean:.3f}  acc {accuracy:.1f}%")
        return totals.cpu(), time.perf_counter() - started  # the time when the device is done

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.step(images, labels)
        except ValueError:  # BC refuses a weight that is NaN, which a finite loss may have left behind
            self._check_finite()
            raise

    def _means(self, totals: Tensor) -> tuple[float, float, float]:
        """Loss, accuracy in per cent, number of images. Raises UserError where the loss is not finite."""
        loss, correct, count = totals.tolist()
        if not math.isfinite(loss):
            raise self.diverged()
        return loss / max(count, 1), 100 * correct / max(count, 1), count

    def _bar(self) -> tqdm:
        return tqdm(
            total=len(self.loader.labels),
            desc=self._position(),
            unit=" images",
            leave=False,
            disable=not (sys.stderr.isatty() and distributed.is_writer()),
            bar_format="{desc}  {rate_noinv_fmt}  {remaining} left |{bar}|",
            dynamic_ncols=True,
        )

    def _position(self) -> str:
        return f"epoch {self.epoch + 1}/{self.run.args.epochs}"

    def finish_epoch(self, totals: Tensor, seconds: float) -> None:
        """Score the network after an epoch's last step and write the run's files."""
        loss, accuracy, count = self._means(distributed.sum_over_ranks(totals))
        self._check_finite()
        scores, on = self._score(self.chosen_on), self.chosen_on
        row = {"epoch": self.epoch + 1, "train_loss": loss, "train_accuracy": accuracy}
        row |= {f"{on}_loss": scores.loss, f"{on}_accuracy": scores.accuracy, f"{on}_images": scores.images}
        row |= {
            group.get("name", "lr"): group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups
        }
        row |= self.meter.end() if self.meter else {}
        row |= {"seconds": seconds, "images_per_second": count / max(seconds, 1e-9)}
        improved = not self.best or scores.accuracy > self.best["metrics"][f"{on}_accuracy"]
        if improved:
            state = checkpoints.plain_state(self.model.state_dict(), copy=True)
            self.best = {"epoch": self.epoch + 1, "metrics": row, "state_dict": state}
        self.history.append(row)
        self.epoch += 1
        self.save_last()
        if improved:
            self.save_best()
        self.write_records()
        self.run.print_once(self._epoch_line(row, (self.run.args.epochs - self.epoch) * (seconds + scores.seconds)))

    def _score(self, split: str) -> Scores:
        data, run = self.data, self.run
        batches = data.batches(split, run.device, rank=distributed.rank(), world_size=distributed.world_size())
        try:
            with self.scoring():
                return evaluate(
                    self.model, batches, data.count(split), logit_scale=self.logit_scale, progress="scoring"
                )
        except ValueError as error:  # the outputs are NaN though each weight is finite
            raise self.diverged() from error

    def _epoch_line(self, row: dict[str, float], seconds_left: float) -> str:
        """At most 80 columns. Images/s stand in metrics.csv and, on a terminal, in the bar."""
        on, epochs = self.chosen_on, self.run.args.epochs
        flips = f"  flips {row['flipped']:.1f}%" if "flipped" in row else ""
        return (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.1f}%  {on} {row[f'{on}_accuracy']:.2f}%{flips}  "
            f"{tqdm.format_interval(seconds_left)} left"
        )

    def write_records(self, *, always: bool = False) -> None:
        """Write metrics.csv and, now and then or `always`, training_curves.png."""
        if not distributed.is_writer():
            return
        self.run.check_folder()
        write_metrics(self.run.folder, self.history)
        if always or time.perf_counter() - self._curves_drawn > _CURVES_SECONDS:
            latent = f"BinaryConnect, scored with {self.weights_in_words} weights"
            how = "full precision" if self.run.kind == "float" else latent
            draw_curves(self.run.folder, self.history, f"{self.run.args.arch}, {how}")
            self._curves_drawn = time.perf_counter()

    def finish(self) -> None:
        """Score the final and the best epoch on the test set, and write what is not there yet."""
        run, on_test = self.run, self.chosen_on == "test"
        self.save(FINAL, self.checkpoint(self.epoch, self.history[-1]))
        self.write_records(always=True)
        final = self._score("test")
        run.print_once(f"\nFinal epoch ({self.epoch}), {FINAL}, on {final.images:,} test images:")
        run.print_once(final.accuracy_line())
        how = "on the test set itself, so this figure is optimistic" if on_test else "on held-out images"
        run.print_once(f"Best epoch ({self.best['epoch']}), {BEST}, chosen {how}:")
        self.model.load_state_dict(self.best["state_dict"])
        run.print_once(self._score("test").accuracy_line())
        if run.kind == "float":
            script, places = "eval.py", ("data_dir",)
        elif self.weights_in_words == "binary":
            script, places = "eval_binarized.py", ("data_dir",)
        else:  # no script quantizes as another quantizer does
            script, places = "analyze_binary_weights.py", ()
        run.print_once(f"\nNext: {run.command(script, run.folder / BEST, places=places)}")

    def interrupt_message(self) -> str:
        """What to say after a signal: what is saved, and what to type."""
        last = self.run.folder / LAST
        if self.owns_folder and last.exists():
            epoch = checkpoints.load(last).epoch  # a signal may come just after it was written
            saved = f"{last} holds {epoch} of {counted(self.run.args.epochs, 'epoch')}"
            return f"Stopped. {saved}. Go on with: {self.run.resume_command()}"
        if self.run.resumed:
            return "Stopped before the first step: nothing was saved; start again with the same command."
        return "Stopped in the first epoch: nothing is saved yet; start again without --resume."
