"""Weight statistics of a checkpoint, layer by layer: how binary are its weights?

    python3 analyze_binary_weights.py                            best_model.pth
    python3 analyze_binary_weights.py best_model_binarized.pth   another one, 1-bit files too

Only the weights of convolutions and linear layers count: they are what BinaryConnect makes binary. Weights that are
binary but for a scale (XNOR-Net and its kin) and ternary ones are recognized, by layer and by output channel.
Writes best_model_histograms.png, named after the checkpoint: a histogram per layer and one of all. Needs no data.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoints, cli, report
from engine.binarized import SCALE_TOLERANCE, Scaled, find_scale
from engine.checkpoints import BEST
from engine.files import atomic_write
from engine.report import fixed, share
from models import weight_layers
from models.bitpack import information_bytes


class WeightStats:
    """Statistics of the weights of one layer, or of all of them; computed in float64.

    w: any shape, finite. scale: see `find_scale`.
    """

    def __init__(self, name: str, w: Tensor, scale: Scaled | None = None) -> None:
        w = w.detach().double()
        self.name, self.scale = name, scale
        self.shape, self.count = "x".join(map(str, w.shape)), w.numel()
        self.min, self.max, self.mean = w.min().item(), w.max().item(), w.mean().item()
        self.std = w.std(correction=0).item()  # of the population
        self.minus_one, self.plus_one = int((w == -1).sum()), int((w == 1).sum())
        self.saturated = self.minus_one + self.plus_one
        self.between = int((w.abs() < 1).sum())  # strictly between -1 and +1
        self.in_range = self.saturated + self.between
        self.distance = (w.abs() - 1).abs().mean().item()  # mean distance of a weight to the nearest binary value
        self.binary = self.saturated == self.count

    @property
    def bytes(self) -> int:
        """Of the weights at the fewest bits that hold them, with their scales in float32."""
        if self.binary or not self.scale:
            return (self.count * (1 if self.binary else 32) + 7) // 8
        return (self.count * (2 if self.scale.ternary else 1) + 7) // 8 + 4 * self.scale.scales

    @property
    def values(self) -> str:
        """The values of a layer's weights, in words."""
        if self.binary:
            return "-1 and +1"
        return f"{self.scale.values} in each {self.scale.per}" if self.scale else "real numbers"


# -- the report: every line fits 80 columns ------------------------------------------------------------------


def print_tables(layers: list[WeightStats], total: WeightStats) -> None:
    size = sum(layer.bytes for layer in layers)
    rows, more = [], []
    for row in (*layers, total):
        bytes, shape = (size, "") if row is total else (row.bytes, row.shape)
        numbers = " ".join(f"{fixed(value):>8}" for value in (row.min, row.max, row.mean, row.std))
        rows.append(f"{row.name:<15} {shape:<9} {row.count:>9,} {numbers} {f'{8 * bytes / row.count:.2g}':>4}")
        counts = " ".join(f"{count:>10,}" for count in (row.minus_one, row.plus_one, row.between))
        in_range = f"{share(row.in_range, row.count):>9}"
        more.append(f"{row.name:<15} {in_range} {counts} {fixed(row.distance):>8} {bytes:>9,}")
    _print_table("layer           shape         count      min      max     mean      std bits", *rows)
    _print_table("layer           in [-1,1] exactly -1 exactly +1 in between distance     bytes", *more)
    print("bits: 1 for a layer of nothing but -1 and +1, and bytes at that width;")
    print("in between: strictly; distance: mean distance to the nearest binary value")
    if len({row.values for row in layers}) > 1 or any(row.scale and not row.binary for row in layers):
        print_values(layers)


def print_values(layers: list[WeightStats]) -> None:
    """The table of a file whose layers are binary up to a scale, ternary or unlike each other."""
    rows = []
    for row in layers:
        scale = row.scale
        cells = (fixed(scale.low), fixed(scale.high), share(scale.zeros, row.count)) if scale else ("-", "-", "-")
        rows.append(f"{row.name:<15} {row.values:<32} " + " ".join(f"{cell:>8}" for cell in cells))
    note = f"a: sizes within {SCALE_TOLERANCE:.1%} of each other, a rounding to float16, count as one;"
    _print_table("layer           weights                            a from       to    zeros", *rows, note)
    print("bits and bytes: 1 bit for -a and +a, 2 bits with zeros, a float32 for each a")


