"""The pictures of README.md and docs/: a step of BinaryConnect, latent weights over training, inference speed.

    python3 benchmarks/pictures.py step                          step.png
    python3 benchmarks/pictures.py latent EARLY.pth LATE.pth     latent.png; its first panel is how a run begins
    python3 benchmarks/pictures.py speed                         speed.png, from benchmarks/inference.csv

docs/images/README.md has the command of every picture. benchmarks/frontier.py draws the one of accuracy and size.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import checkpoints, cli  # noqa: E402 - needs the path
from engine.checkpoints import Checkpoint  # noqa: E402
from engine.cli import UserError  # noqa: E402
from engine.files import atomic_write  # noqa: E402
from models import build  # noqa: E402

OURS, OTHERS, INK, CODE = "#c2410c", "#8a8f98", "#24292f", "#57606a"
SPEEDS = ROOT / "benchmarks" / "inference.csv"
BATCHES = ("batch 1", "batch 32")
NEAR = 0.9  # a latent weight beyond it is drawn in color


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, in inches. README pages show 8 inches as some 800 pixels."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, description: str) -> None:
    """Write a PNG. description: its numbers as text, kept in the file, so that a test sees an outdated picture."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, metadata={"Description": description})
    atomic_write(path, content.getvalue())
    print(f"Saved {path}")


def bare(axes: Axes, *sides: str) -> None:
    """Leave out the frame on these sides."""
    axes.spines[list(sides)].set_visible(False)


# -- a step of BinaryConnect -----------------------------------------------------------------------------------

BOXES = (  # x and y of the middle, text; each box points to the next, the last to the first
    (1.25, 2.9, "latent weights\n$w$, real, in [-1, 1]"),
    (5.0, 2.9, "binary weights\n$w_b = \\mathrm{sign}(w)$"),
    (7.4, 2.9, "forward pass\nwith $w_b$"),
    (9.35, 2.9, "loss\n$C$"),
    (9.35, 0.95, "gradient\n$\\partial C\\,/\\,\\partial w_b$"),
    (5.2, 0.95, "update of $w$ by the gradient at $w_b$:\nstraight-through estimator"),
    (1.25, 0.95, "clip\n$w$ to [-1, 1]"),
)
CALLS = (  # what does it in main_binary.py
    (3.13, 3.12, "bc.binarization()", "center"),
    (9.2, 1.95, "loss.backward()", "right"),
    (7.9, 0.65, "bc.restore()", "center"),
    (5.2, 0.25, "optimizer.step()", "center"),
    (1.25, 0.25, "bc.clip()", "center"),
)


def draw_step() -> tuple[Figure, str]:
    """The circle of one training step: two rows of boxes, joined by arrows."""
    figure = new_figure(8, 2.7)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 3.5))
    axes.axis("off")
    frame = {"boxstyle": "round,pad=0.45", "facecolor": "white", "linewidth": 1.6}
    boxes = []
    for x, y, text in BOXES:
        color = OURS if "w_b" in text else INK
        box = axes.text(x, y, text, ha="center", va="center", fontsize=11, bbox=frame | {"edgecolor": color})
        boxes.append(box)
    for box, target in zip(boxes, boxes[1:] + boxes[:1], strict=True):
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "mutation_scale": 14}
        ends = {"patchA": box.get_bbox_patch(), "patchB": target.get_bbox_patch()}
        axes.annotate("", target.get_position(), box.get_position(), arrowprops=style | ends)
    for x, y, call, align in CALLS:
        axes.text(x, y, call, ha=align, va="center", fontsize=10, family="monospace", color=CODE)
    return figure, "\n".join(text for _, _, text in BOXES)


# -- latent weights ----------------------------------------------------------------------------------------------


