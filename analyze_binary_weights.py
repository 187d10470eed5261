"""Weight statistics of a checkpoint, layer by layer: how binary are its weights?

    python3 analyze_binary_weights.py                            best_model.pth
    python3 analyze_binary_weights.py best_model_binarized.pth   another one, 1-bit files too

Only the weights of convolutions and linear layers count: they are what BinaryConnect makes binary. Weights that are
binary but for a scale (XNOR-Net and its kin) and ternary ones are recognized, by layer and by output channel.
Writes best_model_histograms.png, named after the checkpoint: a histogram per layer and one of all. Needs no data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoints, cli, report
from engine.binarized import SCALE_TOLERANCE, Scaled, find_scale
from engine.checkpoints import BEST, Checkpoint
from engine.files import atomic_write
from engine.report import fixed, share
from models import weight_layers
from models.bitpack import information_bytes


@dataclass(frozen=True)
class WeightStats:
    """Statistics of the weights of one layer, or of all of them.

    in_range: weights in [-1, 1], both ends included. between: weights strictly between -1 and +1.
    distance: mean of | |w| - 1 |, how far a weight is from the nearest binary value. std: of the population.
    bytes: of the weights at the fewest bits that hold them, with their scales in float32. scale: see `find_scale`.
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
    bytes: int
    scale: Scaled | None = None

    @classmethod
    def of(cls, name: str, w: Tensor, scale: Scaled | None = None) -> WeightStats:
        """Of a tensor of finite weights, any shape; worked out in float64."""
        w = w.detach().double()
        magnitude = w.abs()
        minus_one, plus_one = int((w == -1).sum()), int((w == 1).sum())
        bits, scales = 32, 0
        if minus_one + plus_one == w.numel():
            bits = 1
        elif scale:
            bits, scales = 2 if scale.ternary else 1, scale.scales
        return cls(
            name=name,
            shape="x".join(map(str, w.shape)),
            count=w.numel(),
            min=w.min().item(),
            max=w.max().item(),
            mean=w.mean().item(),
            std=w.std(correction=0).item(),
            in_range=int((magnitude <= 1).sum()),
            minus_one=minus_one,
            plus_one=plus_one,
            between=int((magnitude < 1).sum()),
            distance=(magnitude - 1).abs().mean().item(),
            bytes=(w.numel() * bits + 7) // 8 + 4 * scales,
            scale=scale,
        )

    @property
    def saturated(self) -> int:
        return self.minus_one + self.plus_one

    @property
    def binary(self) -> bool:
        return self.saturated == self.count

    @property
    def values(self) -> str:
        """The values of a layer's weights, in words."""
        if self.binary:
            return "-1 and +1"
        return f"{self.scale.values} in each {self.scale.per}" if self.scale else "real numbers"


def collect(model: nn.Module) -> tuple[list[WeightStats], WeightStats, dict[str, Tensor]]:
    """The statistics of each layer, of all, and the weights by the layer's name."""
    weights = {name: layer.weight.detach() for name, layer in weight_layers(model)}
    layers = [WeightStats.of(name, w, find_scale(w)) for name, w in weights.items()]
    total = WeightStats.of(f"all {len(layers)} layers", torch.cat([w.reshape(-1) for w in weights.values()]))
    return layers, replace(total, shape="", bytes=sum(layer.bytes for layer in layers)), weights


# -- the report: every line fits 80 columns ------------------------------------------------------------------


def print_tables(layers: list[WeightStats], total: WeightStats) -> None:
    print("\nlayer           shape         count      min      max     mean      std bits")
    for row in _ruled(layers, total):
        numbers = " ".join(f"{fixed(value):>8}" for value in (row.min, row.max, row.mean, row.std))
        bits = f"{8 * row.bytes / row.count:.2g}"
        print(f"{row.name:<15} {row.shape:<9} {row.count:>9,} {numbers} {bits:>4}")
    print("\nlayer           in [-1,1] exactly -1 exactly +1 in between distance     bytes")
    for row in _ruled(layers, total):
        counts = " ".join(f"{count:>10,}" for count in (row.minus_one, row.plus_one, row.between))
        print(f"{row.name:<15} {share(row.in_range, row.count):>9} {counts} {fixed(row.distance):>8} {row.bytes:>9,}")
    print(
        "bits: 1 for a layer of nothing but -1 and +1, and bytes at that width;\n"
        "in between: strictly; distance: mean distance to the nearest binary value"
    )
    if len({row.values for row in layers}) > 1 or any(row.scale and not row.binary for row in layers):
        print_values(layers)


def print_values(layers: list[WeightStats]) -> None:
    """The table of a file whose layers are binary up to a scale, ternary or unlike each other."""
    print(f"\n{'layer':<15} {'weights':<32} {'a from':>8} {'to':>8} {'zeros':>8}\n{'-' * 79}")
    for row in layers:
        scale = row.scale
        cells = (fixed(scale.low), fixed(scale.high), share(scale.zeros, row.count)) if scale else ("-", "-", "-")
        print(f"{row.name:<15} {row.values:<32} " + " ".join(f"{cell:>8}" for cell in cells))
    print(
        f"{'-' * 79}\na: sizes within {SCALE_TOLERANCE:.1%} of each other, a rounding to float16, count as one;\n"
        "bits and bytes: 1 bit for -a and +a, 2 bits with zeros, a float32 for each a"
    )


