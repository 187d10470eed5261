"""Checkpoints: one self-describing dictionary a file, written atomically, read without running anything.

A checkpoint of ours is a dictionary of plain values and tensors, readable with `torch.load(weights_only=True)`:

    format_version  1
    arch            "resnet20", ...
    kind            what the weights are: "float", "latent" (BinaryConnect's real-valued ones), "binary" (-1 and +1)
                    or "binary_1bit" (packed: see models/bitpack.py)
    state_dict      the bare network's, no wrapper prefixes
    epoch, metrics, config, versions, logit_scale, source_sha256
    quantizer       how latent weights become binary ones; where it is missing, "deterministic_sign"
    training        in checkpoint_last.pth only: optimizers, random generators, history, best so far
    checksum        SHA-256 of all the rest

Loading also takes what others have saved: see `load` and foreign.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import platform
import reprlib
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from engine.checkpoints import kinds, pickles, reader
from engine.checkpoints.foreign import blank, find_weights, misfit, some
from engine.checkpoints.reader import Contents
from engine.cli import UserError, is_out_of_memory, reason
from engine.files import atomic_write
from models import ARCHITECTURES, build, weight_layers
from models.binaryconnect import is_binary
from models.bitpack import KIND as BINARY_1BIT
from models.bitpack import unpack_model
from models.quantizers import SIGN_QUANTIZERS

FORMAT_VERSION = 1
LARGEST_LOGIT_SCALE = 10**6  # beyond, logits would overflow that are not infinite themselves
BEST = "best_model.pth"
FINAL = "final_model.pth"
LAST = "checkpoint_last.pth"
BINARIZED = "best_model_binarized.pth"
PACKED = "best_model_binary_1bit.pth"
KINDS = ("float", "latent", "binary", BINARY_1BIT)

_MADE_BY = {
    BEST: "train one with main.py or main_binary.py, or name a checkpoint, for example one in pretrained/",
    BINARIZED: "make it with eval_binarized.py",
    PACKED: "make it with save_binary_model.py",
    LAST: "there is nothing to resume: start without --resume",
}
_MOST_BYTES = 10**9  # no checkpoint of such a network comes near it
_ANOTHER = "use another copy or make it again"


@dataclass
class Checkpoint:
    """A checkpoint as loaded: the network's names, float32 tensors on the CPU, and what the file says of itself."""

    path: Path
    sha256: str
    arch: str
    kind: str  # one of KINDS, or "unknown"
    state_dict: dict[str, Tensor]  # empty for a 1-bit file
    epoch: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    logit_scale: float = 1.0
    source_sha256: str | None = None
    quantizer: str = "deterministic_sign"  # how latent weights become binary ones
    foreign: bool = False  # not written by this collection
    weights_key: str = "state_dict"  # where in the file the weights are; "" at the top level
    notes: list[str] = field(default_factory=list)  # how the file was read, lines to print
    raw: dict[str, Any] = field(default_factory=dict)  # the file's own dictionary

    @property
    def other_quantizer(self) -> bool:
        """Whether these are latent weights of another quantizer than a sign: their signs are not the network."""
        return self.kind == "latent" and self.quantizer not in SIGN_QUANTIZERS

    def model(self, *, fold: bool = True) -> nn.Module:
        """The network with these weights, on the CPU, in evaluation mode. fold: see `bitpack.unpack_model`."""
        if self.kind == BINARY_1BIT:
            return unpack_model(self.raw, fold=fold)
        model = build(self.arch)
        model.load_state_dict(self.state_dict)
        return model.eval()


def library_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": str(numpy.__version__),
    }


def make(arch: str, kind: str, weights: dict[str, Tensor] | None, **more: Any) -> dict[str, Any]:
    """The dictionary of a checkpoint, without its checksum; `more` adds or overrides entries.

    weights: the state_dict, moved to the CPU in plain row-major memory, so that a file does not depend on where or
    in which memory format the network was trained. None for a 1-bit file.
    """
    made: dict[str, Any] = {"format_version": FORMAT_VERSION, "arch": arch, "kind": kind}
    if weights is not None:
        made["state_dict"] = plain_state(weights)
    return made | more


