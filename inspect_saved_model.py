"""What is in this .pth? Works on any file of torch.save, ours or not, and never runs code from it.

python3 inspect_saved_model.py best_model.pth
python3 inspect_saved_model.py checkpoint_last.pth --all    every tensor of the optimizer on a line of its own
"""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import checkpoints, cli
from engine.checkpoints import BINARY_1BIT, Checkpoint
from engine.checkpoints.foreign import is_module, walk
from engine.checkpoints.pickles import Inert
from engine.cli import UserError
from engine.report import counted, share, what_it_is
from models import weight_layers

WIDTH = 80
TOP = ""  # stands for the top level of the file
_MOST_LINES = 40  # of metadata for one dictionary, of objects that were not made
_MOST_TEXT = 400  # characters of metadata for one entry
_MOST_ROWS = 5000  # of all tables together


# -- values in words -----------------------------------------------------------------------------------------


class _Repr(reprlib.Repr):
    """Any value on one line, however large: of long lists the last item, of mappings of tensors their number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxset, self.maxstring, self.maxother = 4, 24, 4, 80, 80

    def repr_dict(self, value: dict, level: int) -> str:
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"{{{counted(len(value), 'tensor')}}}"
        if value and any(isinstance(key, int) for key in value):
            return f"{{{counted(len(value), 'value')}}}"
        return super().repr_dict(value, level)

    def repr_list(self, value: list | tuple, level: int) -> str:
        if len(value) > 4:
            return f"[{len(value):,} items, the last {self.repr1(value[-1], level - 1)}]"
        return super().repr_list(value, level)

    repr_tuple = repr_list

    def repr_Inert(self, value: Inert, level: int) -> str:  # found by the name of the type
        if is_module(value):
            return f"<{value.name}: a whole module>"
        held = [item for item in (value.arguments, value.contents, value.state) if item]
        shown = ", ".join(self.repr1(item, level - 1) for item in held) if level > 0 else "..." * bool(held)
        return f"<{value.name}{': ' if shown else ''}{shown}>"

    def repr_Tensor(self, _value: Tensor, _level: int) -> str:
        return "<tensor>"

    def repr_float(self, value: float, _level: int) -> str:
        return f"{value:.4g}"


def brief(value: Any) -> str:
    text = _Repr().repr(value)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 3] + "..."


def key_text(key: Any) -> str:
    """A key of a dictionary as text that does nothing to a terminal."""
    return key if isinstance(key, str) and 0 < len(key) <= 200 and key.isprintable() else brief(key)


def _fill(text: str, indent: int = 4) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, tabsize=1)


# -- what it is ----------------------------------------------------------------------------------------------


def describe(path: Path, raw: Any, weights_key: str | None) -> list[str]:
    """What the file is and whether it fits one of our networks, in lines to print."""
    ours = isinstance(raw, dict) and "format_version" in raw
    lines = [f"What it is: a file {'of this collection' if ours else 'that others made'}"]
    try:
        loaded = checkpoints.load(path, weights_key=weights_key)
    except UserError as error:
        why = " ".join(str(error).removeprefix(f"{path}: ").split())
        return [*lines, *_fill(f"Fits: ✗ none of our networks: {why}")]
    lines += _fill(f"Fits: ✓ {what_it_is(loaded)}")
    if loaded.kind == BINARY_1BIT:
        return lines + _describe_packed(loaded)
    where = f"under {loaded.weights_key!r}" if loaded.weights_key else "at the top level"
    lines += _fill(f"Keys: {counted(len(loaded.state_dict), 'tensor')} {where}")
    return lines + [line for note in loaded.notes for line in _fill(f"  {note}")]


def _describe_packed(loaded: Checkpoint) -> list[str]:
    weights = [layer.weight for _, layer in weight_layers(loaded.model(fold=False))]
    count, plus = sum(w.numel() for w in weights), sum(int((w > 0).sum()) for w in weights)
    kept = loaded.raw["batchnorm"] == "kept"
    normalization = "weight, bias, running mean and variance" if kept else "folded scale and shift"
    return _fill(
        f"  signs: the {count:,} weights of {len(weights)} layers, one bit each, 8 in a byte, lowest bit first, in "
        f"the order of the network; 1 is +1 ({plus:,}, {share(plus, count)}), 0 is -1 ({count - plus:,}, "
        f"{share(count - plus, count)})."
    ) + _fill(
        f"  floats: the {normalization} of each BatchNorm that follows a convolution, and every other float of the "
        "network, module by module."
    )


def describe_inert(inert: dict[str, bool]) -> list[str]:
    """The names of all that was not made, those first that an ordinary load would have called."""
    if not inert:
        return []
    lines = [f"\nNot made, not run: objects of {counted(len(inert), 'kind')}"]
    names = sorted(inert, key=lambda name: not inert[name])
    lines += [f"  {'⚠ an ordinary load calls' if inert[name] else '  only named:'} {name}" for name in names]
    more = len(lines) - 1 - _MOST_LINES
    return lines[: _MOST_LINES + 1] + [f"  ... and {more:,} more"] * (more > 0)


def print_metadata(values: dict[Any, Any], indent: int = 2) -> None:
    """Every entry that is not a tensor: nested dictionaries on lines of their own, two levels deep."""
    entries = [(key, value) for key, value in values.items() if not isinstance(value, Tensor)]
    for key, value in entries[:_MOST_LINES]:
        name = " " * indent + key_text(key) + ":"
        nested = isinstance(value, dict) and any(isinstance(v, dict | list | tuple) and v for v in value.values())
        if nested and indent < 4:
            print(name)
            print_metadata(value, indent + 2)
        else:
            print("\n".join(_fill(f"{name} {brief(value)}", indent + 2)))
    if len(entries) > _MOST_LINES:
        print(" " * indent + f"... and {len(entries) - _MOST_LINES:,} more")


# -- the tensors ---------------------------------------------------------------------------------------------


def group_tensors(value: Any, *, apart: bool) -> dict[str, dict[str, list[Tensor]]]:
    """The tensors by entry of the file and by name within it.

    Those whose paths differ in a number only, as an optimizer's state does, come under one name, and so does
    the second network in `training`, the best one so far, unless `apart`.
    """
    groups: dict[str, dict[str, list[tuple[str, Tensor]]]] = {}
    tensors = [(path, item) for path, item in walk(value) if isinstance(item, Tensor)]
    for path, tensor in tensors:
        entry, rest = (key_text(path[0]), path[1:]) if len(path) > 1 else (TOP, path)
        name = _joined(rest if apart else ["*" if _is_number(key) else key for key in rest])
        if not apart and entry == "training" and name.startswith("best.state_dict."):
            name = "best.state_dict.*"
        groups.setdefault(entry, {}).setdefault(name, []).append((_joined(rest), tensor))
    return {
        entry: {
            found[0][0] if len(found) == 1 else f"{name} ({len(found)} tensors)": [tensor for _, tensor in found]
            for name, found in names.items()
        }
        for entry, names in groups.items()
    }


def _is_number(key: Any) -> bool:
    """Whether a key only counts; in the state of a whole optimizer the reader puts such names for the parameters."""
    return isinstance(key, int) or (isinstance(key, str) and key.startswith("<Tensor "))


def _joined(path: Iterable[Any]) -> str:
    """A path as text: state[3].exp_avg; the tensor itself, where the path is empty, is (itself)."""
    text = "".join(f"[{key}]" if isinstance(key, int) or key == "*" else f".{key_text(key)}" for key in path)
    return text.removeprefix(".") or "(itself)"


def row(tensors: list[Tensor]) -> tuple[list[str], str]:
    """The cells of the table's line for one tensor or several: shape, dtype, bytes, min, max, distinct values.

    Also how many values are NaN or infinite, in words.
    """
    shapes = {"x".join(map(str, t.shape)) or "scalar" for t in tensors}
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
    size = sum(t.numel() * t.element_size() for t in tensors)
    cells = [*(each.pop() if len(each) == 1 else "various" for each in (shapes, dtypes)), str(size)]
    values = np.concatenate([_numbers(t) for t in tensors])
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    odd = " and ".join(f"{count:,} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite")) if count)
    ordered = values[~np.isnan(values)] if values.dtype.kind != "c" else values[:0]
    bounds = [f"{each + 0.0:.4g}" for each in (ordered.min(), ordered.max())] if len(ordered) else ["-", "-"]
    return [*cells, *bounds, str(len(np.unique(values)))], odd  # np.unique counts all NaN as one


def _numbers(t: Tensor) -> np.ndarray:
    """All values in one dimension, in a type of numpy's that holds each exactly."""
    t = t.reshape(-1)
    if t.dtype.is_complex:
        return t.to(torch.complex128).numpy()
    return t.to(torch.float64).numpy() if t.dtype.is_floating_point else t.numpy()


