"""Pack a BinaryConnect network to one bit per weight, prove that nothing is lost, and compare the sizes.

    python3 save_binary_model.py                              pack best_model.pth
    python3 save_binary_model.py best_model_binarized.pth     a file of eval_binarized.py gives the same bits
    python3 save_binary_model.py --keep-batchnorm             keep BatchNorm as it is, for further training

Writes best_model_binary_1bit.pth, 33,542 bytes of signs for a ResNet-20 and, in float32, a scale and a shift for each
channel. It is written only after it was loaded back and found to be the same network.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import cifar10
from engine import binarised, checkpoint, cli
from engine.checkpoint import BEST, BINARIZED, BINARY_1BIT, PACKED, Checkpoint
from engine.cli import UserError
from engine.evaluate import Scores, evaluate
from models import ResNetS
from models.bitpack import information_bytes, pack_model
from models.resnet_s import weight_layers


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Pack a BinaryConnect network to one bit per weight and prove that nothing is lost.")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=Path(BEST), metavar="CKPT", help="latent or binarised weights"
    )
    parser.add_argument(
        "--keep-batchnorm",
        action="store_true",
        help="store BatchNorm as it is instead of one scale and one shift a channel: for further training",
    )
    cli.add_data_options(parser, batch_size=500)
    cli.add_output_option(parser)
    return parser


def score(model: nn.Module, data: cifar10.Data, batch_size: int, device: torch.device) -> tuple[Scores, Tensor]:
    """Scores on the test images, printed, and the logits, float32 (images, 10) on the CPU."""
    logits: list[Tensor] = []
    torch.backends.cudnn.allow_tf32 = False  # its 10-bit products would hide what is compared here
    placed = model.to(device, memory_format=torch.channels_last)
    handle = placed.register_forward_hook(lambda _module, _inputs, output: logits.append(output.float().cpu()))
    batches = cifar10.eval_batches(data.test, batch_size, device)
    scores = evaluate(placed, batches, len(data.test), progress="test")
    handle.remove()
    print(scores.accuracy_line())
    return scores, torch.cat(logits)


def prove_same_signs(model: ResNetS, unpacked: ResNetS) -> None:
    """Print that both have the same weights, all -1 or +1; raise RuntimeError naming a layer that differs."""
    count = 0
    for (name, layer), (_, other) in zip(weight_layers(model), weight_layers(unpacked), strict=True):
        if not torch.equal(layer.weight.cpu(), other.weight.cpu()):
            raise RuntimeError(f"{name}.weight: the unpacked signs differ; nothing was written")
        count += layer.weight.numel()
    print(f"✓ Loaded back: all {count:,} signs are identical")


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
    print(f"✓ Logits agree: max |difference| {difference:.1e}, max |logit| {float(expected.abs().max()):.1f}")


def pack(loaded: Checkpoint, model: ResNetS, scores: Scores, *, keep_batchnorm: bool) -> bytes:
    """The content of the 1-bit file: signs, floats and a short description."""
    about = {"accuracy": scores.accuracy, "test_images": scores.images, "logit_scale": loaded.logit_scale}
    packed = pack_model(model, loaded.arch, keep_batchnorm=keep_batchnorm)
    made = checkpoint.make(loaded.arch, BINARY_1BIT, None) | packed | about
    return checkpoint.serialise(made | {"source_sha256": loaded.sha256})


def binarised_file(loaded: Checkpoint, model: ResNetS, folder: Path) -> tuple[str, int]:
    """Name and bytes of the same network in float32: a file that is there, or one serialised in memory."""
    if loaded.kind == "binary":
        return loaded.path.name, loaded.path.stat().st_size
    path = folder / BINARIZED
    try:
        if checkpoint.load(path).source_sha256 == loaded.sha256:
            return BINARIZED, path.stat().st_size
    except UserError:
        pass  # not there, or not a checkpoint
    content = checkpoint.serialise(checkpoint.make(loaded.arch, "binary", model.state_dict()))
    return "in memory", len(content)


def print_sizes(loaded: Checkpoint, model: ResNetS, packed_bytes: int, folder: Path) -> None:
    """A table of bytes, measured from the files, and how many times smaller each is than the first."""
    name, size = binarised_file(loaded, model, folder)
    rows = [(f"binarised, float32 ({name})", size), (f"1 bit a weight ({PACKED})", packed_bytes)]
    if loaded.kind != "binary":
        rows.insert(0, (f"{loaded.kind}, float32 ({loaded.path.name})", loaded.path.stat().st_size))
    rows.append(("information limit: signs, scales, shifts, bias", information_bytes(model)))
    print(f"\n{'size':<56}{'bytes':>12}{'ratio':>9}")
    for label, count in rows:
        print(f"{label:<56.55}{count:>12,}{rows[0][1] / count:>8.1f}x")
    weights = sum(layer.weight.numel() for _, layer in weight_layers(model))
    print(f"{'the weights alone in float32':<56}{4 * weights:>12,}{1:>8.1f}x")
    print(
        f"{'the weights alone, one bit each':<56}{(weights + 7) // 8:>12,}{4 * weights / ((weights + 7) // 8):>8.1f}x"
    )


def main() -> None:
    args = make_parser().parse_args()
    device = cli.select_device(args.device, args.threads)
    folder = cli.prepare_output_dir(args.output_dir)
    loaded = checkpoint.load(args.checkpoint)
    if loaded.kind == BINARY_1BIT:
        raise UserError(f"{args.checkpoint}: is packed already; give the checkpoint it was made from")
    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)

    print(f"{args.checkpoint}: {loaded.arch}, {loaded.kind} weights")
    model = binarised.binarised_model(loaded)
    print(f"Binarised, scored on {data.scored_on}:")
    scores, logits = score(model, data, args.batch_size, device)
    content = pack(loaded, model, scores, keep_batchnorm=args.keep_batchnorm)
    path = folder / PACKED
    unpacked = checkpoint.load(path, content)  # as it will be in the file, before the file is there
    prove_same_signs(model, unpacked.model(fold=False))
    print("Unpacked and folded, on the same images:")
    prove_same_logits(logits, score(unpacked.model(), data, args.batch_size, device)[1])
    binarised.write(path, content, loaded.sha256)
    if path.read_bytes() != content:
        raise RuntimeError(f"{path}: reads back other than it was written")
    print(f"✓ Saved 1-bit model: {path}, {len(content):,} bytes")
    print_sizes(loaded, model, len(content), folder)


if __name__ == "__main__":
    cli.run(main)