def plain_state(state_dict: dict[str, Tensor], *, copy: bool = False) -> dict[str, Tensor]:
    """A state_dict on the CPU in row-major memory; with `copy` none of it shares memory with the network."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    return {key: value.clone() for key, value in plain.items()} if copy else plain


def save(path: Path, checkpoint: dict[str, Any]) -> int:
    """Write a dictionary made by `make` atomically, with its checksum; returns the file's size in bytes.

    Raises UserError as `atomic_write` does.
    """
    content = serialize(checkpoint)
    atomic_write(path, content)
    return len(content)


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """What `save` writes: a dictionary made by `make` and its checksum."""
    content = io.BytesIO()  # through a file object: given a path, torch.save puts its name into the archive
    torch.save(checkpoint | {"checksum": digest(checkpoint)}, content)
    return content.getvalue()


def digest(value: Any) -> str:
    """SHA-256 (hex) of a nest of dictionaries, lists, numbers, strings and tensors, whatever the file around it."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        sha.update(f"tensor {plain.dtype} {tuple(plain.shape)}\n".encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)}\n".encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, float):
        sha.update(b"float " + struct.pack("<d", value))
    else:
        sha.update(f"{type(value).__name__} {value!r}\n".encode())


def examine(path: Path, content: bytes | None = None) -> tuple[Contents, str]:
    """What a `.pth` file holds with the names of all that was not made, and the file's SHA-256.

    Nothing in the file is run, and nothing it declares makes us take much more memory than its own size.
    content: what the file holds or is to hold, where it is in memory already.
    Raises UserError, one line that names the file, for anything that is not a readable checkpoint.
    """
    if content is None:
        content = _read_regular_file(path)
    other = kinds.other_kind(content)
    if other:
        raise UserError(f"{path}: {other}")
    try:
        contents = reader.load(content)
    except pickles.OtherKind as error:
        raise UserError(f"{path}: {error}") from error
    except pickles.Refused as error:
        raise UserError(f"{path}: refused: {error}; {_ANOTHER}") from error
    except Exception as error:  # a damaged file leads the reader, zipfile and torch to errors of any type
        if is_out_of_memory(error):
            raise UserError(f"{path}: needs more memory than there is; close other programs") from error
        if kinds.is_text(content):
            raise UserError(f"{path}: is a text, not a checkpoint; give a .pth file") from error
        raise UserError(f"{path}: truncated, damaged or not a checkpoint; {_ANOTHER}") from error
    value = contents.value
    if isinstance(value, dict) and "format_version" in value:
        rest = {key: item for key, item in value.items() if key != "checksum"}
        if not isinstance(value.get("checksum"), str) or value["checksum"] != digest(rest):
            raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy")
    return contents, hashlib.sha256(content).hexdigest()


def _read_regular_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file; give the path of a .pth file")
        if status.st_size == 0:
            raise UserError(f"{path}: the file is empty; {_ANOTHER}")
        if status.st_size > _MOST_BYTES:
            raise UserError(f"{path}: {status.st_size:,} bytes are too many for a checkpoint of such a network")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_MADE_BY.get(path.name, 'check the path')}") from None
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error


def load(path: Path, content: bytes | None = None, *, weights_key: str | None = None) -> Checkpoint:
    """Load a checkpoint of ours or of others, with the network's own parameter names.

    A checkpoint of ours (1-bit ones too) is of the architecture that it declares. Of others: a state_dict or a whole
    module under any key or none, with any prefix, `fc` for `linear`, any floating-point dtype, beside whatever else.
    content: as in `examine`. weights_key: which weights to take, where several in a foreign file fit.
    Raises UserError that names the file, and the keys that do not fit or hold values that are not finite.
    """
    contents, sha256 = examine(path, content)
    raw = contents.value if isinstance(contents.value, dict) else {}
    if "format_version" in raw:
        loaded = _load_ours(path, sha256, raw, weights_key)
    else:
        found = find_weights(path, contents, weights_key)
        loaded = Checkpoint(path, sha256, found.arch, "unknown", _checked(path, found.arch, found.tensors), raw=raw)
        loaded.foreign, loaded.weights_key, loaded.notes = True, found.key, found.notes
        epoch = raw.get("epoch")
        loaded.epoch = epoch if type(epoch) is int else None
    if contents.inert:
        loaded.notes.append(f"objects not made, nothing was run: {some(list(contents.inert), most=3)}")
    if loaded.kind != BINARY_1BIT:
        _validate_kind(loaded)
    return loaded