def print_tensors(groups: dict[str, dict[str, list[Tensor]]], most_bytes: int) -> None:
    """A table for each entry of the file; a name that has no room goes on a line of its own.

    most_bytes: stop where so much has been looked at: in a malicious file many names may share one tensor.
    """
    lines = looked_at = 0
    for entry, names in groups.items():
        found = sum(map(len, names.values()))
        lines += len(names) + 1
        looked_at += sum(t.numel() * t.element_size() for tensors in names.values() for t in tensors)
        if lines > _MOST_ROWS or looked_at > most_bytes:
            print("\n... and more tensors than have room here")
            break
        print(f"\nTensors {'at the top level' if entry == TOP else f'in {entry}'}: {found:,}")
        rows = [(name, *row(tensors)) for name, tensors in names.items()]
        rows.insert(0, ("name", ["shape", "dtype", "bytes", "min", "max", "unique"], ""))
        widths = [max(len(cells[i]) for _, cells, _ in rows) for i in range(6)]
        room = max(8, min(WIDTH - sum(widths) - 6, max(len(name) for name, _, _ in rows)))
        for name, cells, odd in rows:
            if len(name) > room:
                print(name)
                name = ""
            left = [f"{text:<{width}}" for text, width in zip(cells[:2], widths[:2], strict=True)]
            right = [f"{text:>{width}}" for text, width in zip(cells[2:], widths[2:], strict=True)]
            print(f"{name:<{room}}", *left, *right)
            if odd:
                print(f"  ⚠ {odd}")
    print("unique: how many distinct values there are, all NaN counted as one")


