"""Example: use a binary network. Load it, verify it, classify with it; no BinaryConnect wrapper is needed.

    python3 load_binarized_example.py                               best_model_binarized.pth
    python3 load_binarized_example.py best_model_binary_1bit.pth    the file with one bit a weight
    python3 load_binarized_example.py model.onnx                    an export of save_binary_model.py --onnx

`load_binary_network` is all that a program of yours needs; for ONNX see engine/onnx_export.py, class OnnxNetwork.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import cifar10
from engine import checkpoints, cli, onnx_export
from engine.checkpoints import BINARIZED
from engine.cli import UserError
from engine.evaluate import evaluate
from models import ResNetS
from models.binaryconnect import is_binary
from models.bitpack import fold_normalization
from models.resnet_s import weight_layers


def load_binary_network(path: Path) -> ResNetS:
    """The network of a binarized or 1-bit file: its weights verified, then its normalization folded for speed."""
    loaded = checkpoints.load(path)
    if loaded.kind not in ("binary", checkpoints.BINARY_1BIT):
        advice = (
            "binarize it with eval_binarized.py" if loaded.kind == "latent" else "train with main_binary.py first"
        )
        raise UserError(f"{path}: its weights are {loaded.kind}, not binary; {advice}")
    model = loaded.model(fold=False)  # the weights are still -1 and +1
    layers = weight_layers(model)
    if not all(is_binary(layer.weight) for _, layer in layers):
        raise UserError(f"{path}: holds weights that are neither -1 nor +1")
    print(f"✓ {path}: all {sum(layer.weight.numel() for _, layer in layers):,} weights are -1 or +1")
    return fold_normalization(model)  # the weights are now -scale and +scale: same outputs, less work


def main() -> None:
    parser = cli.ArgumentParser("Example: load a binarized, 1-bit or ONNX network, verify it, classify with it.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(BINARIZED), metavar="CKPT", help="the file")
    cli.add_data_options(parser, batch_size=500)
    args = parser.parse_args()
    device = cli.select_device(args.device, args.threads)
    onnx = args.checkpoint.suffix == ".onnx"
    if onnx:
        model = onnx_export.OnnxNetwork(args.checkpoint)  # its bits are unpacked and its scales folded by the runtime
    else:
        model = load_binary_network(args.checkpoint).to(device, memory_format=torch.channels_last)
    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)
    test = data.test

    def batches(split: cifar10.Split) -> Iterable[tuple[Tensor, Tensor]]:
        """Images and labels: to an ONNX network go the pixels themselves, to a torch network normalized ones."""
        if onnx:
            return zip(split.images.split(args.batch_size), split.labels.split(args.batch_size), strict=True)
        return cifar10.eval_batches(split, args.batch_size, device)

    images, labels = next(iter(batches(test.take(torch.arange(min(5, len(test)))))))
    with torch.no_grad():
        predicted = model(images).argmax(1)  # (5, 3, 32, 32) -> logits (5, 10) -> classes (5,)
    for number, (label, guess) in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True)):
        print(f"  test image {number}: {cifar10.CLASSES[label]:<10}  classified as {cifar10.CLASSES[guess]}")

    scores = evaluate(model, batches(test), len(test), progress="test", path=args.checkpoint)
    print(f"Scored on {data.scored_on}")
    print(scores.accuracy_line())


if __name__ == "__main__":
    cli.run(main)