def _load_ours(path: Path, sha256: str, raw: dict[str, Any], weights_key: str | None) -> Checkpoint:
    metadata = _metadata(path, raw)
    if metadata["kind"] == BINARY_1BIT:
        return _load_packed(path, sha256, raw, metadata)
    if weights_key not in (None, "state_dict"):
        raise UserError(f"{path}: --weights-key {weights_key}: the weights of this file are under 'state_dict'")
    arch, tensors = raw.get("arch"), raw.get("state_dict")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(f"{path}: its arch {_short(arch)} is none of those in models/: {', '.join(ARCHITECTURES)}")
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: its state_dict is not a dictionary of tensors; use another copy")
    problem = misfit(arch, tensors, counters_needed=True)
    if problem:
        raise UserError(f"{path}: {problem}")
    return Checkpoint(path, sha256, arch, state_dict=_checked(path, arch, tensors), raw=raw, **metadata)


def _metadata(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """What a file of ours says of itself. Raises UserError where that cannot be."""
    version, kind, scale = raw["format_version"], raw.get("kind"), raw.get("logit_scale", 1.0)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {_short(version)} is not {FORMAT_VERSION}: update the scripts")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}: unknown kind of weights {_short(kind)}; known are {', '.join(KINDS)}")
    if not isinstance(scale, int | float) or not 0 < scale <= LARGEST_LOGIT_SCALE:
        raise UserError(f"{path}: logit_scale {_short(scale)} is not a number in (0, {LARGEST_LOGIT_SCALE:,}]")
    quantizer = raw.get("quantizer", "deterministic_sign")
    if not isinstance(quantizer, str):
        raise UserError(f"{path}: quantizer {_short(quantizer)} is not the name of one")
    epoch, source = raw.get("epoch"), raw.get("source_sha256")
    return {
        "kind": kind,
        "epoch": epoch if type(epoch) is int else None,
        "metrics": raw["metrics"] if isinstance(raw.get("metrics"), dict) else {},
        "config": raw["config"] if isinstance(raw.get("config"), dict) else {},
        "logit_scale": float(scale),
        "quantizer": quantizer,
        "source_sha256": source if isinstance(source, str) else None,
    }


def _short(value: Any) -> str:
    """A value from a file for a message, whatever it is and however large."""
    return reprlib.repr(value) if isinstance(value, str | int | float | None) else f"(a {type(value).__name__})"


def _load_packed(path: Path, sha256: str, raw: dict[str, Any], metadata: dict[str, Any]) -> Checkpoint:
    try:
        for key, kind in {"arch": str, "batchnorm": str, "signs": Tensor, "floats": Tensor}.items():
            if not isinstance(raw.get(key), kind):
                raise ValueError(f"its {key} is {_short(raw.get(key))}")
        if raw["batchnorm"] not in ("folded", "kept"):
            raise ValueError(f"its batchnorm is {_short(raw['batchnorm'])}, not 'folded' or 'kept'")
        unpack_model(raw)
    except ValueError as error:
        raise UserError(f"{path}: not a 1-bit file of ours: {reason(error)}") from error
    return Checkpoint(path, sha256, raw["arch"], state_dict={}, raw=raw, **metadata)


def _checked(path: Path, arch: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict in the network's own order and dtypes; names and shapes are known to fit.

    Raises UserError naming a tensor with another kind of numbers, or with values that no network has.
    """
    checked = {}
    for key, wanted in blank(arch).state_dict().items():
        value = tensors[key] if key in tensors else torch.zeros(wanted.shape, dtype=wanted.dtype)
        if not wanted.dtype.is_floating_point:
            if value.dtype.is_floating_point or value.dtype.is_complex:
                raise UserError(f"{path}: {key} has dtype {value.dtype}, a whole number is needed")
        elif not value.dtype.is_floating_point:
            raise UserError(f"{path}: {key} has dtype {value.dtype}, floating point is needed")
        elif not value.to(wanted.dtype).isfinite().all():
            raise UserError(f"{path}: {key} holds NaN or infinite values; the run that made it has diverged")
        elif key.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {key} holds negative variances")
        checked[key] = value.to(wanted.dtype).contiguous()
    return checked


def _validate_kind(checkpoint: Checkpoint) -> None:
    """Validate the declared kind against the weights; a foreign file's is "binary" where they are."""
    names = [f"{name}.weight" for name, _ in weight_layers(blank(checkpoint.arch))]
    mixed = [name for name in names if not is_binary(checkpoint.state_dict[name])]
    if checkpoint.kind == "binary" and mixed:
        raise UserError(f"{checkpoint.path}: says its weights are binary, but {mixed[0]} is not all -1 and +1")
    if checkpoint.kind == "unknown" and not mixed:
        checkpoint.kind = "binary"