def _ruled(layers: list[WeightStats], total: WeightStats) -> Iterator[WeightStats]:
    """The rows of a table, with a line before the first and the last."""
    print("-" * 79)
    yield from layers
    print("-" * 79)
    yield total


def print_sizes(model: nn.Module, total: WeightStats) -> None:
    """What one bit per weight saves, of the weights alone and of the whole network."""
    floats = sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())
    packed = (total.count + 7) // 8
    kept, folded = 4 * (floats - total.count), information_bytes(model) - packed
    rows = [("weights alone", 0), ("and all the rest in float32", kept)]
    if folded != kept:
        rows.append(("the same, BatchNorm folded", folded))
    print(f"\n{'size of the numbers, in bytes':<32}{'float32':>12}{'1-bit weights':>16}{'ratio':>9}")
    for label, rest in rows:
        full, small = 4 * total.count + rest, packed + rest
        print(f"{label:<32}{full:>12,}{small:>16,}{full / small:>8.2f}x")


def verdict(layers: list[WeightStats], total: WeightStats, kind: str) -> list[str]:
    """What the weights are, in lines to print; every number is computed from the weights."""
    if total.binary:
        return [
            "✓ Weights appear to be BINARIZED (all values are at or very close to -1 or +1)",
            f"  Exactly -1: {total.minus_one:,} ({share(total.minus_one, total.count)})",
            f"  Exactly +1: {total.plus_one:,} ({share(total.plus_one, total.count)})",
            f"  In between: {total.between:,} ({share(total.between, total.count)})",
        ]
    scales = [layer.scale for layer in layers if layer.scale]
    if len(scales) == len(layers):
        return _scaled_verdict(scales, total)
    outside = total.count - total.in_range
    in_range = f"  {share(total.in_range, total.count)} of weights are between -1 and +1"
    saturated = f"  Saturated, exactly -1 or +1: {total.saturated:,} ({share(total.saturated, total.count)})"
    if scales:
        kinds = Counter(layer.values for layer in layers)
        parts = [f"  {count} of {len(layers)} layers: {values}" for values, count in kinds.most_common()]
        return ["⚠ Weights are MIXED: the layers differ, see the table", *parts, in_range, saturated]
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


def _scaled_verdict(scales: list[Scaled], total: WeightStats) -> list[str]:
    """Of weights that are -a and +a, or -a, 0 and +a, in every layer."""
    per = max((scale.per for scale in scales), key=["layer", "output channel"].index)  # the finer one
    used = [scale for scale in scales if scale.high] or scales  # without layers of zeros
    low, high = min(scale.low for scale in used), max(scale.high for scale in used)
    size = f"a from {low:.4g} to {high:.4g}"
    if any(scale.ternary for scale in scales):
        zeros = share(sum(scale.zeros for scale in scales), total.count)
        return [
            f"⚠ Weights are TERNARY (-a, 0, +a), {zeros} zeros",
            f"  {size}, one in each {per}",
            "  Their signs alone, zeros taken as +1, are another network.",
        ]
    return [
        f"✓ Weights are BINARY UP TO A SCALE (-a and +a in each {per})",
        f"  {size}",
        "  Their signs alone, without the scale, are another network.",
    ]


# -- the picture ---------------------------------------------------------------------------------------------


def draw(path: Path, title: str, layers: list[WeightStats], weights: dict[str, Tensor], *, clipped: bool) -> None:
    """Save a page of histograms: all weights on top, a panel per layer below.

    clipped: show [-1, 1] in every panel; otherwise each panel has its own range.
    """
    from matplotlib.figure import Figure

    columns = 5 if len(layers) <= 60 else 8
    rows = -(-len(layers) // columns)
    # In inches, fixed: fitting the layout to the texts takes several seconds where there are 110 panels.
    width, height = 2.9 * columns, 3.6 + 1.75 * rows
    figure = Figure(figsize=(width, height))
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
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=90))


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
    print("\n".join(verdict(layers, total, loaded.kind)))
    clipped = total.in_range == total.count and loaded.kind not in ("float", "unknown")
    title = f"{loaded.path.name}: {report.what_it_is(loaded)}"
    picture = folder / f"{loaded.path.stem}_histograms.png"
    draw(picture, title, layers, weights, clipped=clipped)
    print(f"\nSaved the histograms: {picture}")


def main() -> None:
    parser = cli.ArgumentParser("Weight statistics of a checkpoint, layer by layer: how binary are its weights?")
    cli.add_checkpoint_options(parser, BEST, "what to analyze")
    cli.add_output_option(parser)
    args = parser.parse_args()
    folder = cli.prepare_output_dir(args.output_dir)
    analyze(checkpoints.load(args.checkpoint, weights_key=args.weights_key), folder)


if __name__ == "__main__":
    cli.run(main)
