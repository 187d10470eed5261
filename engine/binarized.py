"""What eval_binarized.py and save_binary_model.py share: binary networks made from checkpoints, and their files."""

from __future__ import annotations

from pathlib import Path

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import UserError
from engine.files import archive, atomic_write
from models import ResNetS
from models.binaryconnect import binarize_model


def binarized_model(loaded: Checkpoint) -> ResNetS:
    """The network of a checkpoint with -1 and +1 for weights, BatchNorm as it is, in evaluation mode, on the CPU.

    Prints one line where the weights were not trained to be binarized. A 1-bit file is not for this function.
    """
    if loaded.kind == "float":
        print(f"⚠ {loaded.path}: float weights, not trained with BinaryConnect: binarized, they may be near chance.")
    elif loaded.kind == "unknown":
        print(f"⚠ {loaded.path}: does not say whether BinaryConnect made its weights: binarized all the same.")
    model = loaded.model()
    binarize_model(model)
    return model


def write(path: Path, content: bytes, source_sha256: str) -> None:
    """Write a file made from the checkpoint with that SHA-256; one made from any other is moved aside first.

    Raises UserError where that cannot be done; no file is lost.
    """
    if path.exists() and _source_of(path) != source_sha256:
        moved = archive(path.parent, [path.name])
        print(f"{path} was made from another checkpoint: moved to {moved}.")
    atomic_write(path, content)


def _source_of(path: Path) -> str | None:
    try:
        return checkpoints.load(path).source_sha256
    except UserError:
        return None  # whatever it is, we did not make it from this source
