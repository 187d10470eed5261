"""Example: use a binary network. Load it, verify it, classify with it; no BinaryConnect wrapper is needed.

    python3 load_binarized_example.py                               best_model_binarized.pth
    python3 load_binarized_example.py best_model_binary_1bit.pth    the file with one bit a weight
    python3 load_binarized_example.py model.onnx                    an export of save_binary_model.py --onnx

`binary_network(checkpoints.load(path))` is all that a program of yours needs; for ONNX see engine/onnx_export.py,
class OnnxNetwork.
"""

from __future__ import annotations

from torch import nn

import cifar10
from engine import checkpoints, cli, normalization, onnx_export, report
from engine.binarized import require_sign
from engine.checkpoints import BINARIZED, Checkpoint
from engine.cli import UserError
from engine.evaluate import score_on_test
from models.binaryconnect import count_binary_weights


def binary_network(loaded: Checkpoint) -> nn.Module:
    """The network of a binarized or 1-bit file, in evaluation mode, its weights verified.

    Raises UserError for another kind of file, ValueError where a weight is neither -1 nor +1.
    """
    require_sign(loaded)
    if loaded.kind not in ("binary", checkpoints.BINARY_1BIT):
        advice = {"latent": "binarize it with eval_binarized.py"}.get(loaded.kind, "train with main_binary.py first")
        raise UserError(f"{loaded.path}: its weights are {loaded.kind}, not binary; {advice}")
    print(f"✓ {loaded.path}: all {count_binary_weights(loaded.model(fold=False)):,} weights are -1 or +1")
    return loaded.model()  # of a 1-bit file with its scales folded into the weights: same outputs, less work


def main() -> None:
    parser = cli.ArgumentParser("Example: load a binarized, 1-bit or ONNX network, verify it, classify with it.")
    cli.add_checkpoint_options(parser, BINARIZED, "the file")
    cli.add_normalization_options(parser)
    cli.add_data_options(parser, batch_size=500)
    args = parser.parse_args()
    args.device = cli.select_device(args.device, args.threads)
    if args.checkpoint.suffix == ".onnx":
        model, used = onnx_export.open_network(args), {}  # its graph unpacks the bits and normalizes
    else:
        loaded = checkpoints.load(args.checkpoint, weights_key=args.weights_key)
        model = binary_network(loaded)
        for note in report.notes(loaded):
            print(note)
        used = normalization.choose(loaded, args, cifar10.MEAN, cifar10.STD)

    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)
    scores = score_on_test(model, data, args, used)
    predicted = scores.logits.argmax(1)  # logits (images, 10) -> classes (images,)
    for number, (label, guess) in enumerate(zip(data.test.labels[:5], predicted[:5], strict=True)):
        print(f"  test image {number}: {cifar10.CLASSES[label]:<10}  classified as {cifar10.CLASSES[guess]}")
    print(f"Scored on {data.scored_on}")
    print(scores.accuracy_line())


if __name__ == "__main__":
    cli.run(main)
