"""The weights in a file that others made: wherever they lie, whatever their names begin with."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints.pickles import Inert
from engine.checkpoints.reader import Contents
from engine.cli import UserError
from models import ARCHITECTURES
from models.resnet_s import NUM_CLASSES, architecture_of

_WRAPPERS = re.compile(r"^(?:(?:model|module|_orig_mod)\.)+")
_ANCHOR = "layer1.0.conv1.weight"  # in each of our networks once: what stands before it is a prefix
_COUNTERS = re.compile(r"(?:^|\.)(?:total_ops|total_params|n_averaged)$")  # of thop and torch.optim.swa_utils
_HOLDERS = (dict, list, tuple, Inert, Tensor)
_MOST_MODULES = 100  # of which one may be in many others, as may its parts
_MOST_NAMES = 10_000  # of one module
_LONGEST_NAME = 1000
_DEEPEST = 20  # of tensors in what holds them


def blank(arch: str) -> nn.Module:
    """The network of a name in ARCHITECTURES with no memory behind its tensors (the meta device)."""
    return _blank(ARCHITECTURES[arch])


@functools.cache
def _blank(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@dataclass
class Weights:
    """A mapping of names to tensors in a file, under the names of the network that it seems to be of.

    key: where it lies, "" for the top level. arch: None where it is of none of our networks. problem: "", or why
    names and shapes do not fit. notes: what was done to the names, one line each.
    """

    key: str
    tensors: dict[str, Tensor]
    arch: str | None
    problem: str
    notes: list[str]


def find_weights(path: Path, contents: Contents, weights_key: str | None = None) -> Weights:
    """The one mapping of tensors in a file that fits one of our networks.

    weights_key: the key under which to take them, where several fit.
    Raises UserError that says why none fits, or names those that do.
    """
    found = [
        _understand(".".join(map(_text, place)), item)
        for place, item in walk(contents.value)
        if isinstance(item, dict) and any(isinstance(each, Tensor) for each in item.values())
    ]
    found.sort(key=lambda w: (bool(w.problem), w.arch is None, -len(w.tensors)))  # the likeliest first
    if not found:
        called = [name for name, calls in contents.inert.items() if calls]
        runs = f"; nothing was run, an ordinary load would call {some(called)}" if called else ""
        raise UserError(f"{path}: not a checkpoint of a network: no tensors under names in it{runs}")
    fitting = [weights.key for weights in found if not weights.problem]
    if weights_key is None and len(fitting) > 1:
        raise UserError(
            f"{path}: the weights under {some(fitting)} all fit; give --weights-key NAME to a script that has this "
            "option, or save the weights that you mean in a file of their own"
        )
    best = next((weights for weights in found if weights_key in (None, weights.key)), None)
    if best is None:
        keys = some([weights.key for weights in found])
        raise UserError(f"{path}: --weights-key {weights_key}: no tensors under that key; there are {keys}")
    if best.problem:
        where = f" (under {best.key!r})" if best.key else ""
        raise UserError(f"{path}: {best.problem}{where}")
    return best


# -- where tensors lie -----------------------------------------------------------------------------------------


def walk(value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every dictionary and tensor in a nest with its path, in the file's order; a whole module is its state_dict.

    Each record is opened once: they may hold each other, and one module may be in many.
    """
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    seen: set[int] = set()
    modules = 0
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, Inert) and id(item) not in seen:
            seen.add(id(item))
            modules += is_module(item)
            if not is_module(item):
                waiting += [(path, each) for each in (item.contents, item.state, item.arguments)]
            elif modules <= _MOST_MODULES:
                waiting.append((path, module_state(item)))
        elif isinstance(item, dict | Tensor):
            yield path, item
        if isinstance(item, dict | list | tuple) and len(path) < _DEEPEST:
            inner = list(item.items() if isinstance(item, dict) else enumerate(item))
            waiting += [((*path, key), each) for key, each in reversed(inner) if isinstance(each, _HOLDERS)]


def _text(key: Any) -> str:
    """A key as a name."""
    return key[:_LONGEST_NAME] if isinstance(key, str) else ascii(key)[:_LONGEST_NAME]


def is_module(value: Any) -> bool:
    """Whether a record is that of a whole torch.nn.Module."""
    state = value.state if isinstance(value, Inert) else None
    return isinstance(state, dict) and isinstance(state.get("_modules"), dict)


