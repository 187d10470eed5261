"""Score a checkpoint on the test set, as it was saved.

    python3 eval.py                            best_model.pth
    python3 eval.py best_model_binarized.pth   another one, 1-bit files too
    python3 eval.py model.onnx                 an export of save_binary_model.py --onnx
    python3 eval.py --plot samples.png         also draw the confusion matrix and some predictions

Latent weights of BinaryConnect are scored as they are too, but that figure means little: see eval_binarized.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

import cifar10
from engine import checkpoints, cli, normalization, onnx_export, report, runtime
from engine.checkpoints import BEST
from engine.cli import UserError
from engine.evaluate import Scores, score_on_test
from engine.files import atomic_write, keep_source
from models.quantizers import SIGN_QUANTIZERS

LATENT_NOTE = """\
⚠ These are latent weights. The BatchNorm statistics beside them come from
  forward passes with quantized weights, so the figure below means little."""
BINARIZED_NOTE = "  The one that counts is that of the binarized network: see eval_binarized.py."


# -- the report ----------------------------------------------------------------------------------------------


def print_scores(scores: Scores, data: cifar10.Data, logit_scale: float) -> None:
    print(f"\n{scores.accuracy_line()}")
    scaled = f" (logits times logit_scale, {logit_scale:g})" if logit_scale != 1 else ""
    print(f"Test loss: {scores.loss:.4f} nats per image{scaled}")
    print(f"Scored on: {data.scored_on}")
    print(f"Speed: {scores.images / max(scores.seconds, 1e-9):,.0f} images/s")
    print(f"\n{'class':<12}{'images':>8}{'correct':>9}{'accuracy':>10}   most often taken for")
    for label, name in enumerate(cifar10.CLASSES):
        row = scores.confusion[label].clone()
        images, correct = int(row.sum()), int(row[label])
        accuracy = f"{100 * correct / images:.2f}%" if images else "-"
        row[label] = 0  # in this copy the mistakes are left
        count, other = (int(value) for value in row.max(0))
        mistaken = f"{cifar10.CLASSES[other]} ({count:,})" if count else ""
        print(f"{name:<12}{images:>8,}{correct:>9,}{accuracy:>10}   {mistaken}".rstrip())


# -- the picture ---------------------------------------------------------------------------------------------


def draw(path: Path, title: str, scores: Scores, split: cifar10.Split) -> None:
    """Save the page: confusion matrix on the left, the first right and wrong predictions on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 8.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    report.draw_title(figure, title)
    _draw_confusion(left.subplots(), scores)
    top, bottom = right.subfigures(2, 1)
    hits = scores.logits.argmax(1) == split.labels
    _draw_samples(top, "Right: the first ones in the test set", hits, scores, split)
    _draw_samples(bottom, "Wrong: the first ones, predicted (true)", ~hits, scores, split)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _draw_confusion(axes: object, scores: Scores) -> None:
    shares = 100 * scores.confusion.double() / scores.confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    for true, row in enumerate(scores.confusion.tolist()):
        for predicted, count in enumerate(row):
            color = "white" if shares[true, predicted] > 55 else "black" if count else "0.75"
            axes.text(predicted, true, f"{count:,}", ha="center", va="center", color=color, fontsize=10)
    places = range(len(cifar10.CLASSES))
    axes.set_xticks(places, cifar10.CLASSES, rotation=45, ha="right")
    axes.set_yticks(places, cifar10.CLASSES)
    axes.set(
        xlabel="predicted class", ylabel="true class", title="Confusion matrix (images; color: share of the row)"
    )


def _draw_samples(figure: object, title: str, chosen: Tensor, scores: Scores, split: cifar10.Split) -> None:
    """The first images where `chosen`, bool (images,), is true, in three rows of eight with their predictions."""
    grid = figure.subplots(3, 8).flatten()
    indices = chosen.nonzero()[: len(grid), 0].tolist()
    figure.suptitle(title if indices else f"{title}: none")
    for axes in grid:
        axes.axis("off")
    for axes, index in zip(grid, indices, strict=False):
        predicted, label = int(scores.logits[index].argmax()), int(split.labels[index])
        name, color = cifar10.CLASSES[predicted], "tab:green"
        if predicted != label:
            name, color = f"{name}\n({cifar10.CLASSES[label]})", "tab:red"
        axes.imshow(split.images[index].numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=9, color=color)


# -- the script ----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Score a checkpoint on the test set, as it was saved.")
    cli.add_checkpoint_options(parser, BEST, "what to score")
    cli.add_normalization_options(parser)
    cli.add_data_options(parser, batch_size=500)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="save the confusion matrix and some predictions as this PNG"
    )
    args = parser.parse_args()
    if args.plot:
        if args.plot.suffix.lower() != ".png" or args.plot.is_dir():
            raise UserError(f"--plot {args.plot}: a PNG is written; give the name of a file that ends in .png")
        cli.prepare_output_dir(args.plot.parent, option="--plot: folder")
        if args.checkpoint.exists():
            keep_source(args.checkpoint, args.plot)
    return args


def main() -> None:
    args = parse_arguments()
    path = args.checkpoint
    args.device = cli.select_device(args.device, args.threads)
    runtime.keep_freed_memory()
    if path.suffix == ".onnx":
        model, what, scale, used = onnx_export.open_network(args), "ONNX network", 1.0, {}
        print(f"{path}\n  {what}")
    else:
        loaded = checkpoints.load(path, weights_key=args.weights_key)
        model, what, scale = loaded.model(), report.what_it_is(loaded), loaded.logit_scale
        print(*report.headline(loaded), sep="\n")
        if loaded.kind == "latent":
            print(LATENT_NOTE)
            if loaded.quantizer in SIGN_QUANTIZERS:
                print(BINARIZED_NOTE)
        used = normalization.choose(loaded, args, cifar10.MEAN, cifar10.STD)

    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)
    scores = score_on_test(model, data, args, used, logit_scale=scale)
    print_scores(scores, data, scale)
    if args.plot:
        # With the kind of the weights: a picture travels without the warning printed above.
        draw(args.plot, f"{path.name}: {what}: {scores.accuracy:.2f}% on {data.scored_on}", scores, data.test)
        print(f"\nSaved the confusion matrix and sample predictions: {args.plot}")


if __name__ == "__main__":
    cli.run(main)
