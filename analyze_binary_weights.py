"""Weight statistics of a checkpoint, layer by layer: how binary are its weights?

    python3 analyze_binary_weights.py                            best_model.pth
    python3 analyze_binary_weights.py best_model_binarized.pth   another one, 1-bit files too

Only the weights of convolutions and of the classifier count: they are what BinaryConnect makes binary.
Writes best_model_histograms.png, named after the checkpoint: a histogram per layer and one of all. Needs no data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine import checkpoints, cli, report
from engine.checkpoints import BEST, Checkpoint
from engine.files import atomic_write
from engine.report import fixed, share
from models import ResNetS
from models.bitpack import information_bytes
from models.resnet_s import weight_layers


@dataclass(frozen=True)
class WeightStats:
    """Statistics of the weights of one layer, or of all of them.

    in_range: weights in [-1, 1], both ends included. between: weights strictly between -1 and +1.
    distance: mean of | |w| - 1 |, how far a weight is from the nearest binary value. std: of the population.
    """

    name: str
    shape: str
    count: int
    min: float
    max: float
    mean: float
    std: float
    in_range: int
    minus_one: int
    plus_one: int
    between: int
    distance: float

    @classmethod
    def of(cls, name: str, shape: str, w: Tensor) -> WeightStats:
        """Of a tensor of finite weights, any shape; worked out in float64."""
        w = w.detach().double()
        return cls(
            name=name,
            shape=shape,
            count=w.numel(),
            min=w.min().item(),
            max=w.max().item(),
            mean=w.mean().item(),
            std=w.std(correction=0).item(),
            in_range=int((w.abs() <= 1).sum()),
            minus_one=int((w == -1).sum()),
            plus_one=int((w == 1).sum()),
            between=int((w.abs() < 1).sum()),
            distance=(w.abs() - 1).abs().mean().item(),
        )

    @property
    def saturated(self) -> int:
        return self.minus_one + self.plus_one

    @property
    def binary(self) -> bool:
        return self.saturated == self.count

    @property
    def bits(self) -> int:
        """Bits that each weight needs."""
        return 1 if self.binary else 32

    @property
    def bytes(self) -> int:
        return (self.count * self.bits + 7) // 8


def collect(model: ResNetS) -> tuple[list[WeightStats], WeightStats, dict[str, Tensor]]:
    """The statistics of each layer, of all, and the weights by the layer's name."""
    weights = {name: layer.weight.detach() for name, layer in weight_layers(model)}
    layers = [WeightStats.of(name, "x".join(map(str, w.shape)), w) for name, w in weights.items()]
    everything = torch.cat([w.reshape(-1) for w in weights.values()])
    return layers, WeightStats.of(f"all {len(layers)} layers", "", everything), weights


# -- the report: every line fits 80 columns ------------------------------------------------------------------


def print_tables(layers: list[WeightStats], total: WeightStats) -> None:
    print("\nlayer           shape         count      min      max     mean      std bits")
    for row in _ruled(layers, total):
        numbers = " ".join(f"{fixed(value):>8}" for value in (row.min, row.max, row.mean, row.std))
        print(f"{row.name:<15} {row.shape:<9} {row.count:>9,} {numbers} {row.bits:>4}")
    print("\nlayer           in [-1,1] exactly -1 exactly +1 in between distance     bytes")
    for row in _ruled(layers, total):
        counts = " ".join(f"{count:>10,}" for count in (row.minus_one, row.plus_one, row.between))
        print(f"{row.name:<15} {share(row.in_range, row.count):>9} {counts} {fixed(row.distance):>8} {row.bytes:>9,}")
    print(
        "bits: 1 for a layer of nothing but -1 and +1, and bytes at that width;\n"
        "in between: strictly; distance: mean distance to the nearest binary value"
    )


def _ruled(layers: list[WeightStats], total: WeightStats) -> Iterator[WeightStats]:
    """The rows of a table, with a line before the first and the last."""
    print("-" * 79)
    yield from layers
    print("-" * 79)
    yield total


def print_sizes(model: ResNetS, total: WeightStats) -> None:
    """What one bit per weight saves, of the weights alone and of the whole network."""
    tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
    kept = 4 * (sum(value.numel() for value in tensors) - total.count)
    packed = (total.count + 7) // 8
    folded = information_bytes(model) - packed
    rows = [("weights alone", 0), ("and all the rest in float32", kept)]
    if folded != kept:
        rows.append(("the same, BatchNorm folded", folded))
    print(f"\n{'size of the numbers, in bytes':<32}{'float32':>12}{'1-bit weights':>16}{'ratio':>9}")
    for label, rest in rows:
        full, small = 4 * total.count + rest, packed + rest
        print(f"{label:<32}{full:>12,}{small:>16,}{full / small:>8.2f}x")


