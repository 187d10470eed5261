"""CUDA: the step there, resuming there, scores there (marked `cuda`); and what can be told of it without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from networks import save_checkpoint
from runs import differences, essence, one_line, resume_options, run_here, small_options
from test_resume import stop_at_step
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cifar10
import main
import main_binary
from engine import checkpoints, cli, runtime
from engine.checkpoints import BEST, FINAL
from engine.training.loop import Trainer
from models import BC, build
from models.binaryconnect import binarize_model
from models.quantizers import stochastic_sign

META = torch.device("meta")
TRAININGS = {
    "float": (main, []),
    "muon": (main_binary, []),
    "adam": (main_binary, ["--optimizer", "adam"]),
    "sgd": (main_binary, ["--optimizer", "sgd"]),
    "stochastic": (main_binary, ["--stochastic"]),
}
every_training = pytest.mark.parametrize(("script", "options"), TRAININGS.values(), ids=TRAININGS)


def prepare(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> SimpleNamespace:
    """A training up to `Trainer.fit`, which does not run: its model, loader and step."""
    made = SimpleNamespace()

    def take(trainer: Trainer) -> None:
        made.model, made.batches, made.step = trainer.model, trainer.loader.epoch(0), trainer.step

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", take)
        run_here(script, folder, patch, *options)
    return made


# -- without a GPU ---------------------------------------------------------------------------------------------------


class Moves(TorchDispatchMode):
    """Finds operations that copy between devices. Reading a value of the meta device raises by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        if len(devices) > 1 and "copy" in func.name():
            self.found.append(func.name())
        return result


class Constants(TorchFunctionMode):
    """Finds tensors made from Python's numbers, which are copied to the device as well."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Fails where something within would have the CPU wait for the device."""
    with Moves() as moves, Constants() as constants:
        yield
    assert moves.found + constants.found == []


@every_training
def test_a_step_reads_nothing_from_the_device(
    script: ModuleType, options: list[object], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data included. The meta device, which has shapes and no values, stands for the GPU."""

    def plain(optimizer: Any) -> Any:  # the fused ones do not know the device
        return lambda groups, fused, **more: optimizer(groups, **more)

    monkeypatch.setattr(cli, "select_device", lambda *_: META)
    monkeypatch.setattr(runtime, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "SGD", plain(torch.optim.SGD))
    monkeypatch.setattr(main_binary, "SGD", torch.optim.SGD)
    for name, (optimizer, rate, more) in main_binary.LATENT_OPTIMIZERS.items():
        unfused = {key: value for key, value in more.items() if key != "fused"}
        monkeypatch.setitem(main_binary.LATENT_OPTIMIZERS, name, (optimizer, rate, unfused))
    made = prepare(script, tmp_path, monkeypatch, *small_options(small_data), *options)
    made.step(*next(made.batches))  # constants of the normalization, the optimizers' state
    with without_waiting():
        loss, _ = made.step(*next(made.batches))
    assert loss.device == META


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.new_tensor(3),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.isnan().any()),
    ],
)
def test_what_waits_is_noticed(act: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError)), without_waiting():
        act(torch.ones(3, device=META))


def test_the_chosen_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generator is the one that is restored, and its kernels are the ones that are waited for."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert cli.select_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]


# -- the command that measures ---------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_without_cuda_one_line_says_so(run_script: Callable, tmp_path: Path) -> None:
    done = run_script("benchmarks/gpu.py", cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}, check=False)
    assert done.returncode == 2
    assert "benchmarks/gpu.py" in one_line(done.stderr)
    assert done.stdout == ""


@pytest.mark.full
def test_rehearsal_on_the_cpu(run_script: Callable, small_data: Path, tmp_path: Path) -> None:
    done = run_script("benchmarks/gpu.py", "--device", "cpu", "--data-dir", small_data, cwd=tmp_path)
    speed, checks = (block.splitlines() for block in done.stdout.partition("| ")[2].split("\n\n"))
    assert len(speed) == 3
    numbers = [float(cell.replace(",", "")) for cell in speed[2].strip("| ").split(" | ")[1:]]
    assert numbers[2] == pytest.approx(numbers[1] / numbers[0], abs=0.01)
    assert len(checks) == 5
    assert checks[2].endswith("| yes |")
    assert "skipped" in checks[4] or "passed" in checks[4]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", ["nothing", "a weight", "a number", "a time"])
def test_runs_are_compared_bit_for_bit(gpu: ModuleType, tmp_path: Path, changed: str) -> None:
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        other = folder.name == "other"
        for name in (BEST, FINAL):
            save_checkpoint(folder / name, "latent")
        if other and changed == "a weight":
            content = torch.load(folder / FINAL, weights_only=True)
            content["state_dict"]["linear.weight"][0, 0] += 1e-7
            torch.save(content, folder / FINAL)
        row = {"epoch": 1, "train_loss": 2.5 if other and changed == "a number" else 2, "seconds": 1 if other else 2}
        (folder / "metrics.csv").write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    found = gpu.differing(tmp_path / "one", tmp_path / "other")
    expected = {"a weight": [f"{FINAL}: linear.weight"], "a number": ["epoch 1: train_loss"]}
    assert found == expected.get(changed, [])


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@every_training
def test_the_gpu_does_not_wait_in_a_step(
    script: ModuleType, options: list[object], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(script, tmp_path, monkeypatch, *small_options(small_data), *options, "--device", "cuda")
    for _ in range(2):
        made.step(*next(made.batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(*next(made.batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_longer_epochs_wait_no_more_often(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole loop, bar the numbers that the progress bar fetches now and then."""
    monkeypatch.setattr("engine.training.loop._LOOK_SECONDS", math.inf)
    counts = []
    for number, images in enumerate((40, 40, 120)):  # the first run prepares more than the others
        options = [*small_options(small_data, epochs=1), "--limit-train", images, "--device", "cuda"]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run_here(main_binary, tmp_path / str(number), monkeypatch, *options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert counts[1] == counts[2] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "stochastic"])