def _print_table(head: str, *rows: str) -> None:
    """The last row is below a line of its own."""
    line = "-" * 79
    print(f"\n{head}", line, *rows[:-1], line, rows[-1], sep="\n")


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

    def part(words: str, count: int) -> str:
        return f"  {words}: {count:,} ({share(count, total.count)})"

    if total.binary:
        return [
            "✓ Weights appear to be BINARIZED (all values are at or very close to -1 or +1)",
            part("Exactly -1", total.minus_one),
            part("Exactly +1", total.plus_one),
            part("In between", total.between),
        ]
    scales = [layer.scale for layer in layers if layer.scale]
    if len(scales) == len(layers):
        return _scaled_verdict(scales, total)
    in_range = f"  {share(total.in_range, total.count)} of weights are between -1 and +1"
    saturated = part("Saturated, exactly -1 or +1", total.saturated)
    if scales:
        kinds = Counter(layer.values for layer in layers)
        parts = [f"  {count} of {len(layers)} layers: {values}" for values, count in kinds.most_common()]
        return ["⚠ Weights are MIXED: the layers differ, see the table", *parts, in_range, saturated]
    if total.in_range < total.count:
        outside = part("Outside", total.count - total.in_range)
        return [
            "✗ Weights are neither clipped to [-1, 1] nor binarized",
            in_range,
            f"{outside}, min {total.min:.6g}, max {total.max:.6g}",
            saturated,
        ]
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
    per = "output channel" if any(scale.per == "output channel" for scale in scales) else "layer"
    used = [scale for scale in scales if scale.high] or scales  # without layers of zeros
    size = f"a from {min(scale.low for scale in used):.4g} to {max(scale.high for scale in used):.4g}"
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


def draw(path: Path, title: str, weights: dict[str, Tensor], *, clipped: bool) -> None:
    """Save a page of histograms: all weights on top, a panel per layer below.

    clipped: show [-1, 1] in every panel; otherwise each panel has its own range.
    """
    from matplotlib.figure import Figure

    columns = 5 if len(weights) <= 60 else 8
    rows = 2 - (-len(weights) // columns)  # the first two are for all weights together
    # In inches, fixed: fitting the layout to the texts takes several seconds where there are 110 panels.
    width, height = 2.9 * columns, 1 + 1.75 * rows
    figure = Figure(figsize=(width, height))
    report.draw_title(figure, title, y=1 - 0.15 / height, va="top")
    figure.subplots_adjust(0.8 / width, 0.35 / height, 1 - 0.2 / width, 1 - 0.75 / height, 0.2, 0.42)
    everything = torch.cat([w.reshape(-1) for w in weights.values()])
    overall = figure.add_subplot(rows, 1, (1, 2))
    _draw_histogram(overall, everything, clipped, bins=101)
    overall.set_title(f"all {len(everything):,} weights (orange: exactly -1 or +1)", fontsize=11)
    overall.set_ylabel("% of the weights")
    for place, (name, w) in enumerate(weights.items(), 1 + 2 * columns):
        axes = figure.add_subplot(rows, columns, place)
        _draw_histogram(axes, w, clipped, bins=41)
        axes.set_title(f"{name}  {'x'.join(map(str, w.shape))}", fontsize=8.5)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=5)  # more labels as long as -0.00025 would touch
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


def main() -> None:
    parser = cli.ArgumentParser("Weight statistics of a checkpoint, layer by layer: how binary are its weights?")
    cli.add_checkpoint_options(parser, BEST, "what to analyze")
    cli.add_output_option(parser)
    args = parser.parse_args()
    folder = cli.prepare_output_dir(args.output_dir)
    loaded = checkpoints.load(args.checkpoint, weights_key=args.weights_key)
    model = loaded.model(fold=False)
    weights = {name: layer.weight.detach() for name, layer in weight_layers(model)}
    layers = [WeightStats(name, w, find_scale(w)) for name, w in weights.items()]
    total = WeightStats(f"all {len(layers)} layers", torch.cat([w.reshape(-1) for w in weights.values()]))

    print(*report.headline(loaded), sep="\n")
    print_tables(layers, total)
    if not loaded.other_quantizer:  # one bit would not hold that network
        print_sizes(model, total)
    print("", *verdict(layers, total, loaded.kind), sep="\n")
    clipped = total.in_range == total.count and loaded.kind not in ("float", "unknown")
    picture = folder / f"{loaded.path.stem}_histograms.png"
    draw(picture, f"{loaded.path.name}: {report.what_it_is(loaded)}", weights, clipped=clipped)
    print(f"\nSaved the histograms: {picture}")


if __name__ == "__main__":
    cli.run(main)