def draw_latent(files: list[Checkpoint]) -> tuple[Figure, str]:
    """The distribution of all latent weights: as a run with the last file's seed begins, then in each file."""
    panels = [("at the start", initial_weights(files[-1]))]
    panels += [(trained_for(loaded), latent_weights(loaded.model())) for loaded in files]
    figure, lines = new_figure(8, 2.7), []
    edges = np.linspace(-1.025, 1.025, 42)  # the outermost bins are centered on -1 and +1
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, w) in zip(all_axes, panels, strict=True):
        heights = 100 * np.histogram(w.numpy(), edges)[0] / len(w)
        near = 100 * float((w.abs() > NEAR).float().mean())
        axes.stairs(heights, edges, fill=True, color=OTHERS)
        axes.stairs(np.where(np.abs(edges[:-1] + 0.025) > NEAR, heights, 0), edges, fill=True, color=OURS)
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("latent weight", fontsize=10)
        axes.text(
            0.5, 0.92, f"|w| > {NEAR}: {near:.0f} %", transform=axes.transAxes, ha="center", fontsize=10, color=OURS
        )
        axes.set(xticks=(-1, 0, 1), xlim=(-1.1, 1.1))
        bare(axes, "top", "right")
        lines.append(f"{title}: {near:.2f} % beyond {NEAR}")
    all_axes[0].set_ylim(0, 1.2 * all_axes[0].get_ylim()[1])  # room for the texts
    all_axes[0].yaxis.set_major_formatter("{x:.0f} %")
    all_axes[0].set_ylabel("share of the weights", fontsize=10)
    return figure, "\n".join(lines)


def trained_for(loaded: Checkpoint) -> str:
    images = loaded.config.get("limit_train")
    return f"after {loaded.epoch} epochs" + (f" of {images:,} images" if images else "")


def initial_weights(loaded: Checkpoint) -> Tensor:
    """What main_binary.py begins with, given the options of this file's run, without --init."""
    torch.manual_seed(int(loaded.config.get("seed", 0)))
    return latent_weights(build(loaded.arch)).clamp(-1, 1)


def latent_weights(model: nn.Module) -> Tensor:
    """All Conv2d and Linear weights in one float32 vector."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return torch.cat([layer.weight.detach().reshape(-1) for layer in layers])


# -- inference speed -----------------------------------------------------------------------------------------------


def read_speeds(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The machine and the rows of a table like benchmarks/inference.csv."""
    lines = path.read_text(encoding="utf-8").splitlines()
    machine = next(line.partition("machine:")[2].strip() for line in lines if line.startswith("# machine:"))
    return machine, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def draw_speed(machine: str, rows: list[dict[str, str]]) -> tuple[Figure, str]:
    """A bar a way, images per second; ways that read a 1-bit file in color."""
    figure = new_figure(8, 3.6)
    figure.suptitle("Images per second; in color: the ways that read a 1-bit file", fontsize=12)
    names = [row["way"] for row in rows]
    colors = [OURS if row["reads the 1-bit file"] == "yes" else OTHERS for row in rows]
    for axes, batch in zip(figure.subplots(1, 2, sharey=True), BATCHES, strict=True):
        bars = axes.barh(names, [float(row[batch]) for row in rows], color=colors)
        axes.bar_label(bars, [f"{float(row[batch]):,.0f}" for row in rows], padding=4, fontsize=10)
        axes.set_title(batch, fontsize=11)
        axes.margins(x=0.22)
        axes.tick_params(axis="y", length=0, labelsize=10)
        axes.set_xticks([])
        bare(axes, "top", "right", "bottom")
    axes.invert_yaxis()
    figure.supxlabel(machine, fontsize=10)
    return figure, "\n".join(f"{row['way']}: {row['batch 1']}, {row['batch 32']}" for row in rows)


# -- the script ----------------------------------------------------------------------------------------------------


def load_latent(path: Path) -> Checkpoint:
    loaded = checkpoints.load(path)
    if loaded.kind != "latent":
        raise UserError(f"{path}: its weights are {loaded.kind}, not latent; use a checkpoint of main_binary.py")
    return loaded


def main() -> None:
    parser = cli.ArgumentParser("Draw one of the pictures of README.md and docs/.")
    parser.add_argument("picture", choices=("step", "latent", "speed"), help="which one")
    parser.add_argument("files", nargs="*", type=Path, help="latent: checkpoints of main_binary.py; speed: a table")
    parser.add_argument("--output", type=Path, metavar="PNG", help="the file to write (default: PICTURE.png)")
    args = parser.parse_args()
    if args.picture == "step":
        figure, description = draw_step()
    elif args.picture == "speed":
        figure, description = draw_speed(*read_speeds(args.files[0] if args.files else SPEEDS))
    elif args.files:
        figure, description = draw_latent([load_latent(path) for path in args.files])
    else:
        raise UserError("latent: name one or more checkpoints of main_binary.py")
    save(figure, args.output or Path(f"{args.picture}.png"), description)


if __name__ == "__main__":
    cli.run(main)
