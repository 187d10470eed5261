"""Accuracy against bytes: the networks in pretrained/ and published ones. Prints a table and draws frontier.png.

    python3 benchmarks/frontier.py
    python3 benchmarks/frontier.py --output docs/images/frontier.png

Our networks are files: the size is measured, the accuracy is what the file records. The others are ResNet-20s with
the accuracy that their papers or repositories state. Their size is computed from the number of parameters, with no
file format around them: 1 bit for each binary weight, 32 bits for each other number. A BatchNorm counts as one scale
and one shift per channel, which also absorb scaling factors of the weights. The extra BatchNorm of an altered block,
below 1 kB, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pictures import INK, OTHERS, OURS, ROOT, bare, new_figure, save  # which also makes `engine` importable

from engine import checkpoints, cli

TICKS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
# Parameters of ResNet-20.
CONV1, CLASSIFIER, OTHER_CONVOLUTIONS, BATCHNORM, BIAS = 432, 640, 267_264, 1_376, 10
SHORTCUTS = 2_560 + 192  # 1x1 convolutions with their BatchNorm, where shortcuts have weights
FLOAT = CONV1 + CLASSIFIER + OTHER_CONVOLUTIONS + BATCHNORM + BIAS


def computed_bytes(binary: int, real: int) -> int:
    """1 bit for each binary weight, 4 bytes for each other number."""
    return (binary + 7) // 8 + 4 * real


ENDS_IN_FLOAT = computed_bytes(OTHER_CONVOLUTIONS, CONV1 + CLASSIFIER + BATCHNORM + BIAS)
SHORTCUTS_IN_FLOAT = computed_bytes(OTHER_CONVOLUTIONS + CONV1 + CLASSIFIER, BATCHNORM + BIAS + SHORTCUTS)


@dataclass(frozen=True)
class Network:
    """A network, its accuracy in per cent on the 10,000 test images, its size in bytes."""

    name: str
    accuracy: float
    size: int
    binary: bool
    ours: bool = False


PUBLISHED = (  # README.md has the papers, docs/images/README.md the repositories
    Network("ReSTE", 91.32, ENDS_IN_FLOAT, True),
    Network("IR-Net", 90.8, ENDS_IN_FLOAT, True),
    Network("ProxQuant", 90.65, SHORTCUTS_IN_FLOAT, True),
    Network("DoReFa-Net", 90.54, ENDS_IN_FLOAT, True),
    Network("BinaryConnect in the ProxQuant paper", 90.46, SHORTCUTS_IN_FLOAT, True),
    Network("He et al.", 91.25, computed_bytes(0, FLOAT), False),
    Network("akamaster", 91.73, computed_bytes(0, FLOAT), False),
    Network("chenyaofo", 92.60, computed_bytes(0, FLOAT + SHORTCUTS), False),
)


def our_networks(folder: Path = ROOT / "pretrained") -> list[Network]:
    """The networks in full precision and the 1-bit ones that lie in a folder."""
    found = []
    for path in sorted(folder.glob("*.pth")):
        loaded = checkpoints.load(path)
        binary = loaded.kind == checkpoints.BINARY_1BIT
        if binary or loaded.kind == "float":
            accuracy = loaded.raw["accuracy"] if binary else loaded.metrics["test_accuracy"]
            which = path.stem.removeprefix(loaded.arch).removesuffix("_1bit").replace("_binary", "").strip("_")
            name = f"{loaded.arch.replace('resnet', 'ResNet-')}, {(which or 'best') if binary else 'float32'}"
            found.append(Network(name, accuracy, path.stat().st_size, binary, ours=True))
    return found


def table(networks: list[Network]) -> str:
    """The networks as text of less than 80 columns, the smallest first."""
    lines = [f"{'network':<38}{'weights':<10}{'test %':>8}{'bytes':>12}  {'size'}"]
    for n in sorted(networks, key=lambda n: (n.size, -n.accuracy)):
        lines.append(
            f"{n.name:<38}{'1 bit' if n.binary else 'float32':<10}{n.accuracy:>8.2f}{n.size:>12,}"
            f"  {'file' if n.ours else 'computed'}"
        )
    return "\n".join(lines)


def draw(networks: list[Network]) -> Figure:
    """Accuracy against bytes. Every point has its name beside it."""
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(min(n.size for n in networks) / 5, max(n.size for n in networks) * 1.6)
    low, high = min(n.accuracy for n in networks), max(n.accuracy for n in networks)
    axes.set_ylim(low - 0.14 * (high - low), high + 0.14 * (high - low))  # room for names
    for ours, color, text in (
        (False, OTHERS, "published ResNet-20, size computed"),
        (True, OURS, "ours, size of the file"),
    ):
        shown = [n for n in networks if n.ours == ours]
        marker = {"edgecolors": color, "facecolors": color if ours else "white", "linewidths": 1.6, "zorder": 3}
        axes.scatter([n.size for n in shown], [n.accuracy for n in shown], 60, label=text, **marker)
    for n in (n for n in networks if n.ours and not n.binary):
        at = {"xy": (n.size, n.accuracy), "xytext": (10, 8), "textcoords": "offset points", "ha": "right"}
        axes.annotate(name(n), color=OURS, fontsize=10.5, va="bottom", **at)
    packed = [n for n in networks if n.ours and n.binary]
    for size in sorted({n.size for n in packed}):  # a column for each architecture
        write_names([n for n in packed if n.size == size], axes, left=True, color=OURS)
    write_names([n for n in networks if not n.ours and n.binary], axes, left=False)
    write_names([n for n in networks if not n.ours and not n.binary], axes, left=True)
    axes.legend(loc="best", fontsize=10.5, frameon=False)
    axes.set_xlabel("size on disk (log scale)", fontsize=10.5)
    axes.set_ylabel("test accuracy", fontsize=10.5)
    axes.set_xticks([size for size in TICKS if axes.get_xlim()[0] < size < axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1e3:,.0f} kB")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.1f} %")
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25)
    bare(axes, "top", "right")
    return figure


def name(n: Network) -> str:
    """Name and accuracy; "ResNet-20", which most of them are, is left out."""
    return f"{n.name.removeprefix('ResNet-20, ')}: {n.accuracy:.2f} %"


def write_names(networks: list[Network], axes: Axes, *, left: bool, color: str = INK) -> None:
    """Write the names in a column beside the points, from the top down, with a line from each to its point."""
    line = 0.05 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    x = min(n.size for n in networks) / 1.2 if left else max(n.size for n in networks) * 1.2
    leader = {"arrowstyle": "-", "color": OTHERS, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4, "relpos": (left, 0.5)}
    y = axes.get_ylim()[1]
    for n in sorted(networks, key=lambda n: -n.accuracy):
        y = min(n.accuracy, y - line)
        place = {"xytext": (x, y), "ha": "right" if left else "left", "va": "center"}
        axes.annotate(name(n), (n.size, n.accuracy), color=color, fontsize=10.5, arrowprops=leader, **place)


def main() -> None:
    parser = cli.ArgumentParser("Draw accuracy against bytes on disk, ours and published.")
    parser.add_argument("--output", type=Path, default=Path("frontier.png"), metavar="PNG", help="the file to write")
    args = parser.parse_args()
    networks = [*our_networks(), *PUBLISHED]
    print(table(networks))
    save(draw(networks), args.output, table(networks))


if __name__ == "__main__":
    cli.run(main)
