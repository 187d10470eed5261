"""Pack a BinaryConnect network to one bit per weight, prove that nothing is lost, and compare the sizes.

    python3 save_binary_model.py                              pack best_model.pth
    python3 save_binary_model.py best_model_binarized.pth     a file of eval_binarized.py gives the same bits
    python3 save_binary_model.py --keep-batchnorm             keep BatchNorm as it is, unfolded
    python3 save_binary_model.py --onnx model.onnx --int8     an ONNX file too, its weights one bit each as well

Writes best_model_binary_1bit.pth, 33,542 bytes of signs for a ResNet-20 and, in float32, a scale and a shift for each
channel. It is written only after it was loaded back and found to be the same network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar10
from engine import binarized, checkpoints, cli, normalization, onnx_export, report
from engine.checkpoints import BEST, BINARIZED, BINARY_1BIT, PACKED, Checkpoint
from engine.cli import UserError
from engine.evaluate import Scores, score_on_test
from engine.files import atomic_write, keep_source
from engine.normalization import Normalization
from models import weight_layers
from models.binaryconnect import count_binary_weights
from models.bitpack import information_bytes, pack_model

CALIBRATION_IMAGES = 1000
INT8_LOSS = 0.2  # percentage points of accuracy that 8-bit activations may cost
INT8_IMAGES = 3  # images that they may cost in any case: one image is a large share of a small set


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Pack a BinaryConnect network to one bit per weight and prove that nothing is lost.")
    cli.add_checkpoint_options(parser, BEST, "latent or binarized weights")
    parser.add_argument(
        "--keep-batchnorm",
        action="store_true",
        help="store BatchNorm as it is instead of one scale and one shift a channel",
    )
    group = parser.add_argument_group("ONNX (needs requirements-onnx.txt)")
    group.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="also export the network to this file: uint8 RGB pixels (N, 32, 32, 3) in, logits (N, 10) out",
    )
    group.add_argument(
        "--int8",
        action="store_true",
        help=f"with activations of 8 bits, their ranges taken from {CALIBRATION_IMAGES:,} training images",
    )
    cli.add_normalization_options(parser)
    cli.add_data_options(parser, batch_size=500)
    cli.add_output_option(parser)
    args = parser.parse_args()
    if args.int8 and not args.onnx:
        raise UserError("--int8: is for --onnx FILE; give both")
    if args.onnx:
        if args.onnx.suffix != ".onnx" or args.onnx.is_dir():  # no checkpoint is overwritten by mistake
            raise UserError(f"--onnx {args.onnx}: give the name of a file that ends in .onnx")
        onnx_export.require("onnx", "onnxruntime")
        cli.prepare_output_dir(args.onnx.parent, option="--onnx: folder")
    return args


def load_source(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint to pack. Raises UserError where it cannot be packed, or would be overwritten."""
    loaded = checkpoints.load(args.checkpoint, weights_key=args.weights_key)
    if loaded.kind == BINARY_1BIT:
        raise UserError(f"{args.checkpoint}: is packed already; give the checkpoint it was made from")
    keep_source(args.checkpoint, args.output_dir / PACKED)
    if args.onnx:
        keep_source(args.checkpoint, args.onnx)
        onnx_export.check_exportable(loaded.model(), args.checkpoint)
    return loaded


def score(model: nn.Module, data: cifar10.Data, args: argparse.Namespace, used: Normalization) -> Scores:
    """Scores on the test images; prints the accuracy."""
    scores = score_on_test(model, data, args, used)
    print(scores.accuracy_line())
    return scores


def prove_same_signs(model: nn.Module, unpacked: nn.Module) -> None:
    """Print that both have the same weights, all -1 or +1; raise RuntimeError naming a layer that differs."""
    for (name, layer), (_, other) in zip(weight_layers(model), weight_layers(unpacked), strict=True):
        if not torch.equal(layer.weight.cpu(), other.weight):
            raise RuntimeError(f"{name}.weight: the unpacked signs differ; nothing was written")
    print(f"✓ Loaded back: all {count_binary_weights(unpacked):,} signs are identical")


def prove_same_logits(expected: Tensor, found: Tensor) -> None:
    """Print how far the logits, float32 (images, 10), are apart; raise RuntimeError where rounding cannot explain it.

    Folding reorders float32 arithmetic through some 20 layers: differences stay near 1e-6 of the largest logit.
    A prediction may differ only where the two best logits are closer than that rounding.
    """
    tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max())
    best = expected.topk(2).values
    other_class = expected.argmax(1) != found.argmax(1)
    if not difference <= tolerance or (other_class & (best[:, 0] - best[:, 1] > 2 * tolerance)).any():
        raise RuntimeError(f"the logits differ by {difference:.2e}, more than rounding explains; nothing was written")
    same = len(expected) - int(other_class.sum())
    print(f"✓ Same predictions on {same:,} of {len(expected):,} images")
    if other_class.any():
        print("  (in the others the two best logits are equal to rounding)")
    print(f"✓ Logits agree: max |difference| {difference:.1e}, max |logit| {float(expected.abs().max()):.3g}")


