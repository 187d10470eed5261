"""Training: exact, resumable, refusing what cannot be, and shown on any terminal."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import assert_all_load, differences, essence, small_options
from script_server import ScriptServer

import cifar10
import main
import main_binary
from engine import checkpoints, cli, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import UserError
from engine.evaluate import evaluate
from engine.training import loop as training
from engine.training import run as run_module
from engine.training.loop import Trainer
from engine.training.state import _check_optimizer, moments_in_own_memory
from models import BC, build
from models.binaryconnect import binarize_model

ROOT = Path(__file__).resolve().parent.parent


def one_line(errors: str) -> str:
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture(scope="module")
def float_run(scripts: ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of main.py. Not to be written to."""
    folder = tmp_path_factory.mktemp("float")
    scripts.run("main.py", *small_options(small_data), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def binary_run(scripts: ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of main_binary.py, with `output` in it. Not to be written to."""
    folder = tmp_path_factory.mktemp("binary")
    child = scripts.run("main_binary.py", *small_options(small_data), cwd=folder)
    assert child.errors == ""
    (folder / "output").write_text(child.output)
    return folder


# -- exact -------------------------------------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_bit_identical(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path
) -> None:
    """And another seed gives another network."""
    scripts.run("main_binary.py", *small_options(small_data), "--output-dir", tmp_path / "same", cwd=tmp_path)
    assert differences(essence(tmp_path / "same"), essence(binary_run)) == []
    other = small_options(small_data, epochs=1)
    scripts.run("main_binary.py", *other, "--seed", 1, "--output-dir", tmp_path / "other", cwd=tmp_path)
    assert differences(essence(tmp_path / "other")[FINAL]["state_dict"], essence(binary_run)[FINAL]["state_dict"])


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("main_binary.py", ["--stochastic", "--val-size", 10, "--optimizer", "sgd", "--latent-lr", 3]),
        ("main_binary.py", ["--teacher", "teacher.pth", "--latent-weight-decay", 0.001]),
        ("main_binary.py", ["--latent-decay-power", 6]),
        ("main.py", ["--val-size", 20, "--weight-decay", 0.01]),
    ],
    ids=["stochastic", "teacher", "power", "float"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path, script: str, more: list[object]
) -> None:
    """Stopped within an epoch, between two, and while the second is scored."""
    shutil.copy(float_run / BEST, tmp_path / "teacher.pth")
    whole = [*small_options(small_data), *more]
    scripts.run(script, *whole, "--output-dir", "whole", cwd=tmp_path)
    step = "main.distributed.gradient_share"
    options = whole
    for at in [
        (step, 3, "SIGINT"),
        ("engine.training.loop.write_metrics", 1, "SIGTERM"),
        ("torch.bincount", 1, "SIGINT"),
    ]:
        status = 130 if at[2] == "SIGINT" else 143
        scripts.run(script, *options, "--output-dir", "parts", cwd=tmp_path, at=at, expect=status)
        options = ["--resume", "--data-dir", small_data, "--wandb", "disabled"]
    scripts.run(script, *options, "--output-dir", "parts", cwd=tmp_path)
    assert differences(essence(tmp_path / "parts"), essence(tmp_path / "whole")) == []
    epochs = [int(row["epoch"]) for row in essence(tmp_path / "parts")["metrics.csv"]]
    assert epochs == [1, 2, 3]


def test_the_command_to_go_on_names_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--data-dir", ".", "--output-dir", "a b", "--device", "cpu", "--wandb", "offline", "--epochs", "7"]
    monkeypatch.setattr(sys, "argv", ["main.py", *given])
    args, names = run_module.parse(main.make_parser())
    run = run_module.Run(args, torch.device("cpu"), args.output_dir, "float", None, None, given=frozenset(names))
    places = '--output-dir "a b" --data-dir . --device cpu --wandb offline'
    assert run.resume_command() == f"python3 main.py --resume {places}"
    for script in ("../my scripts/main.py", "bc(1)/main.py"):
        monkeypatch.setattr(sys, "argv", [script])
        assert run.resume_command() == f'python3 "{script}" --resume {places}'


@pytest.mark.parametrize(
    ("options", "moment"),
    [(["--resume"], "engine.training.loop.check_training_state"), (["--epochs", 9], "engine.training.run.set_aside")],
)
def test_a_stop_before_the_first_step_says_nothing_of_older_files(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path, options: list[object], moment: str
) -> None:
    shutil.copytree(float_run, tmp_path, dirs_exist_ok=True)
    places = ["--data-dir", small_data, "--wandb", "disabled"]
    child = scripts.run("main.py", *options, *places, cwd=tmp_path, at=(moment, 1, "SIGINT"), expect=130)
    assert child.errors == "Stopped before the first step; nothing was saved.\n"
    assert differences(essence(tmp_path), essence(float_run)) == []


def test_another_number_of_threads_is_no_secret(scripts: ScriptServer, small_data: Path, tmp_path: Path) -> None:
    at = ("main.distributed.gradient_share", 3, "SIGINT")
    options = [*small_options(small_data), "--threads", 1]
    child = scripts.run("main.py", *options, cwd=tmp_path, at=at, expect=130)
    script, data = cli.as_typed(ROOT / "main.py"), cli.as_typed(small_data)
    go_on = f"Go on with: python3 {script} --resume --data-dir {data} --threads 1 --wandb disabled"
    assert child.errors.splitlines()[-1].endswith(go_on)
    options = ["--resume", "--data-dir", small_data, "--wandb", "disabled", "--threads"]
    same = scripts.run("main.py", *options, 1, cwd=tmp_path, at=at, expect=130)
    assert "same bits" not in same.output
    other = scripts.run("main.py", *options, 2, cwd=tmp_path)
    assert "It ran on --threads 1 and now runs on 2: not the same bits any more.\n" in other.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--epochs", 5], ("--epochs 5", "--epochs 3")),
        (["--lr", 0.2], ("--lr 0.2", "--lr 0.1")),
        (["--seed", 7], ("--seed 7", "--seed 0")),
        (["--arch", "resnet32"], ("--arch resnet32", "--arch resnet20")),
        (["--limit-train", 20], ("--limit-train 20", "--limit-train 30")),
        (["--val-size", 10], ("--val-size 10", "--val-size 0")),
        (["--stochastic"], ("--stochastic", "no --stochastic")),
        (["--compile"], ("--compile", "no --compile")),
        (["--teacher", "x.pth"], ("--teacher x.pth", "no --teacher")),
        (["--batch-size", 16, "--epochs", 3], ("--batch-size 16", "--batch-size 8")),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_an_option_that_contradicts_the_checkpoint(
    scripts: ScriptServer, tmp_path: Path, binary_run: Path, given: list[object], expected: tuple[str, str]
) -> None:
    shutil.copy(binary_run / LAST, tmp_path)
    child = scripts.run("main_binary.py", "--resume", "--data-dir", "none", *given, cwd=tmp_path, expect=2)
    assert f"{expected[0]} contradicts {LAST}, which was run with {expected[1]};" in one_line(child.errors)


def test_options_that_say_the_same_again_are_welcome(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path
) -> None:
    """Also the precision that `auto` became; and a finished run says so and writes what is missing."""
    shutil.copytree(binary_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / BEST).unlink()
    (tmp_path / FINAL).write_bytes((tmp_path / FINAL).read_bytes()[:-1000])
    (tmp_path / "metrics.csv").unlink()
    precision = checkpoints.load(tmp_path / LAST).raw["training"]["precision"]
    options = [*small_options(small_data), "--resume", "--precision", precision]
    child = scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert f"{LAST}: this run is finished, all 3 epochs of it." in child.output
    assert not re.search(r"^epoch ", child.output, re.MULTILINE)
    assert child.output.count("Test Accuracy: ") == 2
    assert differences(essence(tmp_path), essence(binary_run)) == []
    assert not list(tmp_path.glob("previous-*"))


def test_a_run_is_resumed_by_the_script_that_began_it(
    scripts: ScriptServer, tmp_path: Path, float_run: Path, binary_run: Path
) -> None:
    cases = [("main.py", binary_run, "main_binary.py"), ("main_binary.py", float_run, "main.py")]
    for script, folder, right in cases:
        options = ["--resume", folder / LAST, "--data-dir", "none"]
        child = scripts.run(script, *options, cwd=tmp_path, expect=2)
        assert one_line(child.errors).endswith(f"it is a run of {right}; resume it with that")
    child = scripts.run("main.py", "--resume", float_run / BEST, cwd=tmp_path, expect=2)
    assert "holds weights but no training state" in one_line(child.errors)
    child = scripts.run("main.py", "--resume", "--output-dir", "nowhere", cwd=tmp_path, expect=2)
    assert one_line(child.errors) == f"Error: --resume: there is no nowhere/{LAST}; start without --resume"
    assert not (tmp_path / "nowhere").exists()


def test_resuming_a_checkpoint_of_another_folder(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path, binary_run: Path
) -> None:
    """It goes on here; what an earlier run has left here is moved aside, not taken for its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = [*small_options(small_data), "--output-dir", first]
    at = ("models.binaryconnect.BC.clip", 7, "SIGINT")
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=at, expect=130)
    shutil.copytree(float_run, second)
    options = ["--resume", first / LAST, "--output-dir", second, "--data-dir", small_data, "--wandb", "disabled"]
    child = scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert f"The files of the previous run were moved to {second / 'previous-1'}." in child.output
    assert differences(essence(second), essence(binary_run)) == []
    assert differences(essence(second / "previous-1"), essence(float_run)) == []


def test_resuming_on_other_data(scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path) -> None:
    import data_files

    data_files.write_binary(tmp_path / "other" / "cifar-10-batches-bin", seed=5)
    shutil.copy(binary_run / LAST, tmp_path)
    child = scripts.run("main_binary.py", "--resume", "--data-dir", "other", cwd=tmp_path, expect=2)
    assert one_line(child.errors).startswith(f"Error: {LAST}: was run on other training images")


def test_the_teacher_is_known_by_its_content(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path
) -> None:
    """Also when it lay among the files that the new run has moved aside, and when it has moved since."""
    shutil.copytree(float_run, tmp_path, dirs_exist_ok=True)
    options = [*small_options(small_data), "--teacher", BEST]
    at = ("models.binaryconnect.BC.clip", 2, "SIGINT")
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=at, expect=130)
    options = ["--resume", "--data-dir", small_data, "--wandb", "disabled"]
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=at, expect=130)
    (tmp_path / "previous-1").rename(tmp_path / "kept")
    child = scripts.run("main_binary.py", *options, cwd=tmp_path, expect=2)
    assert "previous-1/best_model.pth: no such file" in one_line(child.errors)
    child = scripts.run("main_binary.py", *options, "--teacher", "kept/final_model.pth", cwd=tmp_path, expect=2)
    assert "not the file that checkpoint_last.pth was run with" in one_line(child.errors)
    scripts.run("main_binary.py", *options, "--teacher", "kept/best_model.pth", cwd=tmp_path)


