"""Binarize a BinaryConnect checkpoint, verify it, score it, and save the binarized network.

    python3 eval_binarized.py                      binarize best_model.pth
    python3 eval_binarized.py final_model.pth      another checkpoint

Writes best_model_binarized.pth: the weights of every convolution and of the classifier are -1 or +1, in float32;
biases and BatchNorm are as they were trained. save_binary_model.py stores the same network with one bit a weight.
"""

from __future__ import annotations

from torch import nn

import cifar10
from engine import binarized, checkpoints, cli, normalization, report
from engine.checkpoints import BEST, BINARIZED, Checkpoint
from engine.cli import UserError
from engine.evaluate import Scores, score_on_test
from engine.files import keep_source
from models.binaryconnect import count_binary_weights


def binarized_checkpoint(loaded: Checkpoint, model: nn.Module, scores: Scores) -> dict[str, object]:
    """The dictionary to save: what the source said of itself, and the accuracy measured here.

    What the source recorded of weights that were not binarized is left out.
    """
    recorded = loaded.metrics if loaded.kind == "latent" else {}
    measured = {"test_accuracy": scores.accuracy, "test_loss": scores.loss, "test_images": scores.images}
    return checkpoints.make(
        loaded.arch,
        "binary",
        model.state_dict(),
        epoch=loaded.epoch,
        metrics=recorded | measured,
        config=loaded.config,
        versions=checkpoints.library_versions(),
        logit_scale=loaded.logit_scale,
        source_sha256=loaded.sha256,
    )


def main() -> None:
    parser = cli.ArgumentParser("Binarize a BinaryConnect checkpoint, verify, score and save the binarized network.")
    cli.add_checkpoint_options(parser, BEST, "what to binarize")
    cli.add_normalization_options(parser)
    cli.add_data_options(parser, batch_size=500)
    cli.add_output_option(parser)
    args = parser.parse_args()
    args.device = cli.select_device(args.device, args.threads)
    made = cli.prepare_output_dir(args.output_dir) / BINARIZED
    loaded = checkpoints.load(args.checkpoint, weights_key=args.weights_key)
    if loaded.kind in ("binary", checkpoints.BINARY_1BIT):
        raise UserError(
            f"{args.checkpoint}: its weights are binary already; score it with eval.py or load_binarized_example.py"
        )
    keep_source(args.checkpoint, made)

    print(*report.short_headline(loaded), sep="\n")
    used = normalization.choose(loaded, args, cifar10.MEAN, cifar10.STD)
    model = binarized.binarized_model(loaded)
    count_binary_weights(model)  # raises where one is not
    print("✓ All convolution/linear weights are binary {-1, +1}")
    data = cifar10.load(args.data_dir, train=False, limit_test=args.limit_test)
    scores = score_on_test(model, data, args, used, logit_scale=loaded.logit_scale)
    print(f"Scored on {data.scored_on}")
    print(scores.accuracy_line())

    recorded = {"normalization": used} if used else {}
    content = checkpoints.serialize(binarized_checkpoint(loaded, model, scores) | recorded)
    binarized.write(made, content, loaded.sha256)
    print(f"✓ Saved binarized model: {len(content) / 1e6:.2f} MB\n  {made}")


if __name__ == "__main__":
    cli.run(main)
