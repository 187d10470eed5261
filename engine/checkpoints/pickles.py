"""Interprets pickles operation by operation, and makes nothing but plain values and dense tensors.

No Unpickler takes part. The few functions that checkpoints need are written out here; every other object becomes an
`Inert` record: what a pickle names is never imported, what it would call is never called. Nothing is hashed but plain
values, and work and memory stay in proportion to the size of the file.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_OPERATIONS = 1_000_000  # of all pickles in a file; the largest checkpoint of ours has some 40,000
MOST_COPIES = 4  # times the size of the file: a few bytes can ask for many copies of one value
_MOST_COLLIDING_KEYS = 20_000  # keys other than strings: their hashes can be chosen to collide
_MOST_DIMENSIONS = 8
_MOST_BITS = 128  # of a whole number
_LONGEST_NAME = 100
_LONGEST_TEXT = 1000  # of a name in the file
_ENTRY_BYTES = 64  # of a set or dictionary, at least


class Refused(Exception):
    """The file asks for something that no checkpoint needs."""


class OtherKind(Refused):
    """The file is of another kind; the message says which, and what to do."""


@dataclass(eq=False, repr=False, slots=True)
class Inert:
    """An object that the file describes and that was not made.

    arguments: what `name` would be called with on an ordinary load; None where it is only named.
    state: what the object would be given as its attributes. contents: its items, of a list's or dictionary's kind.
    """

    name: str
    arguments: tuple | None = None
    state: Any = None
    contents: list | dict | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SCALARS = (str, bytes, int, float, bool, type(None))
_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
    **{"Untyped": torch.uint8, "QInt8": torch.int8, "QUInt8": torch.uint8, "QInt32": torch.int32},
}


class Interpreter:
    """Interprets the pickles of one file of `size` bytes; its counters hold for all of them together.

    What lies outside of the pickle is for reader.py: `_persistent` and `_stored`.
    names: those of the objects that are not made -> whether they would be called.
    """

    def __init__(self, size: int) -> None:
        self.names: dict[str, bool] = {}
        self._size, self._operations, self._copied, self._keys = size, 0, 0, 0

    def pickle(self, stream: io.BytesIO) -> Any:
        """The value of the pickle at the stream's position; leaves the stream behind it."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def taken(start: int) -> list[Any]:
            items = stack[start:]
            del stack[start:]
            return items

        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            self._operations += 1
            require(self._operations <= _MOST_OPERATIONS, "its pickle is too long for a checkpoint")
            if name in _LITERALS:
                short = type(argument) is not int or argument.bit_length() <= _MOST_BITS
                require(short, "it holds a number of too many digits")
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                index = len(memo) if name == "MEMOIZE" else argument
                require(0 <= index <= self._operations, "its pickle asks for more memory than it can need")
                memo[index] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple(taken(marks.pop() if name == "TUPLE" else -int(name[-1]))))
            elif name in ("APPEND", "APPENDS", "ADDITEMS"):
                items = taken(-1 if name == "APPEND" else marks.pop())
                self._append(stack[-1], items)
            elif name in ("SETITEM", "SETITEMS"):
                items = taken(-2 if name == "SETITEM" else marks.pop())
                self._set_items(stack[-1], items)
            elif name == "FROZENSET":
                stack.append({self._key(item) for item in taken(marks.pop())})
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                stack.append(self._named(*(argument.split(" ", 1) if argument else taken(-2))))
            elif name in ("REDUCE", "NEWOBJ"):
                stack.append(self._call(*taken(-2)))
            elif name == "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            elif name in ("POP", "POP_MARK"):
                taken(-1 if name == "POP" else marks.pop())
            elif name not in ("PROTO", "FRAME", "STOP"):  # extension codes, among others
                raise Refused(f"its pickle uses {name}, which torch.save never does")
        return stack.pop()

    def _append(self, target: Any, items: list[Any]) -> None:
        if type(target) is set:
            target.update(self._key(item) for item in items)
        else:
            (target if type(target) is list else _contents(target, list)).extend(items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        entries = target if type(target) is dict else _contents(target, dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """A key of a dictionary or a member of a set. Nothing else is ever hashed."""
        if type(key) in (str, bytes):
            return key
        self._keys += 1
        require(self._keys <= _MOST_COLLIDING_KEYS, "it holds too many keys that are no strings")
        if isinstance(key, Inert | Tensor):  # classes, parameters: as text, one for each
            return f"<{key.name if isinstance(key, Inert) else type(key).__name__} {self._keys}>"
        shallow = key if type(key) is tuple and len(key) <= _MOST_DIMENSIONS else (key,)
        require(all(type(item) in _SCALARS for item in shallow), "it holds a key that is no plain value")
        return key

    def _named(self, module: Any, attribute: Any) -> Inert:
        require(type(module) is str and type(attribute) is str, "it names something without a name")
        require(len(module) + len(attribute) <= _LONGEST_TEXT, "it names something with too long a name")
        full = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1).replace("numpy._core.", "numpy.core.")
        name = ascii(full)[1:-1][:_LONGEST_NAME]
        if name not in _KNOWN and storage_type(name) is None:
            self.names.setdefault(name, False)
        return Inert(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        """The value of a call of the few functions that checkpoints need; of any other, a record of the call."""
        require(type(arguments) is tuple, "it calls something without arguments")
        only_named = isinstance(function, Inert) and function.arguments is None
        handler = _KNOWN.get(function.name) if only_named and len(arguments) <= _MOST_DIMENSIONS + 2 else None
        made = getattr(self, f"_{handler}")(*arguments) if handler else NotImplemented
        if made is not NotImplemented:
            return made
        name = function.name if isinstance(function, Inert) else type(function).__name__
        name = name if only_named else f"{name[: _LONGEST_NAME - 2]}()"
        self.names[name] = True
        return Inert(name, arguments)

    def _build(self, target: Any, state: Any) -> None:
        """Attributes for a record; those of a dictionary or tensor do not matter. An array gets its numbers."""
        if not isinstance(target, Inert):
            return
        if target.name == ARRAY and target.arguments is not None and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, data = state
            made = self._array(data, dtype, shape, "F" if fortran else "C")
            state = state if made is NotImplemented else made
        if target.arguments is None or (target.name == ARRAY and not isinstance(state, Tensor)):
            self.names[target.name] = True  # a class or function would be changed, an array made of objects
        target.state = state

    # -- the functions that checkpoints need; NotImplemented: the call stays a record --------------------------

    def _spend(self, size: int) -> None:
        """Count the bytes of a copy: a value may serve in as many calls as there are operations."""
        self._copied += size
        require(self._copied <= MOST_COPIES * self._size + 1_000_000, "it asks for too many copies of one value")

    def _dictionary(self, pairs: Any = None, *_: Any) -> Any:
        """OrderedDict(), OrderedDict([[key, value], ...]) as Python 2 has it, Counter({...}), defaultdict(list)."""
        made: dict[Any, Any] = {}
        if type(pairs) in (dict, list):
            self._spend(_ENTRY_BYTES * len(pairs))
            items = list(pairs.items()) if type(pairs) is dict else pairs
            require(all(type(pair) in (list, tuple) for pair in items), "it holds a dictionary of no pairs")
            self._set_items(made, [item for key, value in items for item in (key, value)])
        return made

    def _set(self, values: Any = ()) -> Any:
        require(type(values) in (list, tuple), "it holds a set of no items")
        self._spend(_ENTRY_BYTES * len(values))
        return {self._key(item) for item in values}

    def _bytes(self, value: Any = b"", encoding: Any = "latin1") -> Any:
        """_codecs.encode(text, "latin1"), as Python 3 writes bytes for Python 2; bytes(), the empty ones."""
        if type(value) not in (str, bytes) or encoding != "latin1":
            return NotImplemented
        self._spend(len(value))
        return value.encode("latin1") if type(value) is str else value

    def _parameter(self, value: Any = None, *_: Any) -> Any:
        """The tensor in it."""
        return value if isinstance(value, Tensor) else NotImplemented

    def _of_type(self, function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
        """A tensor with attributes, or of a type of its own."""
        builds = isinstance(function, Inert) and function.name.startswith("torch._utils._rebuild_tensor")
        return self._call(function, arguments) if builds else NotImplemented

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        """more: requires_grad, hooks, and what is to be done to the stored values."""
        if more[2:] and more[2]:  # conjugated, negated
            return NotImplemented
        require(isinstance(storage, Tensor) and storage.ndim == 1, "it holds a tensor with no proper storage")
        require(type(size) is tuple and type(stride) is tuple, "it holds a tensor with no proper shape")
        numbers = (offset, *size, *stride)
        proper = len(size) == len(stride) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in numbers)
        require(proper, "it holds a tensor with no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
        require(last < len(storage), "it holds a tensor that reaches beyond its storage")
        return storage.as_strided(size, stride, offset)

    def _scalar(self, dtype: Any, data: Any) -> Any:
        made = self._array(data, dtype, (), "C")
        return made if made is NotImplemented else made.item()

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
        """The numbers of an array of numpy's as a tensor; NotImplemented for objects, dates, text."""
        kind = _numpy_dtype(dtype)
        known = kind is not None and type(data) in (bytes, str, bytearray) and type(shape) is tuple
        if not known or order not in ("C", "F"):
            return NotImplemented
        self._spend(len(data))
        data = data.encode("latin1") if type(data) is str else data
        proper = len(shape) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
        require(proper and math.prod(shape) * kind.itemsize == len(data), "it holds an array that lacks its numbers")
        values = np.frombuffer(data, kind).reshape(shape, order=order)
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))

    def _record(self, *arguments: Any) -> Inert:
        """Of a dtype or an array of numpy's, whose state is still to come."""
        return Inert("numpy.dtype" if arguments and type(arguments[0]) is str else ARRAY, arguments)


ARRAY = "numpy.core.multiarray._reconstruct"
_KNOWN: dict[str, str | None] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter", "collections.defaultdict"), "dictionary"),
    **dict.fromkeys(("builtins.set", "builtins.frozenset"), "set"),
    **dict.fromkeys(("builtins.bytes", "_codecs.encode"), "bytes"),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), "tensor"),
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), "parameter"),
    **dict.fromkeys(("torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"), "parameter"),  # torch 0.3
    "torch._tensor._rebuild_from_type_v2": "of_type",
    "torch.Tensor": None,
    "torch.storage._load_from_bytes": "stored",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy.core.numeric._frombuffer": "array",
    "numpy.dtype": "record",
    "numpy.ndarray": None,
    ARRAY: "record",
}


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def _contents(target: Any, kind: type) -> Any:
    """The items of a record, which is no list or dictionary itself but takes them."""
    require(isinstance(target, Inert) and isinstance(target.contents, kind | None), "it adds items to what has none")
    if target.contents is None:
        target.contents = kind()
    return target.contents


def storage_type(name: str) -> torch.dtype | None:
    module, _, attribute = name.rpartition(".")
    known = module in ("torch", "torch.cuda", "torch.storage") and attribute.endswith("Storage")
    return _STORAGES.get(attribute.removesuffix("Storage")) if known else None


def _numpy_dtype(record: Any) -> np.dtype | None:
    """The dtype that a record stands for, of numbers that torch has too."""
    if not isinstance(record, Inert) or record.name != "numpy.dtype" or not record.arguments:
        return None
    code = record.arguments[0]
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"):
        return None
    order = record.state[1] if type(record.state) is tuple and len(record.state) > 1 else "="
    return np.dtype(code).newbyteorder(order) if order in ("<", ">", "|", "=") else None
