"""Binarize a BinaryConnect checkpoint, verify it, score it, and save the binarized network.

    python3 eval_binarized.py                      binarize best_model.pth
    python3 eval_binarized.py final_model.pth      another checkpoint

Writes best_model_binarized.pth: the weights of every convolution and of the classifier are -1 or +1, in float32;
biases and BatchNorm are as they were trained. save_binary_model.py stores the same network with one bit a weight.
"""

from __future__ import annotations

from pathlib import Path

import torch

import cifar10
from engine import binarized, checkpoints, cli
from engine.checkpoints import BEST, BINARIZED, Checkpoint
from engine.cli import UserError
from engine.evaluate import Scores, evaluate
from engine.files import keep_source
from models import ResNetS
from models.binaryconnect import is_binary
from models.resnet_s import weight_layers


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Binarize a BinaryConnect checkpoint, verify, score and save the binarized network.")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=Path(BEST), metavar="CKPT", help="what to binarize"
    )
    cli.add_data_options(parser, batch_size=500)
    cli.add_output_option(parser)
    return parser


def verify(model: ResNetS) -> None:
    """Print that every convolution and linear weight is -1 or +1; raise RuntimeError naming one that is not."""
    for name, layer in weight_layers(model):
        if not is_binary(layer.weight):
            raise RuntimeError(f"{name}.weight holds values other than -1 and +1")
    print("✓ All convolution/linear weights are binary {-1, +1}")


def binarized_checkpoint(loaded: Checkpoint, model: ResNetS, scores: Scores) -> dict[str, object]:
    """The dictionary to save: what the source said of itself, and the accuracy measured here.

    What it recorded of other weights than these signs, of those before they were binarized, say, or of the epoch
    before the one it was stopped in, is left out.
    """
    recorded = loaded.metrics if loaded.kind == "latent" and not loaded.steps_beyond else {}
    measured = {"test_accuracy": scores.accuracy, "test_loss": scores.loss, "test_images": scores.images}
    return checkpoints.make(
        loaded.arch,
        "binary",
        model.state_dict(),
        epoch=None if loaded.steps_beyond else loaded.epoch,
        metrics=recorded | measured,
        config=loaded.config,
        versions=checkpoints.library_versions(),
        logit_scale=loaded.logit_scale,
        source_sha256=loaded.sha256,
    )


def main() -> None:
    args = make_parser().parse_args()
    device = cli.select_device(args.device, args.threads)
    folder = cli.prepare_output_dir(args.output_dir)
    loaded = checkpoints.load(args.checkpoint)
    if loaded.kind in ("binary", checkpoints.BINARY_1BIT):
        raise UserError(
            f"{args.checkpoint}: its weights are binary already; score it with eval.py or load_binarized_example.py"
        )
    keep_source(args.checkpoint, folder / BINARIZED)
    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)

    print(f"{args.checkpoint}: {loaded.arch}, {loaded.kind} weights")
    model = binarized.binarized_model(loaded)
    verify(model)
    placed = model.to(device, memory_format=torch.channels_last)
    batches = cifar10.eval_batches(data.test, args.batch_size, device)
    scores = evaluate(
        placed, batches, len(data.test), logit_scale=loaded.logit_scale, progress="test", path=loaded.path
    )
    print(f"Scored on {data.scored_on}")
    print(scores.accuracy_line())

    content = checkpoints.serialize(binarized_checkpoint(loaded, model, scores))
    binarized.write(folder / BINARIZED, content, loaded.sha256)
    print(f"✓ Saved binarized model: {len(content) / 1e6:.2f} MB")
    print(f"  {folder / BINARIZED}")


if __name__ == "__main__":
    cli.run(main)
