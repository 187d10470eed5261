"""The pictures of README.md and docs/: their commands run, no texts overlap, those in docs/images are up to date."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.axis import Tick, XTick
from matplotlib.figure import Figure
from matplotlib.text import Text
from networks import save_checkpoint
from PIL import Image
from script_server import ScriptServer

from engine import checkpoints
from engine.cli import UserError
from models import build

sys.path.insert(0, str(ROOT / "benchmarks"))
frontier, pictures = importlib.import_module("frontier"), importlib.import_module("pictures")

IMAGES = ROOT / "docs" / "images"
CAPTIONS = (IMAGES / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| !\[.*\]\((\w+\.png)\) \| `(python3 .*)` \|$", CAPTIONS, re.MULTILINE))


@pytest.fixture(scope="module")
def early(scripts: ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the short run in docs/images/README.md, trained on small data."""
    command = re.search(r"`python3 (main_binary\.py [^`]*)`", CAPTIONS)[1]
    folder = tmp_path_factory.mktemp("early")
    scripts.run(*shlex.split(command), "--data-dir", small_data, "--wandb", "disabled", cwd=folder)
    return folder / "early" / "final_model.pth"


@pytest.fixture(scope="module")
def drawn(early: Path) -> dict[str, Figure]:
    late = shlex.split(COMMANDS["latent.png"])[-3]
    latent = [pictures.load_latent(path) for path in (early, ROOT / late)]
    return {
        "frontier.png": frontier.draw([*frontier.our_networks(), *frontier.PUBLISHED]),
        "step.png": pictures.draw_step()[0],
        "latent.png": pictures.draw_latent(latent)[0],
        "speed.png": pictures.draw_speed(*pictures.read_speeds(pictures.SPEEDS))[0],
    }


def test_every_picture_has_its_command() -> None:
    assert {path.name for path in IMAGES.glob("*.png")} == set(COMMANDS)
    assert all(command.endswith(f"--output docs/images/{name}") for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_picture_is_small_opaque_and_as_wide_as_a_page(name: str) -> None:
    picture = Image.open(IMAGES / name)
    assert (IMAGES / name).stat().st_size < 150_000
    assert 1200 <= picture.width <= 1600
    corners = [
        picture.convert("RGBA").getpixel((x, y)) for x in (0, picture.width - 1) for y in (0, picture.height - 1)
    ]
    assert corners == [(255, 255, 255, 255)] * 4


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_its_command_draws_it(name: str, early: Path, run_script: Callable, tmp_path: Path) -> None:
    """With the same numbers; the early run of latent.png is one on small data here."""
    _, script, *arguments = shlex.split(COMMANDS[name])
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "early").symlink_to(early.parent)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    run_script(script, *arguments, cwd=tmp_path)
    shipped, made = (
        Image.open(folder / name).text["Description"] for folder in (IMAGES, tmp_path / "docs" / "images")
    )
    if name == "latent.png":
        shipped, made = (text.splitlines()[::2] for text in (shipped, made))
    assert made == shipped, f"outdated: run {COMMANDS[name]}"


def visible_texts(figure: Figure) -> list[Text]:
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    beyond = {id(tick.label1) for tick in ticks if not is_in_view(tick)}  # matplotlib does not draw these
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    return [text for text in texts if id(text) not in beyond]


def is_in_view(tick: Tick) -> bool:
    axis = tick.axes.xaxis if isinstance(tick, XTick) else tick.axes.yaxis
    low, high = sorted(axis.get_view_interval())
    return low <= tick.get_loc() <= high


def assert_legible(figure: Figure) -> None:
    """At the 800 pixels of a page: letters of at least 13 pixels, inside the picture, none on another."""
    figure.draw_without_rendering()
    texts = visible_texts(figure)
    boxes = [Text.get_window_extent(text) for text in texts]  # of an annotation without its arrow
    assert len(texts) > 5
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() * 800 / 72 / figure.get_figwidth() >= 13
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text.get_text()
        assert [other.get_text() for other, its in zip(texts, boxes, strict=True) if box.overlaps(its)] == [
            text.get_text()
        ]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_texts_are_legible(name: str, drawn: dict[str, Figure]) -> None:
    assert_legible(drawn[name])