def verdict(total: WeightStats, kind: str) -> list[str]:
    """What the weights are, in lines to print; every number is computed from the weights."""
    outside = total.count - total.in_range
    in_range = f"  {share(total.in_range, total.count)} of weights are between -1 and +1"
    saturated = f"  Saturated, exactly -1 or +1: {total.saturated:,} ({share(total.saturated, total.count)})"
    if total.binary:
        return [
            "✓ Weights appear to be BINARIZED (all values are at or very close to -1 or +1)",
            f"  Exactly -1: {total.minus_one:,} ({share(total.minus_one, total.count)})",
            f"  Exactly +1: {total.plus_one:,} ({share(total.plus_one, total.count)})",
            f"  In between: {total.between:,} ({share(total.between, total.count)})",
        ]
    if outside:
        lines = [
            "✗ Weights are neither clipped to [-1, 1] nor binarized",
            in_range,
            f"  Outside: {outside:,} ({share(outside, total.count)}), min {total.min:.6g}, max {total.max:.6g}",
            saturated,
        ]
        if kind == "latent":
            lines.append("  The file says that they are latent weights, but those are clipped at every step.")
        return lines
    if kind == "float":
        return [
            "✗ Weights are full precision (float), neither clipped to [-1, 1] nor binarized",
            f"{in_range}, but nothing holds them there:",
            "  the file says that they were trained without BinaryConnect",
            saturated,
        ]
    lines = ["⚠ Weights are CLIPPED to [-1, 1] but NOT fully binarized", in_range, saturated]
    if kind == "unknown":
        lines += [
            "  The file does not say how they were trained, and the range alone does not",
            "  prove BinaryConnect: 99.98 % of a published float ResNet-20 lies in [-1, 1].",
        ]
    return lines


# -- the picture ---------------------------------------------------------------------------------------------


def draw(path: Path, title: str, layers: list[WeightStats], weights: dict[str, Tensor], *, clipped: bool) -> None:
    """Save a page of histograms: all weights on top, a panel per layer below.

    clipped: show [-1, 1] in every panel; otherwise each panel has its own range.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 5 if len(layers) <= 60 else 8
    rows = -(-len(layers) // columns)
    # In inches, fixed: fitting the layout to the texts takes several seconds where there are 110 panels.
    width, height = 2.9 * columns, 3.6 + 1.75 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    report.draw_title(figure, title, y=1 - 0.15 / height, va="top")
    sides = {"left": 0.8 / width, "right": 1 - 0.2 / width}
    top = figure.add_gridspec(1, 1, top=1 - 0.75 / height, bottom=1 - 3.1 / height, **sides)
    panels = figure.add_gridspec(
        rows, columns, top=1 - 3.75 / height, bottom=0.35 / height, wspace=0.2, hspace=0.42, **sides
    )
    everything = torch.cat([w.reshape(-1) for w in weights.values()])
    overall = figure.add_subplot(top[0])
    _draw_histogram(overall, everything, clipped, bins=101)
    overall.set_title(f"all {len(everything):,} weights (orange: exactly -1 or +1)", fontsize=11)
    overall.set_ylabel("% of the weights")
    for place, layer in enumerate(layers):
        axes = figure.add_subplot(panels[place])
        _draw_histogram(axes, weights[layer.name], clipped, bins=41)
        axes.set_title(f"{layer.name}  {layer.shape}", fontsize=8.5)
        axes.tick_params(labelsize=7)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90)
    atomic_write(path, image.getvalue())


def _draw_histogram(axes: object, w: Tensor, clipped: bool, bins: int) -> None:
    """The share of the weights in each bin; the middles of the outermost bins are the ends of the range."""
    values = w.reshape(-1).double().numpy()
    reach = 1.0 if clipped else float(np.abs(values).max()) or 1.0
    half = reach / (bins - 1)
    edges = np.linspace(-reach - half, reach + half, bins + 1)
    heights, saturated = (
        100 * np.histogram(part, edges)[0] / len(values) for part in (values, values[np.abs(values) == 1])
    )
    axes.stairs(heights, edges, fill=True, color="tab:blue")
    if saturated.any():
        axes.stairs(saturated, edges, fill=True, color="tab:orange")
    axes.set_xlim(edges[0] - half, edges[-1] + half)
    axes.set_ylim(0, 1.08 * heights.max())
    axes.grid(axis="y", alpha=0.3)


# -- the script ----------------------------------------------------------------------------------------------


def analyze(loaded: Checkpoint, folder: Path) -> None:
    model = loaded.model(fold=False)
    layers, total, weights = collect(model)
    print("\n".join(report.headline(loaded)))
    print_tables(layers, total)
    print_sizes(model, total)
    print()
    print("\n".join(verdict(total, loaded.kind)))
    clipped = total.in_range == total.count and loaded.kind not in ("float", "unknown")
    title = f"{loaded.path.name}: {report.what_it_is(loaded)}"
    picture = folder / f"{loaded.path.stem}_histograms.png"
    draw(picture, title, layers, weights, clipped=clipped)
    print(f"\nSaved the histograms: {picture}")


def main() -> None:
    parser = cli.ArgumentParser("Weight statistics of a checkpoint, layer by layer: how binary are its weights?")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=Path(BEST), metavar="CKPT", help="what to analyze"
    )
    cli.add_output_option(parser)
    args = parser.parse_args()
    folder = cli.prepare_output_dir(args.output_dir)
    analyze(checkpoints.load(args.checkpoint), folder)


if __name__ == "__main__":
    cli.run(main)
