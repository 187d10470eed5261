"""What a training computes, which epoch it chooses, what it saves, and what is shown on any terminal."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import assert_all_load, one_line, run_here, small_options
from script_server import ScriptServer

import cifar10
import main
import main_binary
from engine import checkpoints
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import UserError
from engine.evaluate import Scores, evaluate
from engine.training.distillation import distillation_loss
from engine.training.loop import Trainer
from engine.training.schedule import make_scheduler, repeat_steps, warmup_steps
from models import BC, build
from models.binaryconnect import binarize_model

ROOT = Path(__file__).resolve().parent.parent

# -- what is computed --------------------------------------------------------------------------------------------


def test_latent_weights_stay_within_one(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After every step, that of the short last batch too; --init weights far outside come in as well."""
    wild = {key: value * 50 for key, value in build("resnet20").state_dict().items()}
    checkpoints.save(tmp_path / "wild.pth", checkpoints.make("resnet20", "float", wild))
    largest, clip = [], BC.clip

    def watched(self: BC) -> None:
        clip(self)
        largest.append(max(float(w.abs().max()) for w in self.latent_weights()))

    monkeypatch.setattr(BC, "clip", watched)
    options = [*small_options(small_data, epochs=2), "--init", tmp_path / "wild.pth", "--latent-lr", 0.5]
    run_here(main_binary, tmp_path, monkeypatch, *options)
    assert len(largest) == 1 + 8
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
    with open(folder / "metrics.csv", newline="") as file:
        accuracies = [float(row[f"{where}_accuracy"]) for row in csv.DictReader(file)]
    best, final = checkpoints.load(folder / BEST), checkpoints.load(folder / FINAL)
    assert best.epoch == 1 + accuracies.index(max(accuracies))
    assert final.epoch == 3
    for saved in (best, final):
        model = saved.model().to(memory_format=torch.channels_last)
        binarize_model(model)
        scores = evaluate(model, cifar10.eval_batches(split, 500), len(split))
        assert scores.accuracy == saved.metrics[f"{where}_accuracy"] == accuracies[saved.epoch - 1]
        assert scores.images == saved.metrics[f"{where}_images"] == 20


def test_the_end_reports_both_epochs_and_what_is_next(binary_run: Path) -> None:
    best, final = checkpoints.load(binary_run / BEST), checkpoints.load(binary_run / FINAL)
    *_, scores, after = Path(f"{binary_run}-output").read_text().split("\n\n")
    assert scores.splitlines() == [
        f"Final epoch (3), {FINAL}, on 20 test images:",
        f"Test Accuracy: {final.metrics['test_accuracy']:.2f}%",
        f"Best epoch ({best.epoch}), {BEST}, chosen on the test set itself, so this figure is optimistic:",
        f"Test Accuracy: {best.metrics['test_accuracy']:.2f}%",
    ]
    assert re.fullmatch(rf"Next: python3 \S*eval_binarized.py {BEST} --data-dir \S+\n", after)


def test_the_resolved_configuration_is_saved(binary_run: Path) -> None:
    wanted = {
        **{"arch": "resnet20", "epochs": 3, "lr": 0.1, "weight_decay": 0.0001, "label_smoothing": 0.1},
        **{"warmup_epochs": 1.0, "seed": 0, "batch_size": 8, "val_size": 0, "limit_train": 30, "limit_test": 20},
        **{"compile": False, "optimizer": "muon", "latent_lr": 0.01, "stochastic": False, "init": None},
    }
    for name in (BEST, FINAL, LAST):
        saved = checkpoints.load(binary_run / name)
        assert wanted.items() <= saved.config.items()
        assert saved.config["precision"] in ("float32", "bfloat16")
        assert not {"data_dir", "output_dir", "resume", "debug"} & saved.config.keys()
        assert saved.logit_scale == saved.config["logit_scale"]
        assert saved.raw["versions"]["torch"] == torch.__version__


