"""The networks are those of the literature, and the imports of the collection point one way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models import ARCHITECTURES, ResNetS, build, weight_layers
from models.resnet_s import architecture_of, shortcut_a

ROOT = Path(__file__).resolve().parent.parent
DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}

# He et al. 2015, table 6, gives these rounded; exactly: 3x3 convolutions, two values a channel, the classifier.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


@pytest.fixture(scope="module", params=DEPTHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


# -- counts and names ------------------------------------------------------------------------------------------


def test_the_five_networks_are_there_under_their_names():
    assert {name: getattr(models, name) for name in DEPTHS}.items() <= ARCHITECTURES.items()


def test_parameters_and_layers_are_those_published(arch):
    model = build(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    assert len(weight_layers(model)) == DEPTHS[arch]
    channels = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    blocks = (DEPTHS[arch] - 2) // 6
    assert channels == 16 + 2 * blocks * (16 + 32 + 64)
    binary = sum(layer.weight.numel() for _, layer in weight_layers(model))
    assert binary == PARAMETERS[arch] - 2 * channels - 10
    if arch == "resnet20":
        assert (binary, channels) == (268_336, 688)


def published_names(blocks: int) -> list[str]:
    """The parameters and buffers of the widely used CIFAR ResNet checkpoints."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{field}" for field in norm)]
    for stage in (1, 2, 3):
        for block in range(blocks):
            for layer in (1, 2):
                place = f"layer{stage}.{block}"
                names += [f"{place}.conv{layer}.weight", *(f"{place}.bn{layer}.{field}" for field in norm)]
    return [*names, "linear.weight", "linear.bias"]


def test_names_are_the_widely_used_ones(arch):
    assert list(build(arch).state_dict()) == published_names((DEPTHS[arch] - 2) // 6)


# -- the shortcut ----------------------------------------------------------------------------------------------


def shortcut_by_hand(x: Tensor, planes: int, stride: int) -> Tensor:
    count, channels, height, width = x.shape
    out = torch.zeros(count, planes, -(-height // stride), -(-width // stride))
    before = (planes - channels) // 2
    for n in range(count):
        for channel in range(channels):
            for row in range(0, height, stride):
                for column in range(0, width, stride):
                    out[n, before + channel, row // stride, column // stride] = x[n, channel, row, column]
    return out


@pytest.mark.parametrize(
    ("channels", "planes", "stride", "side"), [(16, 16, 1, 4), (16, 32, 2, 8), (32, 64, 2, 4), (16, 32, 2, 5)]
)
def test_shortcut_keeps_every_second_pixel_between_two_halves_of_zeros(channels, planes, stride, side):
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    out = shortcut_a(x, planes - channels, stride)
    assert torch.equal(out, shortcut_by_hand(x, planes, stride))


def test_the_whole_forward_pass_is_that_of_the_paper():
    """Written out anew from He et al. 2015 with functional operations only."""
    torch.manual_seed(0)
    model = build("resnet20").eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    state = model.state_dict()

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-5)

    images = torch.randn(3, 3, 32, 32)
    x = conv_norm(images, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            out = conv_norm(out, f"{name}.conv2", f"{name}.bn2")
            x = (out + shortcut_by_hand(x, out.shape[1], stride)).relu()
    expected = F.avg_pool2d(x, 8).flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# -- told from names, and refused ------------------------------------------------------------------------------


def test_architecture_is_told_from_the_names(arch):
    assert architecture_of(build(arch).state_dict()) == arch


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["conv1.weight"],
        ["layer1.0.conv1.weight"],  # one block: resnet8 is none of the five
        ["layer1.0.x", "layer1.1.x", "layer1.3.x"],  # a gap
        ["layer1.1.x", "layer1.2.x", "layer1.3.x"],
        [f"layer1.{block}.x" for block in range(19)],
        ["layer1.99999999999999999999.x"],
    ],
)
def test_other_names_are_no_architecture(keys):
    assert architecture_of(keys) is None


@pytest.mark.parametrize("name", ["resnet18", "ResNet20", ""])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=", ".join(ARCHITECTURES)):
        build(name)


@pytest.mark.parametrize("depth", [-4, 2, 21])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match="6n"):
        ResNetS(depth)


# -- imports ---------------------------------------------------------------------------------------------------

SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGES = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ("models", "engine")}
RUN_TIME = {"torch", "torchvision", "tqdm", "matplotlib", "wandb", "numpy"}
LAZILY = {"PIL", "onnx", "onnxruntime"}  # Pillow comes with torchvision; the other two are for requirements-onnx.txt
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
EVERY_FILE = [*SCRIPTS, *PACKAGES["models"], *PACKAGES["engine"]]


def nodes(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """All below `node`, what is for the type checker only left out."""
    for child in ast.iter_child_nodes(node):
        for_the_type_checker = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not for_the_type_checker and (into_functions or not is_function):
            yield child
            yield from nodes(child, into_functions=into_functions)


def imports(found: Iterator[ast.AST]) -> Iterator[str]:
    """The dotted names that are imported; `from models import BC` gives models.BC."""
    for node in found:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path, *, into_functions: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name.split(".")[0] for name in imports(nodes(tree, into_functions=into_functions))}


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_and_name_stated_packages(path):
    ours = {"models", "engine", "cifar10"} | {script.stem for script in SCRIPTS}
    allowed = {"models": {"models"}, "engine": {"engine", "models"}}
    at_once, ever = roots(path, into_functions=False), roots(path, into_functions=True)
    assert ever & ours <= allowed.get(path.relative_to(ROOT).parts[0], {"engine", "models", "cifar10"})
    assert ever - ours - set(sys.stdlib_module_names) <= RUN_TIME | LAZILY
    assert not at_once & (LAZILY | POSIX_ONLY), "import it in the function that needs it"


def test_requirements_name_the_same_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = {line.partition(">")[0].strip() for line in lines if line.strip() and not line.startswith("#")}
    assert named == RUN_TIME


@pytest.mark.parametrize(
    "path",
    sorted({*EVERY_FILE, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_is_imported_wholesale(path):
    names = list(imports(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    assert not [name for name in names if name.endswith(".*")]


def test_models_do_without_the_rest_of_the_collection(tmp_path, child_environment):
    """In a process of its own, with nothing but that folder on its path."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    code = "from models import bitpack, resnet20; bitpack.fold_normalization(resnet20())"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=child_environment, check=True, timeout=120)
