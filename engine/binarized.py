"""Binary networks: telling weights that are binary but for a scale, making them from checkpoints, their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import UserError
from engine.files import archive, atomic_write
from models import weight_layers
from models.binaryconnect import binarize_model, is_binary
from models.quantizers import SIGN_QUANTIZERS

SCALE_TOLERANCE = 2**-10  # relative: numbers so close are one number, rounded to float16 in two ways


@dataclass(frozen=True)
class Scaled:
    """The weights of a layer where each is -a or +a, or, in a ternary layer, 0.

    per: "layer" or "output channel", each of which has an a of its own. scales: how many there are.
    low, high: the smallest and the largest a. zeros: weights that are 0, those of a channel with a = 0 included.
    """

    ternary: bool
    per: str
    scales: int
    low: float
    high: float
    zeros: int

    @property
    def values(self) -> str:
        return "-a, 0, +a" if self.ternary else "-a and +a"


def find_scale(w: Tensor) -> Scaled | None:
    """How the weights (out, ...) of a layer are -a and +a, or -a, 0 and +a; None where they are neither.

    Magnitudes count as one a where they differ by at most SCALE_TOLERANCE of the largest. A scale per layer is
    preferred to one per output channel, binary to ternary. An output channel of zeros in an otherwise binary layer
    has a = 0; a layer of zeros is ternary. Fewer than two non-zero weights to a scale show nothing: None.
    """
    size = w.detach().abs().double().reshape(len(w), -1)
    for ternary in (False, True):
        for per, groups in (("layer", size.reshape(1, -1)), ("output channel", size)):
            high, nonzero = groups.amax(1), groups > 0
            low = groups.masked_fill(~nonzero, torch.inf).amin(1)  # infinite in a group of zeros
            used = high > 0
            if not ternary and not (used.any() and torch.equal(nonzero.all(1), used)):
                continue
            if nonzero.sum() >= 2 * used.sum() and (~used | (high - low <= SCALE_TOLERANCE * high)).all():
                a = high[used] if ternary and used.any() else high
                return Scaled(ternary, per, len(groups), a.min().item(), a.max().item(), int((size == 0).sum()))
    return None


def require_sign(loaded: Checkpoint) -> None:
    """Raises UserError for latent weights that were trained with another quantizer than a sign."""
    if loaded.other_quantizer:
        raise UserError(
            f"{loaded.path}: its latent weights were trained with the quantizer {loaded.quantizer!r}: their signs "
            f"are not the network; only weights of {' or '.join(SIGN_QUANTIZERS)} can be binarized"
        )


def binarized_model(loaded: Checkpoint) -> nn.Module:
    """The network of a checkpoint with -1 and +1 for weights, BatchNorm as it is, in evaluation mode, on the CPU.

    Prints one line where the weights were not trained to be binarized. A 1-bit file is not for this function.
    Raises UserError as `require_sign` does.
    """
    require_sign(loaded)
    model = loaded.model()
    if loaded.kind in ("float", "unknown"):
        print(f"⚠ {loaded.path}: {_warning(model, loaded.kind)}")
    binarize_model(model)
    return model


def _warning(model: nn.Module, kind: str) -> str:
    layers = [layer.weight for _, layer in weight_layers(model)]
    found = [scale for w in layers if not is_binary(w) and (scale := find_scale(w))]
    which = "its weights" if len(found) == len(layers) else f"its weights in {len(found)} of {len(layers)} layers"
    if any(scale.ternary for scale in found):
        return f"{which} are ternary: zeros become +1 and the scale is lost; the signs alone are another network."
    if found:
        return f"{which} are binary up to a scale: the scale is lost; the signs alone are another network."
    if kind == "float":
        return "float weights, not trained with BinaryConnect: binarized, they may be near chance."
    return "does not say whether BinaryConnect made its weights: binarized all the same."


def write(path: Path, content: bytes, source_sha256: str) -> None:
    """Write a file made from the checkpoint with that SHA-256; one made from any other is moved aside first.

    Raises UserError where that cannot be done; no file is lost.
    """
    if path.exists() and source_of(path) != source_sha256:
        moved = archive(path.parent, [path.name])
        print(f"{path} was made from another checkpoint: moved to {moved}.")
    atomic_write(path, content)


def source_of(path: Path) -> str | None:
    """The SHA-256 of the checkpoint that `path` was made from; None where it does not say so or cannot be read."""
    try:
        return checkpoints.load(path).source_sha256
    except UserError:
        return None