# -- the script ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = cli.ArgumentParser("Show what is in a .pth file, ours or not. No code in the file is run.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the file to look into")
    parser.add_argument("--all", action="store_true", help="list the tensors of an optimizer one by one, too")
    parser.add_argument("--weights-key", metavar="NAME", help="the key of the weights, where several in the file fit")
    args = parser.parse_args()
    path = args.checkpoint
    contents, sha256 = checkpoints.examine(path)
    raw, size = contents.value, path.stat().st_size

    print(f"File: {path}\n  {size:,} bytes ({size / 1e6:.2f} MB)\n  SHA-256 {sha256}")
    print("\n".join(describe(path, raw, args.weights_key) + describe_inert(contents.inert)))
    if isinstance(raw, dict) and any(not isinstance(value, Tensor) for value in raw.values()):
        print("\nMetadata")
        print_metadata(raw)
    elif not isinstance(raw, dict | Tensor):
        print("\n".join(_fill(f"Content: {brief(raw)}")))
    groups = group_tensors(raw, apart=args.all)
    if groups:
        print_tensors(groups, 16 * size)
    tensors = [tensor for names in groups.values() for found in names.values() for tensor in found]
    totals = [
        counted(len(tensors), "tensor"),
        counted(sum(t.numel() for t in tensors), "value"),
        counted(sum(t.numel() * t.element_size() for t in tensors), "byte"),
    ]
    print(f"\nTotal: {', '.join(totals)} of a file of {size:,}")


if __name__ == "__main__":
    cli.run(main)