def module_state(module: Inert) -> dict[str, Tensor]:
    """The state_dict of a whole module, from the record of it."""
    found: dict[str, Tensor] = {}
    waiting = [("", module)]
    for _ in range(_MOST_NAMES):
        if not waiting:
            break
        prefix, record = waiting.pop()
        transient = record.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        for kind in ("_parameters", "_buffers"):
            own = record.state.get(kind)
            for name, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Tensor) and name not in transient and len(found) < _MOST_NAMES:
                    found[prefix + _text(name)] = value
        inner = [(f"{prefix}{_text(name)}.", m) for name, m in record.state["_modules"].items() if is_module(m)]
        waiting += [(name, m) for name, m in reversed(inner) if len(name) < _LONGEST_NAME]
    return found


# -- what their names mean -------------------------------------------------------------------------------------


def _understand(key: str, mapping: dict[Any, Any]) -> Weights:
    """A mapping under the names of our networks: prefixes and counters dropped, fc read as linear."""
    notes = [f"weights taken from {key!r}"] if key else []
    tensors = {_text(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
    beside = [name for name, value in mapping.items() if not isinstance(value, Tensor)]
    if beside and key:
        notes.append(f"not tensors, ignored: {some(beside)}")
    counters = [name for name in tensors if _COUNTERS.search(name)]
    if counters:
        notes.append(f"counters of training tools, ignored: {some(counters)}")
    names = {name: _WRAPPERS.sub("", name) for name in tensors if name not in counters}
    anchors = {name.removesuffix(_ANCHOR) for name in names.values() if name.endswith("." + _ANCHOR)}
    if len(anchors) == 1:
        names = {old: new.removeprefix(*anchors) for old, new in names.items()}
    dropped = Counter(old.removesuffix(new) for old, new in names.items() if old != new)
    notes += [f"prefix {prefix!r} dropped from {count} names" for prefix, count in dropped.items()]
    if "fc.weight" in names.values() and "linear.weight" not in names.values():
        names = {old: re.sub(r"^fc\.", "linear.", new) for old, new in names.items()}
        notes.append("'fc' read as 'linear'")
    twice = [new for new, count in Counter(names.values()).items() if count > 1]
    renamed = {new: tensors[old] for old, new in names.items()}
    arch = architecture_of(renamed)
    problem = f"several keys become {twice[0]!r} without their prefixes" if twice else misfit(arch, renamed)
    return Weights(key, renamed, arch, problem, notes)


def misfit(arch: str | None, tensors: dict[str, Tensor], *, counters_needed: bool = False) -> str:
    """Why names and shapes are not those of the architecture, in one line; "" where they are.

    counters_needed: BatchNorm's num_batches_tracked, which old files lack, must be there too.
    """
    if arch is None:
        return f"not a ResNet-20/32/44/56/110 of ours: its keys begin {some(list(tensors))}"
    expected = blank(arch).state_dict()
    unexpected = [key for key in tensors if key not in expected]
    convolutions = [key for key in unexpected if re.search(r"\.(downsample|shortcut)\b", str(key))]
    if convolutions:
        return (
            f"its shortcuts are convolutions (option B, {convolutions[0]!r} for example), which {arch} here does not "
            "have: its shortcuts are without parameters (option A)"
        )
    needed = [key for key in expected if counters_needed or not key.endswith("num_batches_tracked")]
    missing = [key for key in needed if key not in tensors]
    if unexpected or missing:
        parts = [f"{word} {some(keys)}" for word, keys in (("unexpected", unexpected), ("missing", missing)) if keys]
        return f"its keys do not fit {arch}: {'; '.join(parts)}"
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            if key == "linear.weight" and value.shape[1:] == expected[key].shape[1:]:
                return f"it has {len(value)} classes; these scripts are for CIFAR-10, which has {NUM_CLASSES}"
            return f"{key} has shape {tuple(value.shape)}, {arch} needs {tuple(expected[key].shape)}"
    return ""


def some(keys: list[Any], most: int = 6) -> str:
    """The first few keys, for a message."""
    shown = ", ".join(repr(key) if isinstance(key, str) else ascii(key)[:40] for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