def print_sizes(loaded: Checkpoint, model: nn.Module, folder: Path) -> None:
    """A table of bytes, measured from the files, and how many times smaller each is than the first of its group."""
    sources = {"binarized" if loaded.kind == "binary" else loaded.kind: loaded.path}
    if loaded.kind != "binary" and binarized.source_of(folder / BINARIZED) == loaded.sha256:
        sources["binarized"] = folder / BINARIZED  # the same network, of eval_binarized.py
    files = {f"{what}, float32 ({path.name})": path.stat().st_size for what, path in sources.items()}
    files[f"1 bit a weight ({PACKED})"] = (folder / PACKED).stat().st_size
    files["information limit: signs, scales, shifts, bias"] = information_bytes(model)
    count = count_binary_weights(model)
    weights = {"the weights alone in float32": 4 * count, "the weights alone, one bit each": (count + 7) // 8}
    print(f"\n{'size':<56}{'bytes':>12}{'ratio':>9}")
    for sizes in (files, weights):
        first, *_ = sizes.values()
        for label, size in sizes.items():
            print(f"{label:<56.55}{size:>12,}{first / size:>8.1f}x")


def save_onnx(
    args: argparse.Namespace, packed: Checkpoint, data: cifar10.Data, expected: Scores, used: Normalization
) -> None:
    """Export the packed network to args.onnx, once it is shown to classify as `expected`, the same in torch.

    Raises UserError where 8-bit activations cost more than INT8_LOSS and INT8_IMAGES, RuntimeError where the float
    form differs.
    """
    images = data.train.images.numpy() if args.int8 else None
    normalized = {"mean": cifar10.MEAN, "std": cifar10.STD} | used
    content = onnx_export.export(packed.model(fold=False), **normalized, calibration=images)
    print(f"\nONNX, {'8-bit' if args.int8 else 'float32'} activations, run by onnxruntime:")
    found = score(onnx_export.OnnxNetwork(content), data, args, {})
    if args.int8:
        lost = expected.accuracy - found.accuracy
        if lost > INT8_LOSS and expected.correct - found.correct > INT8_IMAGES:
            raise UserError(f"--int8: costs {lost:.2f} points of accuracy: {args.onnx} not written; leave --int8 out")
        allowed = f"allowed are at most {INT8_LOSS}, or {INT8_IMAGES} images"
        print(f"✓ 8-bit activations cost {lost:.2f} points of accuracy ({allowed})")
    else:
        prove_same_logits(expected.logits, found.logits)
    atomic_write(args.onnx, content)
    print(f"✓ Saved ONNX model: {args.onnx}, {len(content):,} bytes, checked by the ONNX checker")


def main() -> None:
    args = parse_arguments()
    args.device = cli.select_device(args.device, args.threads)
    folder = cli.prepare_output_dir(args.output_dir)
    loaded = load_source(args)
    print(*report.short_headline(loaded), sep="\n")
    used = normalization.choose(loaded, args, cifar10.MEAN, cifar10.STD)
    model = binarized.binarized_model(loaded)
    data = cifar10.load(args.data_dir, train=args.int8, limit_train=CALIBRATION_IMAGES, limit_test=args.limit_test)

    print(f"Binarized, scored on {data.scored_on}:")
    scores = score(model, data, args, used)
    made = checkpoints.make(loaded.arch, BINARY_1BIT, None)
    made |= pack_model(model, loaded.arch, keep_batchnorm=args.keep_batchnorm)
    made |= {"accuracy": scores.accuracy, "test_images": scores.images, "logit_scale": loaded.logit_scale}
    made |= {"source_sha256": loaded.sha256} | ({"normalization": used} if used else {})
    content = checkpoints.serialize(made)
    packed = checkpoints.load(args.checkpoint, content=content)  # as it will be in the file, before the file is there
    prove_same_signs(model, packed.model(fold=False))
    print("Unpacked and folded, on the same images:")
    unpacked = score(packed.model(), data, args, used)
    try:
        prove_same_logits(scores.logits, unpacked.logits)
    except RuntimeError as error:  # BatchNorm may hold numbers that float32 cannot fold
        raise UserError(f"{args.checkpoint}: cannot be packed: {error}") from error
    binarized.write(folder / PACKED, content, loaded.sha256)
    print(f"✓ Saved 1-bit model: {folder / PACKED}, {len(content):,} bytes")
    print_sizes(loaded, model, folder)
    if args.onnx:
        save_onnx(args, packed, data, unpacked, used)


if __name__ == "__main__":
    cli.run(main)