# -- what is computed --------------------------------------------------------------------------------------------


def run_here(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    """A script in this process, where its parts can be watched."""
    arguments = [*map(str, options), "--output-dir", str(folder), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()


def test_latent_weights_stay_within_one(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After every step, that of the short last batch too; --init weights far outside come in as well."""
    wild = {key: value * 50 for key, value in main.build("resnet20").state_dict().items()}
    checkpoints.save(tmp_path / "wild.pth", checkpoints.make("resnet20", "float", wild))
    largest = []
    count = training.Trainer._count

    def watching(self: training.Trainer, *args: Any) -> None:
        largest.append(max(float(w.abs().max()) for w in BC(self.model).latent_weights()))
        count(self, *args)

    monkeypatch.setattr(training.Trainer, "_count", watching)
    options = [*small_options(small_data, epochs=2), "--init", tmp_path / "wild.pth", "--latent-lr", 0.5]
    run_here(main_binary, tmp_path, monkeypatch, *options)
    assert len(largest) == 8
    assert max(largest) == 1
    for name in (BEST, FINAL, LAST):
        saved = checkpoints.load(tmp_path / name)
        assert saved.kind == "latent"
        assert max(float(w.abs().max()) for w in BC(saved.model()).latent_weights()) <= 1


@pytest.mark.parametrize("val_size", [0, 20])
def test_the_best_epoch_is_chosen_on_binarized_weights(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path, val_size: int
) -> None:
    folder = binary_run
    if val_size:
        folder = tmp_path
        scripts.run("main_binary.py", *small_options(small_data), "--val-size", val_size, cwd=folder)
    data = cifar10.load(small_data, val_size=val_size, limit_train=30, limit_test=20)
    where, split = ("val", data.val) if val_size else ("test", data.test)
    history = checkpoints.load(folder / LAST).raw["training"]["history"]
    best, final = checkpoints.load(folder / BEST), checkpoints.load(folder / FINAL)
    accuracies = [row[f"{where}_accuracy"] for row in history]
    assert best.epoch == 1 + accuracies.index(max(accuracies))
    assert final.epoch == 3
    for saved in (best, final):
        model = saved.model().to(memory_format=torch.channels_last)
        binarize_model(model)
        scores = evaluate(model, cifar10.eval_batches(split, 500), len(split))
        assert scores.accuracy == saved.metrics[f"{where}_accuracy"] == accuracies[saved.epoch - 1]
        assert scores.images == saved.metrics[f"{where}_images"] == 20


def test_the_end_reports_both_epochs(binary_run: Path, small_data: Path) -> None:
    output = (binary_run / "output").read_text()
    best = checkpoints.load(binary_run / BEST)
    final = checkpoints.load(binary_run / FINAL)
    assert output.split("\n\n")[-1].splitlines() == [
        f"Final epoch (3), {FINAL}, on 20 test images:",
        f"Test Accuracy: {final.metrics['test_accuracy']:.2f}%",
        f"Best epoch ({best.epoch}), {BEST}, chosen on the test set itself, so this figure is optimistic:",
        f"Test Accuracy: {best.metrics['test_accuracy']:.2f}%",
    ]


def test_the_resolved_configuration_is_saved(binary_run: Path) -> None:
    wanted = {
        **{"arch": "resnet20", "epochs": 3, "lr": 0.1, "weight_decay": 0.0001, "label_smoothing": 0.1},
        **{"warmup_epochs": 1.0, "seed": 0, "batch_size": 8, "val_size": 0, "limit_train": 30, "limit_test": 20},
        **{"compile": False, "precision": "auto", "stochastic": False, "init": None, "teacher": None},
    }
    for name in (BEST, FINAL, LAST):
        saved = checkpoints.load(binary_run / name)
        assert wanted.items() <= saved.config.items()
        assert not {"data_dir", "output_dir", "resume", "debug"} & saved.config.keys()
        assert saved.logit_scale == saved.config["logit_scale"]
        assert saved.raw["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("power", [None, 1.0, 6.0])
@pytest.mark.parametrize(("epochs", "warmup"), [(10, 2.0), (3, 0.5), (4, 0.0)])
def test_the_learning_rate_follows_the_closed_form(epochs: int, warmup: float, power: float | None) -> None:
    """At every step: linear to the peak, then half a cosine, or a power of what is left, to zero."""
    peak, per_epoch = 0.3, 7
    rates, lines = _rates(epochs, warmup, peak, per_epoch, power)
    rising, total = round(warmup * per_epoch), epochs * per_epoch
    for step, rate in enumerate(rates):
        if step < rising:
            wanted = peak * (1 + step) / (1 + rising)
        elif power is None:
            wanted = peak * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        else:
            wanted = peak * ((total - step) / (total - rising)) ** power
        assert rate == pytest.approx(wanted, rel=1e-9, abs=1e-12 if power is None else 0), step
    assert rates[rising] == pytest.approx(peak)
    assert lines == []


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_power_is_for_the_latent_weights_alone(optimizer: str) -> None:
    given = f"--optimizer {optimizer} --latent-decay-power 3 --epochs 4 --warmup-epochs 0 --lr 0.8 --latent-lr 0.8"
    args = main_binary.make_parser().parse_args(given.split())
    optimizers = main_binary.make_optimizers(args, BC(build("resnet20")))
    schedulers = training.make_schedulers(SimpleNamespace(args=args, say=print, resumed=None), optimizers, 1)
    for scheduler, falling in zip(schedulers, optimizers, strict=True):
        falling.step()
        falling.step()
        scheduler.step()
        scheduler.step()
    latent, others = (falling.param_groups[0]["lr"] for falling in optimizers)
    assert latent == pytest.approx(0.1)  # half of the way: 0.8 / 2^3
    assert others == pytest.approx(0.4)


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 5.0), (1, 5.0), (3, 1e308)])
def test_a_warm_up_too_long_for_the_run_is_shortened(epochs: int, warmup: float) -> None:
    rates, lines = _rates(epochs, warmup, 0.3, 10)
    fifth = 2 * epochs
    assert max(range(len(rates)), key=rates.__getitem__) == fifth
    assert lines == [f"Warm-up shortened to one fifth of the run, {fifth} steps: --epochs {epochs} is that short."]
    assert _rates(epochs, warmup, 0.3, 10, resumed=True) == (rates, [])  # said once, not at each resumption


def _rates(
    epochs: int, warmup: float, peak: float, per_epoch: int, power: float | None = None, *, resumed: bool = False
) -> tuple[list[float], list[str]]:
    lines: list[str] = []
    args = argparse.Namespace(epochs=epochs, warmup_epochs=warmup)
    run = SimpleNamespace(args=args, say=lines.append, resumed=resumed)
    group = {"params": [torch.nn.Parameter(torch.zeros(1))]}
    optimizer = torch.optim.SGD([group if power is None else group | {"decay_power": power}], lr=peak)
    (scheduler,) = training.make_schedulers(run, [optimizer], per_epoch)
    rates = []
    for _ in range(epochs * per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates, lines


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("main.py", ["--lr", 1e30]),
        ("main_binary.py", ["--lr", 1e30]),
        ("main_binary.py", ["--optimizer", "sgd", "--latent-lr", 1e30, "--lr", 1e30, "--logit-scale", 1e6]),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, script: str, options: list[object]
) -> None:
    child = scripts.run(script, *small_options(small_data), *options, cwd=tmp_path, expect=2)
    assert re.match(
        rf"Error: the loss or a weight became NaN or infinite in epoch \d; {LAST} still holds the last good state;",
        one_line(child.errors),
    )
    assert assert_all_load(tmp_path) >= 1


@pytest.mark.parametrize("how", ["signal", "epoch"])
def test_weights_that_are_nan_are_never_saved(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Neither by Ctrl-C in the step that spoils them, while the loss is still finite, nor at an epoch's end."""
    count, steps = training.Trainer._count, []

    def spoiling(self: training.Trainer, *args: Any) -> None:
        count(self, *args)
        steps.append(1)
        if len(steps) == (6 if how == "signal" else 8):
            next(self.model.parameters()).data[0] = math.nan
            if how == "signal":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "_count", spoiling)
    with pytest.raises(UserError, match="still holds the last good state"):
        run_here(main, tmp_path, monkeypatch, *small_options(small_data))
    assert assert_all_load(tmp_path) == 2
    assert checkpoints.load(tmp_path / LAST).epoch == 1


# -- options -----------------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    *(["--epochs", 0], ["--epochs", "many"], ["--epochs", 10**12], ["--batch-size", -1], ["--batch-size", 2.5]),
    *(["--limit-train", 1], ["--limit-test", 0], ["--lr", "nan"], ["--lr", -1], ["--lr", "inf"]),
    *(["--weight-decay", -1], ["--label-smoothing", 2], ["--warmup-epochs", -1], ["--seed", -1], ["--seed", 2**80]),
    *(["--val-size", -1], ["--val-size", 50_000], ["--threads", 0], ["--threads", 10**6], ["--device", "nonsense"]),
    *(["--device", "meta"], ["--device", "cuda:99"], ["--arch", "resnet18"], ["--wandb", "maybe"]),
    *(["--precision", "float16", "--device", "cpu"], ["--precision", "int8"], ["--resume", "none.pth"]),
    *(["--output-dir", "/proc/none"], ["--nonsense"], ["--epoch", 3], ["surplus"]),
]
IMPOSSIBLE_BINARY = [
    *(["--latent-lr", "nan"], ["--latent-weight-decay", -1], ["--logit-scale", 0], ["--optimizer", "lbfgs"]),
    *(["--latent-decay-power", 0], ["--latent-decay-power", 1e9]),
    *(
        ["--temperature", 0],
        ["--temperature", 1e200],
        ["--teacher-weight", 1.5],
        ["--init", "none.pth"],
        ["--teacher", "none.pth"],
    ),
    *(["--init", "small.pth", "--arch", "resnet32"], ["--teacher", "latent.pth"], ["--init", "."]),
    *(["--teacher", "empty.pth"], ["--init", "text.pth"]),
]


def test_impossible_options_are_refused_before_any_data_is_fetched(
    scripts: ScriptServer, tmp_path: Path, float_run: Path, binary_run: Path
) -> None:
    shutil.copy(float_run / FINAL, tmp_path / "small.pth")
    shutil.copy(binary_run / FINAL, tmp_path / "latent.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("weights")
    cases = [(script, case) for script in ("main.py", "main_binary.py") for case in IMPOSSIBLE]
    cases += [("main_binary.py", case) for case in IMPOSSIBLE_BINARY]
    never = ("cifar10.load", 1, "SIGKILL")
    for script, case in cases:
        child = scripts.start(script, *case, "--data-dir", "none", cwd=tmp_path, at=never)
        assert child.wait() == 2, (case, child.output, child.errors)
        line = one_line(child.errors)
        named = "unrecognized arguments: surplus" if case == ["surplus"] else str(case[0])
        assert named in line or str(case[1]) in line, (case, line)
        assert child.output == ""


@pytest.mark.parametrize("module", [main, main_binary])
def test_help_names_every_option_with_its_default(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = module.make_parser()
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    described = " ".join(text[text.index("\noptions:") :].split())
    for action in parser._actions:
        option = action.option_strings[-1]
        assert option in described
        own = described[described.index(f" {action.option_strings[0]}") + 1 :]
        own = re.split(r" (?=--[a-z]|-h)", own, maxsplit=len(action.option_strings))[: len(action.option_strings)]
        if action.default is not None and not isinstance(action.default, bool | Path) and action.dest != "help":
            assert f"(default: {action.default})" in " ".join(own), option
    wanted = (
        "--arch --epochs --batch-size --lr --weight-decay --label-smoothing --warmup-epochs --seed --device "
        "--threads --compile --no-compile --data-dir --output-dir --val-size --limit-train --limit-test --resume "
        "--wandb"
    )
    if module is main_binary:
        wanted += (
            " --optimizer --latent-lr --latent-decay-power --latent-weight-decay --logit-scale --stochastic --init "
            "--teacher"
        )
    assert all(f" {option}" in described for option in wanted.split())


# -- what is shown -----------------------------------------------------------------------------------------------


def test_without_a_terminal_an_epoch_is_one_plain_line(binary_run: Path) -> None:
    lines = (binary_run / "output").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    number = r"\d+\.\d"
    for index, line in enumerate(epochs, 1):
        shares = rf"train {number}%  test {number}+%  flips {number}%"
        assert re.fullmatch(rf"epoch {index}/3  loss {number}+  {shares}  00:\d\d left", line)
    assert len(epochs) == 3
    assert len(lines) < 16
    assert all(len(line) <= 80 or "optimistic" in line or "Note" in line or "data:" in line for line in lines)


def test_the_longest_epoch_line_fits_80_columns() -> None:
    row = {"epoch": 1, "train_loss": 2.3456, "train_accuracy": 10.0, "test_accuracy": 100.0, "flipped": 12.34}
    trainer = SimpleNamespace(chosen_on="test", run=SimpleNamespace(args=SimpleNamespace(epochs=150)))
    assert len(training.Trainer._epoch_line(trainer, row, "99:59:59")) <= 80


@pytest.fixture(scope="module")
def on_a_terminal(
    child_environment: dict[str, str], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What the real command writes on a terminal of 80 columns that is ASCII only, with PYTHONOPTIMIZE=1, its folders
    having names with a space and with letters that are not ASCII."""
    folder = tmp_path_factory.mktemp("terminal") / "zwei Wörter"
    shutil.copytree(small_data, folder / "dåta")
    outer, inner = pty.openpty()
    import fcntl
    import termios

    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    options = small_options(Path("dåta"), epochs=2)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main_binary.py"), *map(str, options), "--output-dir", "ergebnis é"],
        env=child_environment | {"PYTHONOPTIMIZE": "1", "PYTHONIOENCODING": "ascii"},
        cwd=folder,
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    written = b""
    while True:
        try:
            part = os.read(outer, 65536)
        except OSError:  # the other side has been closed
            break
        if not part:
            break
        written += part
    os.close(outer)
    assert process.wait(400) == 0, written
    assert assert_all_load(folder / "ergebnis é") == 3
    return written.decode("ascii")


def test_on_a_terminal_an_epoch_has_a_bar(on_a_terminal: str) -> None:
    states = [state for state in re.split(r"[\r\n]|\x1b\[A", on_a_terminal) if "|" in state]
    assert all(len(state) <= 80 for state in states)
    last = [state for state in states if "loss" in state]
    assert {state[:9] for state in last} == {"epoch 1/2", "epoch 2/2"}
    for state in last:
        numbers = r"  loss \d+\.\d{3}  acc \d+\.\d%  [\d,]+ images/s  \d\d:\d\d left"
        assert re.fullmatch(rf"epoch \d/2{numbers} \|[#\d ]+\|", state.strip()), state


def test_a_terminal_is_left_with_one_line_an_epoch(on_a_terminal: str) -> None:
    """As the terminal shows it in the end, where a carriage return goes back to the line's beginning."""
    shown = []
    for line in on_a_terminal.replace("\r\n", "\n").split("\n"):
        text = ""
        for part in line.split("\r"):
            text = part + text[len(part) :]
        shown.append(text.rstrip())
    assert [line[:9] for line in shown if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert not any("|" in line for line in shown)
    assert any("ergebnis" in line for line in shown)


@pytest.mark.parametrize("scaled", [False, True])
def test_first_steps_may_be_left_out_where_the_loss_is_scaled_only(scaled: bool) -> None:
    """A run in float16 that is stopped after such steps has no moments, or moments of no step, and can be resumed."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(3)
    nothing = optimizer.state_dict()
    optimizer.step()
    stepped = optimizer.state_dict()
    skipped = stepped | {"state": {0: stepped["state"][0] | {"step": torch.zeros(())}}}
    _check_optimizer(stepped, optimizer, begun=True, scaled=scaled)
    for saved in (nothing, skipped):
        if scaled:
            _check_optimizer(saved, optimizer, begun=True, scaled=scaled)
        else:
            with pytest.raises(ValueError, match="optimizers"):
                _check_optimizer(saved, optimizer, begun=True, scaled=scaled)


@pytest.mark.parametrize("how", ["as saved", "in one place", "the other way round"])
def test_moments_lie_in_memory_as_their_weights_do(how: str) -> None:
    """Fused optimizers go through both side by side: another order would be other numbers, one place a crash."""
    model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.rand(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for moments in saved["state"].values():
        if how == "in one place":
            moments["exp_avg"] = torch.ones(1).expand(moments["exp_avg"].shape)
            moments["exp_avg_sq"] = moments["exp_avg"]
        elif how == "the other way round":
            moments["exp_avg"] = (
                moments["exp_avg"].mT.contiguous().mT if moments["exp_avg"].ndim > 1 else moments["exp_avg"]
            )
    made = moments_in_own_memory(saved, optimizer)
    places = set()
    for index, parameter in enumerate(model.parameters()):
        for key, value in made["state"][index].items():
            assert torch.equal(value, saved["state"][index][key])
            assert key == "step" or value.stride() == parameter.stride()
            places.add(value.data_ptr())
    assert len(places) == 6
    assert not places & {v.data_ptr() for moments in saved["state"].values() for v in moments.values()}


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytes(2**60)], ids=["torch", "python"])
def test_out_of_memory_is_one_line(allocate: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end:
            cli.run(allocate)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Error: out of memory; ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("ending", "status"), [("raise cli.UserError('wrong')", 2), ("pass", 0)])
def test_a_signal_while_the_interpreter_shuts_down(
    signum: int, ending: str, status: int, child_environment: dict[str, str]
) -> None:
    """As torchrun sends it to the others once one process has failed."""
    code = f"""
import atexit, os
from engine import cli
atexit.register(lambda: os.kill(os.getpid(), {signum:d}))
def main():
    {ending}
cli.run(main)
"""
    root = Path(main.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=child_environment, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"Error: wrong\n" if status else b"")


@pytest.mark.parametrize("name", ["main", "main_binary"])
def test_importing_a_script_does_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.reload(sys.modules[name])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")],
)
def test_precision_of_a_cpu(capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 by default where the CPU computes with it, and only there; what is asked for is given anywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities | {"avx2": True}, raising=False)
    cpu = torch.device("cpu")
    assert runtime.choose_precision("auto", cpu) == precision
    assert runtime.choose_precision("float32", cpu) == "float32"
    assert runtime.choose_precision("bfloat16", cpu) == "bfloat16"
    assert runtime.may_be_emulated("bfloat16", cpu) == (precision == "float32")
    assert not runtime.may_be_emulated("float32", cpu)


@pytest.mark.parametrize("unit", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_precision_of_a_cpu_with_torch_2_6(unit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no `get_capabilities`; these two functions it has."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == unit, raising=False)
    expected = "bfloat16" if unit else "float32"
    assert runtime.choose_precision("auto", torch.device("cpu")) == expected


def test_emulation_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = main.make_parser().parse_args([])
    for units, notes in ((False, 1), (True, 0)):
        monkeypatch.setattr(runtime, "cpu_has_bfloat16_units", lambda units=units: units)
        run = run_module.Run(args, torch.device("cpu"), Path("."), "float", None, None, precision="bfloat16")
        run.describe(build("resnet20"), 1, "1 test image")
        assert capsys.readouterr().out.count("bfloat16 may be emulated") == notes


def test_a_float16_run_is_resumed_on_cuda_only(scripts: ScriptServer, float_run: Path, tmp_path: Path) -> None:
    content = checkpoints.load(float_run / LAST).raw
    content.pop("checksum")
    content["training"]["precision"] = "float16"
    checkpoints.save(tmp_path / LAST, content)
    child = scripts.run("main.py", "--resume", "--device", "cpu", cwd=tmp_path, expect=2)
    assert f"{LAST}: was run in float16, which is for CUDA devices only" in one_line(child.errors)


def test_the_time_left_counts_scoring(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of four epochs are scored, the third is half done: 1.5 epochs of 100 s to train, two scorings of 20 s."""
    trainer = SimpleNamespace(
        run=SimpleNamespace(args=SimpleNamespace(epochs=4)),
        loader=SimpleNamespace(steps_per_epoch=10),
        **{"epoch": 2, "steps_done": 5, "seconds": 50.0, "history": [{}, {}], "scoring_seconds": 20.0},
    )
    assert Trainer._time_left(trainer) == "03:10"

    timed = []
    monkeypatch.setattr(Trainer, "_time_left", lambda trainer: timed.append(trainer.scoring_seconds) or "")
    run_here(main, tmp_path, monkeypatch, *small_options(small_data, epochs=2))
    assert timed[0] == 0  # nothing is scored yet
    assert timed[-1] > 0


def test_the_generator_of_an_apple_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.arange(44, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    mps = torch.device("mps")
    state = runtime.device_generator_state(mps)
    runtime.restore_device_generator(mps, torch.zeros(16, dtype=torch.uint8))  # of a CUDA device
    runtime.restore_device_generator(torch.device("cpu"), state)
    assert len(states) == 1
    runtime.restore_device_generator(mps, state)
    assert states == [state, state]
