"""torch.hub: the entry points, in programs of every kind."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import cifar10
import hubconf
from engine import checkpoints

NAMES = [f"resnet{depth}{suffix}" for depth in (20, 32, 44, 56, 110) for suffix in ("", "_binary")]
TRAINED = hubconf._PRETRAINED


def load(name: str, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **options)


def recorded_accuracy(loaded: checkpoints.Checkpoint) -> float:
    return loaded.metrics.get("test_accuracy", loaded.raw.get("accuracy"))


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]


def test_torch_hub_lists_the_networks_and_nothing_else() -> None:
    callables = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(callables) == sorted(NAMES)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_is_that_of_its_file(name: str) -> None:
    network = load(name, pretrained=True)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = checkpoints.load(ROOT / "pretrained" / TRAINED[name][0])
    with torch.no_grad():
        torch.testing.assert_close(network(images), loaded.model()(images), rtol=1e-4, atol=1e-4)
    assert not network.training
    assert all((w.abs() == 1).all() for w in weights(network)) == name.endswith("_binary")


@pytest.mark.parametrize("name", TRAINED)
def test_the_documentation_has_the_files_accuracy(name: str) -> None:
    file, accuracy = TRAINED[name]
    assert f"{recorded_accuracy(checkpoints.load(ROOT / 'pretrained' / file)):.2f}" == f"{accuracy:.2f}"
    assert f"{accuracy:.2f} %" in getattr(hubconf, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_has_the_normalization(name: str) -> None:
    documentation = getattr(hubconf, name).__doc__
    assert str(cifar10.MEAN) in documentation
    assert "({:.4f}, {:.4f}, {:.4f})".format(*cifar10.STD) in documentation
    assert all(label in documentation for label in cifar10.CLASSES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TRAINED)))
def test_a_network_that_was_not_trained_is_refused_or_random(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*pretrained=False"):
        load(name, pretrained=True)
    assert len(weights(load(name))) == int(name.removeprefix("resnet").removesuffix("_binary"))


def test_a_random_binary_network_is_binary() -> None:
    assert all((w.abs() == 1).all() for w in weights(load("resnet20_binary")))
    assert not any((w.abs() == 1).all() for w in weights(load("resnet20")))


def test_a_network_can_be_copied_and_its_weights_saved() -> None:
    network = load("resnet20_binary", pretrained=True)
    saved = io.BytesIO()
    torch.save(copy.deepcopy(network).state_dict(), saved)
    saved.seek(0)
    network.load_state_dict(torch.load(saved, weights_only=True))


# Programs of their own: their packages `models` and `engine` are found first, as in a folder one works in.
PROGRAM_PACKAGES = {"models/__init__.py": "VALUE = 1", "models/resnet_s.py": "VALUE = 2", "engine/__init__.py": ""}
IMPORTS = "import models, models.resnet_s, engine\n"
LOADS = f"""
import sys, torch
before, path = dict(sys.modules), list(sys.path)
network = torch.hub.load({str(ROOT)!r}, "resnet20_binary", source="local", pretrained=True)
added = {{name for name in sys.modules if name not in before}}
assert not [name for name in added if name.split(".")[0] in ("models", "engine", "cifar10", "hubconf")], added
assert all(sys.modules[name] is module for name, module in before.items())
assert sys.path == path
"""
USES = """
assert (models.VALUE, models.resnet_s.VALUE) == (1, 2)
assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
print("done")
"""


@pytest.mark.parametrize(
    "program",
    [IMPORTS + LOADS + USES, LOADS + IMPORTS + USES, LOADS + IMPORTS + LOADS + USES],
    ids=["packages first", "network first", "both"],
)
def test_a_program_keeps_its_own_packages(program: str, tmp_path: Path, child_environment: dict[str, str]) -> None:
    for name, content in PROGRAM_PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert run(program, tmp_path, child_environment) == "done\n"


def test_importing_it_does_nothing(tmp_path: Path, child_environment: dict[str, str]) -> None:
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
before, path, random = set(sys.modules), list(sys.path), torch.random.get_rng_state()
import hubconf
added = set(sys.modules) - before - {{"hubconf"}}
assert not [name for name in added if name.split(".")[0] not in sys.stdlib_module_names], added
assert sys.path == path
assert torch.equal(torch.random.get_rng_state(), random)
"""
    assert run(program, tmp_path, child_environment) == ""


def run(program: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(folder.glob("*.png")) + list(folder.glob("*.pth"))
    return done.stdout


@pytest.mark.real_data
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_scores_what_is_said(name: str, real_data: Path) -> None:
    test = cifar10.load(real_data, train=False).test
    network, correct = load(name, pretrained=True), 0
    with torch.no_grad():
        for images, labels in cifar10.eval_batches(test, 500):
            correct += int((network(images).argmax(1) == labels).sum())
    assert 100 * correct / len(test) == pytest.approx(TRAINED[name][1], abs=0.02 + 1e-9)