def test_a_step_equals_that_of_the_cpu(
    name: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: the changes of all weights together. Float32 and float64 differ by 0.4 to 0.7 %; with Adam,
    whose first step is nearly the sign of the gradient, by 4 %."""
    script, options = TRAININGS[name]
    options = [*small_options(small_data), *options, "--precision", "float32"]
    losses, changes = [], []
    for device in ("cpu", "cuda"):
        made = prepare(script, tmp_path / device, monkeypatch, *options, "--device", device)
        before = torch.cat([p.detach().cpu().flatten() for p in made.model.parameters()])
        loss, _ = made.step(*next(made.batches))
        after = torch.cat([p.detach().cpu().flatten() for p in made.model.parameters()])
        losses.append(loss.item())
        changes.append((after - before).double())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert changes[0].norm() > 0
    assert (changes[1] - changes[0]).norm() < 0.15 * changes[0].norm()


@pytest.mark.cuda
def test_few_kernels_are_launched_for_binary_weights() -> None:
    """For all layers together: layer by layer they would be some 150."""
    bc = BC(build("resnet20")).to("cuda", memory_format=torch.channels_last)

    def cycle() -> None:
        bc.binarization()
        bc.restore()
        bc.clip()
        torch.cuda.synchronize()

    cycle()
    with torch.profiler.profile() as profile:
        cycle()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 20


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["float", "muon", "adam", "stochastic"])
def test_a_resumed_run_equals_an_uninterrupted_one_on_the_gpu(
    name: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, more = TRAININGS[name]
    options = [*small_options(small_data), *more, "--device", "cuda"]
    run_here(script, tmp_path / "whole", monkeypatch, *options)
    stop_at_step(6, monkeypatch, lambda: run_here(script, tmp_path / "parts", monkeypatch, *options))
    run_here(script, tmp_path / "parts", monkeypatch, *resume_options(small_data), "--device", "cuda")
    assert differences(essence(tmp_path / "parts"), essence(tmp_path / "whole")) == []


@pytest.mark.cuda
def test_stochastic_signs_are_drawn_again_after_a_restore() -> None:
    """On the last device, which is not the current one where there are several."""
    try:
        device = cli.select_device(f"cuda:{torch.cuda.device_count() - 1}")
        saved, w = runtime.generator_states(device), torch.zeros(1000, device=device)
        drawn = stochastic_sign(w)
        runtime.restore_generators(saved)
        assert torch.equal(stochastic_sign(w), drawn)
        assert not torch.equal(stochastic_sign(w), drawn)
    finally:
        torch.cuda.set_device(0)


@pytest.mark.cuda
@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.pth")), ids=lambda path: path.stem)
def test_a_shipped_network_predicts_on_the_gpu_what_it_does_on_the_cpu(path: Path, small_data: Path) -> None:
    loaded, test = checkpoints.load(path), cifar10.load(small_data, train=False).test
    predictions = []
    for device in (torch.device("cpu"), cli.select_device("cuda")):
        model = loaded.model().eval()
        if loaded.kind == "latent":
            binarize_model(model)
        model.to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            predictions += [model(images).argmax(1).cpu() for images, _ in cifar10.eval_batches(test, 100, device)]
    assert (predictions[0] != predictions[1]).sum() <= 2