def test_texts_stay_legible_with_more_and_better_networks() -> None:
    ours = (
        ("20, default", 91.7, 41_253, True),
        ("20, best", 91.72, 41_253, True),
        ("20, float32", 92.6, 1_119_383, False),
        ("56, best", 93.0, 128_000, True),
        ("56, float32", 94, 3_500_000, False),
    )
    networks = [frontier.Network(f"ResNet-{words}", *rest, ours=True) for words, *rest in ours]
    assert_legible(frontier.draw([*networks, *frontier.PUBLISHED]))


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_the_table_of_the_frontier_has_the_files() -> None:
    rows = frontier.table([*frontier.our_networks(), *frontier.PUBLISHED]).splitlines()
    assert max(map(len, rows)) < 80
    for path in (ROOT / "pretrained").glob("*.pth"):
        loaded = checkpoints.load(path)
        if loaded.kind in ("float", checkpoints.BINARY_1BIT):
            accuracy = loaded.metrics.get("test_accuracy", loaded.raw.get("accuracy"))
            row = rf"{accuracy:.2f}\s+{path.stat().st_size:,}\s+file$"
            assert len([line for line in rows if re.search(row, line)]) == 1
    assert sum(line.endswith("computed") for line in rows) == len(frontier.PUBLISHED)


def test_published_sizes_are_those_of_the_architecture() -> None:
    model = build("resnet20")
    layers = {
        name: m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert layers["conv1"] == frontier.CONV1
    assert layers["linear"] == frontier.CLASSIFIER
    assert sum(layers.values()) == frontier.CONV1 + frontier.CLASSIFIER + frontier.OTHER_CONVOLUTIONS
    assert sum(p.numel() for p in model.parameters()) == frontier.FLOAT
    assert frontier.computed_bytes(sum(layers.values()), frontier.BATCHNORM + frontier.BIAS) == 39_086


def test_accuracies_of_others_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        n.name
        for n in frontier.PUBLISHED
        if n.binary and not re.search(rf"^\| {n.name.split()[0]}[^|]*\| {n.accuracy:g} \|", readme, re.MULTILINE)
    ]
    assert missing == []


def test_latent_weights_begin_as_those_of_the_script(tmp_path: Path) -> None:
    loaded = pictures.load_latent(save_checkpoint(tmp_path / "a.pth", "latent", seed=3))
    torch.manual_seed(3)
    expected = build("resnet20")
    assert torch.equal(pictures.initial_weights(loaded)[:432], expected.conv1.weight.flatten().clamp(-1, 1))
    _, description = pictures.draw_latent([loaded])
    w = pictures.latent_weights(loaded.model())
    assert f"after 3 epochs: {100 * float((w.abs() > 0.9).float().mean()):.2f} %" in description


def test_bars_in_color_are_the_ways_that_read_a_1_bit_file() -> None:
    machine, rows = pictures.read_speeds(pictures.SPEEDS)
    figure, _ = pictures.draw_speed(machine, rows)
    colors = [patch.get_facecolor() for patch in figure.axes[0].patches]
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [float(row["batch 1"]) for row in rows]
    one_bit = np.array([row["reads the 1-bit file"] == "yes" for row in rows])
    assert len({color for color, is_one_bit in zip(colors, one_bit, strict=True) if is_one_bit}) == 1
    assert len(set(colors)) == 2
    assert machine
    assert any(machine in text.get_text() for text in visible_texts(figure))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["latent"], "latent"), (["latent", "none.pth"], "none.pth"), (["latent", "float.pth"], "float.pth")],
)
def test_mistakes_are_named(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "float.pth", "float")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pictures.py", *arguments])
    with pytest.raises(UserError, match=named):
        pictures.main()
    assert not list(tmp_path.glob("*.png"))
