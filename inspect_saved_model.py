"""What is in this .pth? Works on any file of torch.save, ours or not, and never runs code from it.

python3 inspect_saved_model.py best_model.pth
python3 inspect_saved_model.py checkpoint_last.pth --all    every tensor of the optimizer on a line of its own
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import checkpoints, cli
from engine.checkpoints import BINARY_1BIT, Checkpoint
from engine.cli import UserError
from engine.report import counted, narrow, share, what_it_is
from models.resnet_s import weight_layers

WIDTH = 80
TOP = ""  # stands for the file's own dictionary
_MOST_ENTRIES = 40  # lines of metadata for one dictionary
_MOST_TEXT = 400  # characters of metadata for one entry


# -- the tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table: one tensor, or several alike. low, high and distinct are None where they make no sense."""

    name: str
    shape: str
    dtype: str
    bytes: int
    low: float | None
    high: float | None
    distinct: int | None
    odd: str  # "", or how many values are NaN or infinite

    @classmethod
    def of(cls, name: str, tensors: list[Tensor]) -> Row:
        shapes = {"x".join(map(str, t.shape)) or "scalar" for t in tensors}
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
        low = high = distinct = None
        odd = ""
        try:
            values = np.concatenate([_values(t) for t in tensors])
            low, high, distinct, odd = _summary(values)
        except (RuntimeError, TypeError, ValueError):
            odd = "values of a type that cannot be looked into"  # packed types, for example
        return cls(
            name if len(tensors) == 1 else f"{name} ({len(tensors)} tensors)",
            shapes.pop() if len(shapes) == 1 else "various",
            dtypes.pop() if len(dtypes) == 1 else "various",
            sum(t.numel() * t.element_size() for t in tensors),
            low,
            high,
            distinct,
            odd,
        )

    def cells(self) -> list[str]:
        bounds = ["-" if value is None else narrow(value, 7) for value in (self.low, self.high)]
        distinct = "-" if self.distinct is None else str(self.distinct)
        return [self.shape, self.dtype, str(self.bytes), *bounds, distinct]


def _values(t: Tensor) -> np.ndarray:
    """All values in one dimension, in a type of numpy's that holds each exactly."""
    t = t.reshape(-1)
    if t.dtype.is_complex:
        return t.to(torch.complex128).numpy()
    if t.dtype.is_floating_point:
        return t.to(torch.float64).numpy()
    return t.numpy()


def _summary(values: np.ndarray) -> tuple[float | None, float | None, int, str]:
    """Least, greatest (complex numbers have neither), number of distinct values (all NaN are one), what is odd."""
    distinct = len(np.unique(values))
    if values.dtype.kind not in "fc":
        return (*((float(values.min()), float(values.max())) if len(values) else (None, None)), distinct, "")
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    odd = " and ".join(f"{count:,} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite")) if count)
    numbers = values[~np.isnan(values)]
    if not len(numbers) or values.dtype.kind == "c":
        return None, None, distinct, odd
    return float(numbers.min()), float(numbers.max()), distinct, odd


def find_tensors(value: Any) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in a nest of dictionaries, lists and tuples with its path, in the file's order; no recursion."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, Tensor):
            yield path, item
        elif isinstance(item, dict):
            waiting += [((*path, key), inner) for key, inner in reversed(item.items())]
        elif isinstance(item, list | tuple):
            waiting += [((*path, place), inner) for place, inner in reversed(list(enumerate(item)))]


def group_tensors(value: Any, *, apart: bool) -> dict[str, dict[str, list[Tensor]]]:
    """The tensors by entry of the file and by name within it.

    Those whose paths differ in a number only, as an optimizer's state does, come under one name, and so does
    the second network in `training`, the best one so far, unless `apart`.
    """
    groups: dict[str, dict[str, list[Tensor]]] = {}
    alone: dict[str, str] = {}  # for a name that stands for several: the first of them
    for path, tensor in find_tensors(value):
        entry, rest = (key_text(path[0]), path[1:]) if len(path) > 1 else (TOP, path)
        full = name = _joined(rest)
        if not apart:
            name = _joined(["*" if isinstance(key, int) else key for key in rest])
            if entry == "training" and name.startswith("best.state_dict."):
                name = "best.state_dict.*"
        alone.setdefault(f"{entry} {name}", full)
        groups.setdefault(entry, {}).setdefault(name, []).append(tensor)
    return {
        entry: {alone[f"{entry} {name}"] if len(found) == 1 else name: found for name, found in names.items()}
        for entry, names in groups.items()
    }