def test_a_teacher_is_learned_from() -> None:
    """Hinton et al. 2015: T^2 KL(teacher || student), in float64 from the definition; least where both agree."""
    torch.manual_seed(0)
    logits, teacher = 3 * torch.randn(2, 5, 10)
    student_p, teacher_p = ((x.double() / 4).softmax(1) for x in (logits, teacher))
    expected = 16 * (teacher_p * (teacher_p / student_p).log()).sum(1).mean()
    assert float(distillation_loss(logits, teacher, 4.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(teacher + 7, teacher, 4.0)) == pytest.approx(0, abs=1e-5)


def rates(epochs: int, warmup_epochs: float, peak: float, per_epoch: int, *, begin: int = 0) -> list[float]:
    """The rate of each step from `begin` on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    warmup = warmup_steps(epochs, warmup_epochs, per_epoch)
    scheduler = make_scheduler(optimizer, epochs * per_epoch, warmup)
    repeat_steps([scheduler], begin)
    found = []
    for _ in range(begin, epochs * per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 2.0), (3, 0.5), (4, 0.0)])
def test_the_learning_rate_follows_the_closed_form(epochs: int, warmup: float) -> None:
    """At every step: linear to the peak, then half a cosine to zero; begun anywhere it goes on with the same bits."""
    peak, per_epoch = 0.3, 7
    found = rates(epochs, warmup, peak, per_epoch)
    rising, total = round(warmup * per_epoch), epochs * per_epoch
    for step, rate in enumerate(found):
        if step < rising:
            wanted = peak * (1 + step) / (1 + rising)
        else:
            wanted = peak * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        assert rate == pytest.approx(wanted, rel=1e-9, abs=1e-12), step
    for begin in (per_epoch, 2 * per_epoch):
        assert rates(epochs, warmup, peak, per_epoch, begin=begin) == found[begin:]


def test_a_warm_up_too_long_for_the_run_is_shortened(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs, warmup in ((10, 5.0), (1, 5.0), (3, 1e308)):
        found = rates(epochs, warmup, 0.3, 10)
        assert max(range(len(found)), key=found.__getitem__) == warmup_steps(epochs, warmup, 10) == 2 * epochs
    run_here(main, tmp_path, monkeypatch, *small_options(small_data, epochs=1))
    assert capsys.readouterr().out.count("Warm-up shortened") == 1


# -- what diverges -----------------------------------------------------------------------------------------------


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
    assert "NaN or infinite" in one_line(child.errors)
    assert_all_load(tmp_path)


@pytest.mark.parametrize("script", [main, main_binary])
@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "in its last step"])
def test_weights_that_are_nan_are_never_saved(
    script: Any, step: int, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that overflows spoils them while the loss of that step is still finite."""
    models, backward, left = [], torch.Tensor.backward, [step]

    def spoiling(loss: torch.Tensor) -> None:
        backward(loss)
        left[0] -= 1
        if left[0] == 0:
            models[0].conv1.weight.grad.fill_(math.nan)

    monkeypatch.setattr(script, "build", lambda arch: models.append(build(arch)) or models[0])
    monkeypatch.setattr(torch.Tensor, "backward", spoiling)
    with pytest.raises(UserError, match=f"NaN or infinite.*{LAST}"):
        run_here(script, tmp_path, monkeypatch, *small_options(small_data))
    assert assert_all_load(tmp_path) == 2
    assert checkpoints.load(tmp_path / LAST).epoch == 1


# -- what is shown -----------------------------------------------------------------------------------------------


def test_without_a_terminal_an_epoch_is_one_plain_line(binary_run: Path) -> None:
    lines = Path(f"{binary_run}-output").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    number = r"\d+\.\d"
    for index, line in enumerate(epochs, 1):
        shares = rf"train {number}%  test {number}+%  flips {number}%"
        assert re.fullmatch(rf"epoch {index}/3  loss {number}+  {shares}  00:\d\d left", line)
    assert len(epochs) == 3
    assert len(lines) < 18
    assert all(len(line) <= 80 or re.search("optimistic|Note|data:|Next:", line) for line in lines)


def test_the_longest_epoch_line_fits_80_columns() -> None:
    row = {"epoch": 1, "train_loss": 2.3456, "train_accuracy": 10.0, "test_accuracy": 100.0, "flipped": 12.34}
    trainer = SimpleNamespace(chosen_on="test", run=SimpleNamespace(args=SimpleNamespace(epochs=150)))
    assert len(Trainer._epoch_line(trainer, row, 99 * 3600)) <= 80


def test_the_time_left_counts_scoring(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(*args: Any, **kwargs: Any) -> Scores:
        return replace(evaluate(*args, **kwargs), seconds=600.0)

    monkeypatch.setattr("engine.training.loop.evaluate", slowly)
    run_here(main, tmp_path, monkeypatch, *small_options(small_data))
    assert re.findall(r"(\S+):\d\d left", capsys.readouterr().out) == ["20", "10", "00"]


@pytest.fixture(scope="module")
def on_a_terminal(
    child_environment: dict[str, str], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What the real command writes on a terminal of 80 columns that is ASCII only, with PYTHONOPTIMIZE=1, its folders
    having names with a space and with letters that are not ASCII."""
    folder = tmp_path_factory.mktemp("terminal") / "zwei Wörter"
    shutil.copytree(small_data, folder / "dåta")
    outer, inner = pty.openpty()
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
    with contextlib.suppress(OSError):  # the other side has been closed
        while part := os.read(outer, 65536):
            written += part
    os.close(outer)
    assert process.wait(400) == 0, written
    assert assert_all_load(folder / "ergebnis é") == 3
    return written.decode("ascii")


def test_on_a_terminal_an_epoch_has_a_bar(on_a_terminal: str) -> None:
    states = [state for state in re.split(r"[\r\n]|\x1b\[A", on_a_terminal) if "|" in state]
    assert all(len(state) <= 80 for state in states)
    numbers = r"(  loss \d+\.\d{3}  acc \d+\.\d%)?  +([\d.]+|\?) images/s  (\d\d:\d\d|\?) left"
    for epoch in (1, 2):
        own = [state.strip() for state in states if state.startswith(f"epoch {epoch}/2")]
        assert own
        assert [state for state in own if not re.fullmatch(rf"epoch {epoch}/2{numbers} \|[#\d ]+\|", state)] == []


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
