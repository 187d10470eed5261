"""Two processes under torchrun (gloo, CPU) against one that does the work of both."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import one_line, resume_options
from script_server import ScriptServer
from torch import Tensor
from torch.nn import functional as F

import cifar10
import main
import main_binary
from engine import checkpoints
from engine.checkpoints import LAST
from engine.cli import as_typed
from engine.files import FolderLock
from engine.training.schedule import make_scheduler, warmup_steps
from models import BC, build
from models.quantizers import stochastic_sign

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Four steps an epoch: of three batches every process has 32 images, of the last 25, and one image is left out.
OPTIONS = ["--epochs", "2", "--batch-size", "64", "--limit-train", "243", "--seed", "3"]
OPTIONS += ["--precision", "float32", "--no-compile", "--wandb", "disabled"]
BINARY_OPTIONS = [*OPTIONS, "--stochastic"]


def command(script: str, folder: Path, data: Path, *options: str) -> list[str]:
    driver = str(ROOT / "tests" / "on_each_rank.py")
    return [*TORCHRUN, driver, str(folder), script, "--data-dir", str(data), "--output-dir", str(folder), *options]


def launch(script: str, folder: Path, data: Path, environment: dict[str, str], *options: str) -> str:
    """Run to the end under torchrun; what the writer printed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(script, folder, data, *options), env=environment, capture_output=True, encoding="utf-8", timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def float_run(
    tmp_path_factory: pytest.TempPathFactory, small_data: Path, child_environment: dict[str, str]
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("float")
    return folder, launch("main.py", folder, small_data, child_environment, *OPTIONS)


@pytest.fixture(scope="module")
def binary_run(
    tmp_path_factory: pytest.TempPathFactory, small_data: Path, child_environment: dict[str, str]
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("binary")
    return folder, launch("main_binary.py", folder, small_data, child_environment, *BINARY_OPTIONS)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


class OneProcess:
    """What two processes should do, done by one: the two halves of every batch after each other, each with BatchNorm
    statistics of its own, and the mean of their gradients."""

    def __init__(self, script: object, data: Path, options: list[str]) -> None:
        self.args = script.make_parser().parse_args(["--data-dir", str(data), *options])
        train = cifar10.load(data, limit_train=self.args.limit_train).train
        self.loaders = [
            cifar10.TrainLoader(train, self.args.batch_size, seed=self.args.seed, rank=rank, world_size=2)
            for rank in (0, 1)
        ]
        torch.manual_seed(self.args.seed)
        self.model = build(self.args.arch).to(memory_format=torch.channels_last)
        self.statistics = [{k: v.clone() for k, v in self.model.named_buffers()} for _ in (0, 1)]
        self.loss_sum = torch.zeros(())

    def train(self, optimizers: list, before: Callable[[], None], after: Callable[[], None], scale: float) -> None:
        """before and after: what surrounds the two backward passes; the steps of the optimizers come in between."""
        epochs, steps = self.args.epochs, self.loaders[0].steps_per_epoch
        warmup = warmup_steps(epochs, self.args.warmup_epochs, steps)
        schedulers = [make_scheduler(optimizer, epochs * steps, warmup) for optimizer in optimizers]
        for epoch in range(epochs):
            self.loss_sum.zero_()
            for halves in zip(*(loader.epoch(epoch) for loader in self.loaders), strict=True):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                before()
                for own, (images, labels) in zip(self.statistics, halves, strict=True):
                    self._swap(own)
                    logits = scale * self.model(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing)
                    (loss / 2).backward()  # the second gradient is added to the first
                    self.loss_sum += loss.detach() * len(labels)
                    self._swap(own)
                after()
                for scheduler in schedulers:
                    scheduler.step()

    @torch.no_grad()
    def _swap(self, own: dict[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            mine = own[name].clone()
            own[name].copy_(buffer)
            buffer.copy_(mine)


@pytest.fixture
def one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_against(reference: OneProcess, folder: Path) -> None:
    """The writer's final weights and BatchNorm statistics, and the reduced training loss."""
    saved = load(folder / "final_model.pth")["state_dict"]
    expected = dict(reference.model.named_parameters()) | reference.statistics[0]
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            saved[name], value.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[-1]["train_loss"]) == pytest.approx(float(reference.loss_sum) / 242, rel=1e-4)
    assert float(rows[-1]["test_images"]) == 100


@pytest.mark.usefixtures("one_thread")
def test_full_precision_equals_one_process(float_run: tuple[Path, str], small_data: Path) -> None:
    reference = OneProcess(main, small_data, OPTIONS)
    args = reference.args
    optimizer = torch.optim.SGD(
        reference.model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    reference.train([optimizer], before=lambda: None, after=lambda: optimizer.step(), scale=1.0)
    check_against(reference, float_run[0])


@pytest.mark.usefixtures("one_thread")
def test_binaryconnect_equals_one_process(binary_run: tuple[Path, str], small_data: Path) -> None:
    reference = OneProcess(main_binary, small_data, BINARY_OPTIONS)
    reference.args.latent_lr = main_binary.LATENT_OPTIMIZERS["muon"][1]
    bc = BC(reference.model, quantizer=stochastic_sign)
    bc.clip()
    optimizers = main_binary.make_optimizers(reference.args, bc)

    def step_on_latent_weights() -> None:
        bc.restore()
        for optimizer in optimizers:
            optimizer.step()
        bc.clip()

    reference.train(optimizers, bc.binarization, step_on_latent_weights, reference.args.logit_scale)
    check_against(reference, binary_run[0])


def test_ranks_are_bit_identical(float_run: tuple[Path, str], binary_run: tuple[Path, str]) -> None:
    for folder, steps in ((float_run[0], 0), (binary_run[0], 2 * 4)):
        first, second = (load(folder / f"rank{rank}.pth") for rank in (0, 1))
        assert len(first["signs"]) == steps == len(set(first["signs"]))  # drawn anew at each step
        assert first["signs"] == second["signs"]
        assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_only_the_writer_prints(float_run: tuple[Path, str], binary_run: tuple[Path, str]) -> None:
    for _, output in (float_run, binary_run):
        lines = [line for line in output.splitlines() if line]
        for start in ("Note:", "resnet20:", "machine:", "epoch 1/2", "epoch 2/2", "Final epoch"):
            assert sum(line.startswith(start) for line in lines) == 1, output
        assert output.count("Test Accuracy:") == 2
        assert "2 processes" in output


@pytest.mark.parametrize("name", ["final_model.pth", "best_model.pth"])
def test_printed_scores_are_those_of_the_saved_file(name: str, float_run: tuple[Path, str], small_data: Path) -> None:
    """Both shards are scored with the writer's BatchNorm statistics, those in the file."""
    folder, output = float_run
    saved = load(folder / name)
    model = build("resnet20").to(memory_format=torch.channels_last)
    model.load_state_dict(saved["state_dict"])
    images = cifar10.load(small_data, train=False).test
    with torch.no_grad():
        logits = model.eval()(cifar10.normalize(images.images))
    accuracy = 100 * float((logits.argmax(1) == images.labels).float().mean())
    assert re.search(rf"{re.escape(name)}.*\n+Test Accuracy: ([0-9.]+)%", output)[1] == f"{accuracy:.2f}"
    assert saved["metrics"]["test_loss"] == pytest.approx(float(F.cross_entropy(logits, images.labels)), rel=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_stop_and_resume(
    signum: signal.Signals,
    tmp_path: Path,
    binary_run: tuple[Path, str],
    small_data: Path,
    child_environment: dict[str, str],
    scripts: ScriptServer,
) -> None:
    """A signal to torchrun ends both processes; resumed, nothing shows that it happened."""
    process = subprocess.Popen(
        command("main_binary.py", tmp_path, small_data, *BINARY_OPTIONS),
        env=child_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            break
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    go_on = f"Go on with: torchrun --nproc_per_node=2 {as_typed(ROOT / 'main_binary.py')} --resume"
    assert errors.count(go_on) == 1, errors
    assert load(tmp_path / LAST)["epoch"] == 1

    alone = scripts.run("main_binary.py", *resume_options(small_data), cwd=tmp_path, expect=2)
    assert f"{LAST}: is a run of 2 processes" in one_line(alone.errors)

    output = launch("main_binary.py", tmp_path, small_data, child_environment, "--resume", "--wandb", "disabled")
    assert output.count("Resuming") == 1
    resumed, straight = (load(folder / "final_model.pth") for folder in (tmp_path, binary_run[0]))
    assert all(torch.equal(value, straight["state_dict"][name]) for name, value in resumed["state_dict"].items())
    assert resumed["metrics"]["train_loss"] == straight["metrics"]["train_loss"]


def test_an_error_in_one_process_ends_all(
    tmp_path: Path, small_data: Path, child_environment: dict[str, str]
) -> None:
    """Within a minute, with the line that says why; the others may say something too."""
    started = time.monotonic()
    with FolderLock(tmp_path):  # only the writer asks for it
        done = subprocess.run(
            command("main.py", tmp_path, small_data, *OPTIONS),
            env=child_environment,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
    assert done.returncode != 0
    assert re.search(rf"^Error: {re.escape(str(tmp_path))}: ", done.stderr, re.MULTILINE), done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_the_others(
    signum: signal.Signals, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """One of two processes is started, alone: nothing is there to be saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), "--wandb", "disabled"],
        cwd=tmp_path,
        env=child_environment
        | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 120
        while True:  # the store listens: the process waits
            with socket.socket() as caller:
                if caller.connect_ex(("localhost", port)) == 0:
                    break
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signum)
        assert process.wait(timeout=10) == -signum
    finally:
        process.kill()
        process.communicate()


def test_the_end_of_one_process_ends_all(tmp_path: Path, small_data: Path, child_environment: dict[str, str]) -> None:
    """As when the system, out of memory, has killed it. What is saved stays good."""
    process = subprocess.Popen(
        command("main.py", tmp_path, small_data, *OPTIONS[2:], "--epochs", "500"),
        env=child_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert any(line.startswith("epoch") for line in process.stdout)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
        (second,) = (child for child, environment in environments.items() if b"\0RANK=1\0" in environment)
        os.kill(second, signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert checkpoints.load(tmp_path / LAST).epoch >= 1
