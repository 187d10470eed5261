"""Example: use a binary network. Load it, verify it, classify with it; no BinaryConnect wrapper is needed.

    python3 load_binarized_example.py                               best_model_binarized.pth
    python3 load_binarized_example.py best_model_binary_1bit.pth    the file with one bit a weight
    python3 load_binarized_example.py model.onnx                    an export of save_binary_model.py --onnx

`binary_network(checkpoints.load(path))` is all that a program of yours needs; for ONNX see engine/onnx_export.py,
class OnnxNetwork.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import cifar10
from engine import checkpoints, cli, normalization, onnx_export, report
from engine.checkpoints import BINARIZED, Checkpoint
from engine.cli import UserError
from engine.evaluate import evaluate
from models import weight_layers
from models.binaryconnect import is_binary


def binary_network(loaded: Checkpoint) -> nn.Module:
    """The network of a binarized or 1-bit file, in evaluation mode, its weights verified.

    Raises UserError where the weights are not all -1 and +1.
    """
    if loaded.kind not in ("binary", checkpoints.BINARY_1BIT):
        advice = (
            "binarize it with eval_binarized.py" if loaded.kind == "latent" else "train with main_binary.py first"
        )
        raise UserError(f"{loaded.path}: its weights are {loaded.kind}, not binary; {advice}")
    layers = weight_layers(loaded.model(fold=False))
    if not all(is_binary(layer.weight) for _, layer in layers):
        raise UserError(f"{loaded.path}: holds weights that are neither -1 nor +1")
    print(f"✓ {loaded.path}: all {sum(layer.weight.numel() for _, layer in layers):,} weights are -1 or +1")
    return loaded.model()  # of a 1-bit file with its scales folded into the weights: same outputs, less work


def main() -> None:
    parser = cli.ArgumentParser("Example: load a binarized, 1-bit or ONNX network, verify it, classify with it.")
    cli.add_checkpoint_options(parser, BINARIZED, "the file")
    cli.add_normalization_options(parser)
    cli.add_data_options(parser, batch_size=500)
    args = parser.parse_args()
    device = cli.select_device(args.device, args.threads)
    onnx = args.checkpoint.suffix == ".onnx"
    if onnx:
        model = onnx_export.open_network(args)  # its bits are unpacked and its scales folded by the runtime
    else:
        loaded = checkpoints.load(args.checkpoint, weights_key=args.weights_key)
        model = binary_network(loaded).to(device, memory_format=torch.channels_last)
        for note in report.notes(loaded):
            print(note)
        used = normalization.choose(loaded, args, cifar10.MEAN, cifar10.STD)
    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)
    test = data.test

    def batches(split: cifar10.Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels: an ONNX network takes the pixels themselves, a torch network normalized images."""
        if onnx:
            return model.batches(split, args.batch_size)
        return cifar10.eval_batches(split, args.batch_size, device, **used)

    images, labels = next(batches(test.take(torch.arange(min(5, len(test))))))
    with torch.no_grad():
        predicted = model(images).argmax(1)  # (5, 3, 32, 32) -> logits (5, 10) -> classes (5,)
    for number, (label, guess) in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True)):
        print(f"  test image {number}: {cifar10.CLASSES[label]:<10}  classified as {cifar10.CLASSES[guess]}")

    scores = evaluate(model, batches(test), len(test), progress="test", path=args.checkpoint)
    print(f"Scored on {data.scored_on}")
    print(scores.accuracy_line())


if __name__ == "__main__":
    cli.run(main)
