"""Checkpoints: one self-describing dictionary a file, written atomically, read without running anything.

A checkpoint of ours is a dictionary of plain values and tensors, readable with `torch.load(weights_only=True)`:

    format_version  1
    arch            "resnet20", ...
    kind            what the weights are: "float", "latent" (BinaryConnect's real-valued ones), "binary" (-1 and +1)
                    or "binary_1bit" (packed: see models/bitpack.py)
    state_dict      the bare network's, no wrapper prefixes
    epoch, metrics, config, versions, logit_scale, source_sha256
    training        in checkpoint_last.pth only: optimizers, schedules, position, best so far, history
    checksum        SHA-256 of all the rest

Loading also takes what others have saved: see `load`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import platform
import re
import stat
import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from engine.checkpoints import reader as untrusted
from engine.cli import UserError, is_out_of_memory, reason
from engine.files import atomic_write
from models.binaryconnect import is_binary
from models.bitpack import KIND as BINARY_1BIT
from models.bitpack import unpack_model
from models.resnet_s import ARCHITECTURES, ResNetS, architecture_of, build, weight_layers

FORMAT_VERSION = 1
LARGEST_LOGIT_SCALE = 10**6  # beyond, logits would overflow that are not infinite themselves
BEST = "best_model.pth"
FINAL = "final_model.pth"
LAST = "checkpoint_last.pth"
BINARIZED = "best_model_binarized.pth"
PACKED = "best_model_binary_1bit.pth"
KINDS = ("float", "latent", "binary", BINARY_1BIT)

_CONTAINERS = ("state_dict", "net", "model_state_dict", "model")
_PREFIX = re.compile(r"^(?:(?:model|module|_orig_mod)\.)+")
_MOST_BYTES = 10**9  # no checkpoint of such a network comes near it


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
    renamed: dict[str, str] = field(default_factory=dict)  # names in the file -> the network's
    notes: list[str] = field(default_factory=list)  # lines to print
    foreign: bool = False  # not written by these scripts
    quantizer: str = "deterministic_sign"  # what made binary weights of latent ones in training
    raw: dict[str, Any] = field(default_factory=dict)  # the file's own dictionary

    @property
    def steps_beyond(self) -> int:
        """Steps since the epoch that `epoch` and `metrics` are of: 0 but for a run stopped within an epoch."""
        training = self.raw.get("training")
        steps = training.get("steps_done") if isinstance(training, dict) else 0
        return steps if type(steps) is int and 0 < steps <= 10**9 else 0

    def model(self, *, fold: bool = True) -> ResNetS:
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

    Raises UserError where it cannot be written; an older file of that name is then untouched.
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


def read(path: Path, content: bytes | None = None) -> tuple[Any, str]:
    """What a `.pth` file holds, and the file's SHA-256. Nothing in the file is run, and nothing it declares makes
    us take much more memory than its own size.

    content: what the file holds or is to hold, where it is in memory already.
    Raises UserError, one line that names the file, for anything that is not a readable checkpoint.
    """
    if content is None:
        content = _read_regular_file(path)
    try:
        value = untrusted.load(content)
    except untrusted.Refused as error:
        raise UserError(f"{path}: refused: {error}; use another copy or make it again") from error
    except Exception as error:  # the readers that torch.load consists of raise whatever a damaged file leads them to
        if is_out_of_memory(error):
            raise UserError(f"{path}: needs more memory than there is; close other programs") from error
        raise UserError(
            f"{path}: truncated, damaged or not a checkpoint; use another copy or make it again"
        ) from error
    if isinstance(value, dict) and "format_version" in value:
        rest = {key: item for key, item in value.items() if key != "checksum"}
        if value.get("checksum") != digest(rest):
            raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy")
    return value, hashlib.sha256(content).hexdigest()


def _read_regular_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file; give the path of a .pth file")
        if status.st_size == 0:
            raise UserError(f"{path}: the file is empty; use another copy or make it again")
        if status.st_size > _MOST_BYTES:
            raise UserError(f"{path}: {status.st_size:,} bytes are too many for a checkpoint of such a network")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_how_to_make(path)}") from None
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error


def _how_to_make(path: Path) -> str:
    makers = {
        BEST: "train one with main.py or main_binary.py, or name a checkpoint, for example one in pretrained/",
        BINARIZED: "make it with eval_binarized.py",
        PACKED: "make it with save_binary_model.py",
        LAST: "there is nothing to resume: start without --resume",
    }
    return makers.get(path.name, "check the path")


def load(path: Path, content: bytes | None = None, *, weights_key: str | None = None) -> Checkpoint:
    """Load a checkpoint of ours or of others, with the network's own parameter names.

    Accepted: a checkpoint of ours (1-bit ones too), a bare state_dict, one under `state_dict`, `net`, `model` or
    `model_state_dict`, any stack of the prefixes `model.`, `module.`, `_orig_mod.`, any floating-point dtype.
    content: as in `read`.
    Raises UserError that names the file for everything else, with the keys that do not fit, and where a tensor
    is not finite.
    """
    raw, sha256 = read(path, content)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(raw).__name__}, not a dictionary")
    about = _metadata(path, raw)
    if weights_key is not None:
        if not isinstance(raw.get(weights_key), dict):
            raise UserError(f"--weights-key {weights_key}: {path} holds no weights under this name")
        raw = {key: value for key, value in raw.items() if key not in _CONTAINERS} | {"state_dict": raw[weights_key]}
    if about["kind"] == BINARY_1BIT:
        return _load_packed(path, sha256, raw, about)
    tensors, renamed = bare_state_dict(path, raw)
    arch = _architecture(path, raw, tensors)
    state_dict = _fit(path, arch, tensors)
    loaded = Checkpoint(path, sha256, arch, state_dict=state_dict, renamed=renamed, raw=raw, **about)
    _settle_kind(loaded)
    return loaded


def _metadata(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """What the file says of itself; the values of foreign files, which may mean anything, only where they fit."""
    ours = "format_version" in raw
    version = raw.get("format_version")
    if ours and (type(version) is not int or version != FORMAT_VERSION):
        raise UserError(f"{path}: format version {version!r} is not {FORMAT_VERSION}: update the scripts")
    kind = raw.get("kind", "unknown") if ours else "unknown"
    if not isinstance(kind, str) or (ours and kind not in KINDS):
        raise UserError(f"{path}: unknown kind of weights {kind!r}; known are {', '.join(KINDS)}")
    scale = raw.get("logit_scale", 1.0) if ours else 1.0
    if not isinstance(scale, int | float) or not 0 < scale <= LARGEST_LOGIT_SCALE:
        raise UserError(f"{path}: logit_scale {scale!r} is not a positive number of at most {LARGEST_LOGIT_SCALE:,}")
    epoch = raw.get("epoch")
    return {
        "kind": kind,
        "epoch": epoch if type(epoch) is int else None,
        "metrics": raw["metrics"] if ours and isinstance(raw.get("metrics"), dict) else {},
        "config": raw["config"] if ours and isinstance(raw.get("config"), dict) else {},
        "logit_scale": float(scale),
        "foreign": not ours,
        "quantizer": raw["quantizer"] if ours and isinstance(raw.get("quantizer"), str) else "deterministic_sign",
        "source_sha256": raw["source_sha256"] if ours and isinstance(raw.get("source_sha256"), str) else None,
    }


def _load_packed(path: Path, sha256: str, raw: dict[str, Any], about: dict[str, Any]) -> Checkpoint:
    try:
        if raw.get("batchnorm") not in ("folded", "kept"):
            raise ValueError(f"batchnorm is {raw.get('batchnorm')!r}, not 'folded' or 'kept'")
        if not isinstance(raw.get("signs"), Tensor) or not isinstance(raw.get("floats"), Tensor):
            raise ValueError("the tensors signs and floats are needed")
        if not isinstance(raw.get("arch"), str):
            raise ValueError("it names no architecture")
        unpack_model(raw)
    except ValueError as error:
        raise UserError(f"{path}: not a 1-bit file of ours: {reason(error)}") from error
    return Checkpoint(path, sha256, raw["arch"], state_dict={}, raw=raw, **about)


def bare_state_dict(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a loaded file under names with no wrapper prefixes, and {name in the file: that name}.

    Raises UserError where there are none, where a value is not a tensor, or where two names become one.
    """
    holders = [key for key in _CONTAINERS if isinstance(raw.get(key), dict)]
    if len(holders) > 1:
        raise UserError(f"{path}: has both {holders[0]!r} and {holders[1]!r}; keep the one that is meant")
    tensors = raw[holders[0]] if holders else raw
    foreign = [key for key, value in tensors.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if foreign or not tensors:
        what = f"{_some(foreign)} is no tensor" if foreign else "it is an empty dictionary"
        raise UserError(f"{path}: not a checkpoint of a network: {what}")
    renamed = {key: _PREFIX.sub("", key) for key in tensors}
    bare: dict[str, Tensor] = OrderedDict()
    for key, name in renamed.items():
        if name in bare:
            raise UserError(f"{path}: several keys become {name!r} without their prefixes ({key!r} is one)")
        bare[name] = tensors[key]
    return bare, renamed


def _architecture(path: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    declared = raw.get("arch") if "format_version" in raw else None
    if isinstance(declared, str) and declared in ARCHITECTURES:
        return declared
    found = architecture_of(tensors)
    if found is None:
        raise UserError(f"{path}: not a ResNet-20/32/44/56/110 of ours: its keys begin {_some(list(tensors))}")
    if declared is not None and declared != found:
        raise UserError(f"{path}: says it is {declared!r} but its keys are those of {found}")
    return found


def _fit(path: Path, arch: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict in the network's own order and dtypes. Raises UserError naming what does not fit."""
    expected = build(arch).state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    unexpected = [key for key in tensors if key not in expected]
    missing = [key for key in expected if key not in tensors and key not in counters]  # old files lack the counters
    if unexpected or missing:
        parts = [f"unexpected {_some(unexpected)}"] * bool(unexpected) + [f"missing {_some(missing)}"] * bool(missing)
        raise UserError(f"{path}: its keys do not fit {arch}: {'; '.join(parts)}")
    fitted = {}
    for key, wanted in expected.items():
        value = tensors.get(key, wanted)
        if value.shape != wanted.shape:
            raise UserError(f"{path}: {key} has shape {tuple(value.shape)}, {arch} needs {tuple(wanted.shape)}")
        if key in counters:
            if value.dtype.is_floating_point or value.dtype.is_complex:
                raise UserError(f"{path}: {key} has dtype {value.dtype}, a whole number is needed")
        elif not value.dtype.is_floating_point:
            raise UserError(f"{path}: {key} has dtype {value.dtype}, floating point is needed")
        elif not value.float().isfinite().all():
            raise UserError(f"{path}: {key} holds NaN or infinite values; the run that made it has diverged")
        fitted[key] = value.to(wanted.dtype).contiguous()
    negative = [key for key, value in fitted.items() if key.endswith("running_var") and (value < 0).any()]
    if negative:
        raise UserError(f"{path}: {negative[0]} holds negative variances")
    return fitted


def _settle_kind(checkpoint: Checkpoint) -> None:
    """Hold what the file says of its weights against the weights; tell binary ones of an unknown kind by looking."""
    names = [f"{name}.weight" for name, _ in weight_layers(build(checkpoint.arch))]
    mixed = [name for name in names if not is_binary(checkpoint.state_dict[name])]
    if checkpoint.kind == "binary" and mixed:
        raise UserError(f"{checkpoint.path}: says its weights are binary, but {mixed[0]} is not all -1 and +1")
    if checkpoint.kind == "unknown" and not mixed:
        checkpoint.kind = "binary"


def _some(keys: list[Any], most: int = 6) -> str:
    shown = ", ".join(repr(key) if isinstance(key, str) else type(key).__name__ for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