def _joined(path: Iterable[Any]) -> str:
    """A path as text: state[3].exp_avg; the tensor itself, where the path is empty, is (itself)."""
    text = "".join(
        f"[{key}]" if isinstance(key, int) or key_text(key) == "*" else f".{key_text(key)}" for key in path
    )
    return text.removeprefix(".") or "(itself)"


def print_tensors(groups: dict[str, dict[str, list[Tensor]]]) -> None:
    """A table for each entry of the file; a name that has no room goes on a line of its own."""
    count = sum(len(tensors) for entry in groups.values() for tensors in entry.values())
    bar = tqdm(total=count, desc="tensors", leave=False, disable=not sys.stderr.isatty(), delay=1)
    tables = {}
    for entry, names in groups.items():
        tables[entry] = []
        for name, tensors in names.items():
            tables[entry].append(Row.of(name, tensors))
            bar.update(len(tensors))
    bar.close()
    for entry, rows in tables.items():
        found = sum(map(len, groups[entry].values()))
        print(f"\nTensors {'at the top level' if entry == TOP else f'in {entry}'}: {found:,}")
        _print_rows(rows)
    print("unique: how many distinct values there are, all NaN counted as one")


def _print_rows(rows: list[Row]) -> None:
    cells = [["shape", "dtype", "bytes", "min", "max", "unique"], *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    room = max(8, min(WIDTH - sum(widths) - 6, max(len(row.name) for row in rows)))
    for name, line, odd in zip(
        ["name", *(row.name for row in rows)], cells, ["", *(r.odd for r in rows)], strict=True
    ):
        if len(name) > room:
            print(name)
            name = ""
        left = " ".join(f"{text:<{width}}" for text, width in zip(line[:2], widths[:2], strict=True))
        right = " ".join(f"{text:>{width}}" for text, width in zip(line[2:], widths[2:], strict=True))
        print(f"{name:<{room}} {left} {right}")
        if odd:
            print(f"  ⚠ {odd}")


# -- the metadata --------------------------------------------------------------------------------------------


def key_text(key: Any) -> str:
    """A key of a dictionary as text that does nothing to a terminal."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 200 else brief(key)


def brief(value: Any, depth: int = 3) -> str:
    """A value on one line of at most _MOST_TEXT characters, whatever it is and however large."""
    text = _brief(value, depth)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 3] + "..."


def _brief(value: Any, depth: int) -> str:
    if isinstance(value, Tensor):
        return "<tensor>"
    if isinstance(value, str):
        return repr(value[:_MOST_TEXT]) if not value.isprintable() or len(value) > 64 or not value else value
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None or isinstance(value, int | complex):
        return repr(value)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value):,} bytes>"
    if isinstance(value, dict):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"{{{counted(len(value), 'tensor')}}}"
        if value and (depth == 0 or any(isinstance(key, int) for key in value)):
            return f"{{{counted(len(value), 'value')}}}"
        shown = [f"{key_text(key)}: {_brief(item, depth - 1)}" for key, item in list(value.items())[:24]]
        return "{" + ", ".join(shown) + (", ..." if len(value) > 24 else "") + "}"
    if isinstance(value, list | tuple | set):
        items = list(value)
        if depth == 0 and items:
            return f"[{len(items):,} items]"
        if len(items) > 4:
            return f"[{len(items):,} items, the last {_brief(items[-1], depth - 1)}]"
        return "[" + ", ".join(_brief(item, depth - 1) for item in items) + "]"
    return str(value)  # a dtype or a device: engine.checkpoints.read lets nothing else through


def print_metadata(values: dict[Any, Any], indent: int = 2) -> None:
    """Every entry that is not a tensor: nested dictionaries on lines of their own, two levels deep."""
    entries = [(key, value) for key, value in values.items() if not isinstance(value, Tensor)]
    for key, value in entries[:_MOST_ENTRIES]:
        name = " " * indent + key_text(key) + ":"
        if isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values()):
            print(f"{name} {counted(len(value), 'tensor')}, listed below")
        elif (
            isinstance(value, dict)
            and indent < 4
            and any(isinstance(item, dict | list | tuple) and item for item in value.values())
        ):
            print(name)
            print_metadata(value, indent + 2)
        else:
            print(textwrap.fill(f"{name} {brief(value)}", WIDTH, subsequent_indent=" " * (indent + 2), tabsize=1))
    if len(entries) > _MOST_ENTRIES:
        print(" " * indent + f"... and {len(entries) - _MOST_ENTRIES:,} more")


# -- what it is ----------------------------------------------------------------------------------------------


def describe(path: Path, raw: Any) -> list[str]:
    """What the file is and whether it fits one of our networks, in lines to print."""
    if not isinstance(raw, dict):
        return [f"What it is: no checkpoint of a network: no dictionary, but a value of type {type(raw).__name__}"]
    ours = "format_version" in raw
    lines = [f"What it is: a checkpoint {'of this collection' if ours else 'that others made'}"]
    try:
        loaded = checkpoints.load(path)
    except UserError as error:
        return [*lines, *_fill(f"Fits: ✗ none of our networks: {_without_path(error, path)}")]
    lines += _fill(f"Fits: ✓ {what_it_is(loaded)}")
    if loaded.kind == BINARY_1BIT:
        return lines + _describe_packed(loaded)
    if not ours:
        lines += ["  (others' files do not say how the weights were trained)"] if loaded.kind == "unknown" else []
    return lines


def _describe_packed(loaded: Checkpoint) -> list[str]:
    model = loaded.model(fold=False)
    weights = [layer.weight for _, layer in weight_layers(model)]
    count, plus = sum(w.numel() for w in weights), sum(int((w > 0).sum()) for w in weights)
    kept = loaded.raw["batchnorm"] == "kept"
    floats = "weights, biases, running means and variances" if kept else "scales and shifts"
    return _fill(
        f"  signs: the {count:,} weights of {len(weights) - 1} convolutions and the classifier, one bit each, 8 in a "
        f"byte, lowest bit first, in the order of the network; 1 is +1 ({plus:,}, {share(plus, count)}), 0 is -1 "
        f"({count - plus:,}, {share(count - plus, count)})."
    ) + _fill(
        f"  floats: the {floats} of the {len(weights) - 1} BatchNorms{'' if kept else ', folded'}, one after the "
        "other, then the bias of the classifier."
    )


def describe_keys(path: Path, raw: Any) -> list[str]:
    """Where the network's tensors are, and what becomes of prefixes in their names; nothing where there are none."""
    if not isinstance(raw, dict) or raw.get("kind") == BINARY_1BIT:
        return []
    try:
        _, renamed = checkpoints.bare_state_dict(path, raw)
    except UserError:
        return []
    holder = [key for key, value in raw.items() if isinstance(value, dict) and list(value) == list(renamed)]
    where = f"under {key_text(holder[0])!r}" if holder else "at the top level"
    changed: dict[str, list[str]] = {}
    for key, name in renamed.items():
        if key != name:
            changed.setdefault(key.removesuffix(name), []).append(key)
    lines = [f"Keys: {counted(len(renamed), 'tensor')} {where}, " + ("with prefixes:" if changed else "no prefixes")]
    for prefix, keys in changed.items():
        example = f"{key_text(keys[0])} -> {key_text(renamed[keys[0]])}"
        lines += _fill(f"  {prefix!r} falls away from {len(keys):,} of them: {example}")
    return lines


def _fill(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def _without_path(error: UserError, path: Path) -> str:
    return " ".join(str(error).removeprefix(f"{path}: ").split())


# -- the script ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = cli.ArgumentParser("Show what is in a .pth file, ours or not. No code in the file is run.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the file to look into")
    parser.add_argument("--all", action="store_true", help="list the tensors of an optimizer one by one, too")
    args = parser.parse_args()
    path = args.checkpoint
    raw, sha256 = checkpoints.read(path)
    size = path.stat().st_size

    print(f"File: {path}\n  {size:,} bytes ({size / 1e6:.2f} MB)\n  SHA-256 {sha256}")
    print("\n".join(describe(path, raw) + describe_keys(path, raw)))
    if isinstance(raw, dict) and any(not isinstance(value, Tensor) for value in raw.values()):
        print("\nMetadata")
        print_metadata(raw)
    elif not isinstance(raw, dict | Tensor):
        print("\n".join(_fill(f"Content: {brief(raw)}")))
    tensors = [tensor for _, tensor in find_tensors(raw)]
    if tensors:
        print_tensors(group_tensors(raw, apart=args.all))
    totals = [
        counted(len(tensors), "tensor"),
        counted(sum(t.numel() for t in tensors), "value"),
        counted(sum(t.numel() * t.element_size() for t in tensors), "byte"),
    ]
    print(f"\nTotal: {', '.join(totals)} of a file of {size:,}")


if __name__ == "__main__":
    cli.run(main)
