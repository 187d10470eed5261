"""Interprets pickles operation by operation, and makes nothing but plain values and dense tensors.

No Unpickler takes part. The few functions that checkpoints need are written out here; every other object becomes an
`Inert` record: what a pickle names is never imported, what it would call is never called. Nothing is hashed but plain
values, and work and memory stay in proportion to the size of the file.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_OPERATIONS = 1_000_000  # of all pickles in a file; the largest checkpoint of ours has some 40,000
MOST_COPIES = 4  # times the size of the file: a few bytes can ask for many copies of one value
_MOST_UNHASHED_KEYS = 20_000  # keys that are no strings: their hashes can be chosen to collide
_MOST_DIMENSIONS = 8
_MOST_BITS = 128  # of a whole number
_LONGEST_NAME = 100
_LONGEST_TEXT = 1000  # of a name in the file
_ENTRY_BYTES = 64  # of a list, set or dictionary, at least


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
_NUMBERED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALARS = (str, bytes, int, float, bool, type(None))
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
    **{"Untyped": torch.uint8, "QInt8": torch.int8, "QUInt8": torch.uint8, "QInt32": torch.int32},
    **{"QUInt4x2": torch.uint8, "QUInt2x4": torch.uint8},
}


class Interpreter:
    """Interprets the pickles of one file of `size` bytes; its counters hold for all of them together.

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

        def marked() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            self._operations += 1
            require(self._operations <= _MOST_OPERATIONS, "its pickle is too long for a checkpoint")
            if name in _LITERALS:
                if type(argument) is int:
                    require(argument.bit_length() <= _MOST_BITS, "it holds a number of too many digits")
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
            elif name in _NUMBERED:
                stack.append(tuple([stack.pop() for _ in range(_NUMBERED[name])][::-1]))
            elif name == "TUPLE":
                stack.append(tuple(marked()))
            elif name == "LIST":
                stack.append(marked())
            elif name == "DICT":
                items = marked()
                stack.append({})
                self._set_items(stack[-1], items)
            elif name in ("APPEND", "APPENDS", "ADDITEMS"):
                items = [stack.pop()] if name == "APPEND" else marked()
                self._append(stack[-1], items)
            elif name == "SETITEMS":
                items = marked()
                self._set_items(stack[-1], items)
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items(stack[-1], [key, value])
            elif name == "FROZENSET":
                stack.append(frozenset(self._key(item) for item in marked()))
            elif name == "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._named(module, attribute))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            elif name == "NEWOBJ_EX":
                options, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(function, (arguments, options) if options else arguments))
            elif name == "INST":
                stack.append(self._call(self._named(*argument.split(" ", 1)), tuple(marked())))
            elif name == "OBJ":
                function, *arguments = marked()
                stack.append(self._call(function, tuple(arguments)))
            elif name == "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            elif name == "POP":
                _ = marks.pop() if marks and marks[-1] == len(stack) else stack.pop()
            elif name == "POP_MARK":
                marked()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name not in ("PROTO", "FRAME", "READONLY_BUFFER", "STOP"):  # extension codes, buffers outside
                raise Refused(f"its pickle uses {name}, which torch.save never does")
        return stack.pop()

    def _append(self, target: Any, items: list[Any]) -> None:
        if type(target) is set:
            target.update(self._key(item) for item in items)
        elif type(target) is list:
            target.extend(items)
        else:
            _contents(target, list).extend(items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        entries = target if type(target) is dict else _contents(target, dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """A key of a dictionary or a member of a set. Nothing else is ever hashed."""
        if type(key) in (str, bytes):
            return key
        self._keys += 1
        require(self._keys <= _MOST_UNHASHED_KEYS, "it holds too many keys that are no strings")
        if isinstance(key, Inert | Tensor | torch.dtype):  # classes, parameters: as text, one for each
            return f"<{key.name if isinstance(key, Inert) else type(key).__name__} {self._keys}>"
        shallow = key if type(key) is tuple and len(key) <= _MOST_DIMENSIONS else (key,)
        require(all(type(item) in _SCALARS for item in shallow), "it holds a key that is no plain value")
        return key

    def _named(self, module: Any, attribute: Any) -> Any:
        """What stands for a name: a dtype, or a record."""
        require(type(module) is str and type(attribute) is str, "it names something without a name")
        require(len(module) + len(attribute) <= _LONGEST_TEXT, "it names something with too long a name")
        full = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1).replace("numpy._core.", "numpy.core.")
        if full in _DTYPES:
            return _DTYPES[full]
        name = ascii(full)[1:-1][:_LONGEST_NAME]
        if name not in _KNOWN and storage_type(name) is None:
            self.names.setdefault(name, False)
        return Inert(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        """The value of a call of the few functions that checkpoints need; of any other, a record of the call."""
        require(type(arguments) is tuple, "it calls something without arguments")
        only_named = isinstance(function, Inert) and function.arguments is None
        handler = _KNOWN.get(function.name) if only_named and len(arguments) <= _MOST_DIMENSIONS + 2 else None
        if handler:
            made = getattr(self, f"_{handler}")(*arguments)
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

    # -- the functions that checkpoints need -------------------------------------------------------------------

    def _persistent(self, pid: Any) -> Any:
        raise Refused("it refers to what lies outside of it")

    def _stored(self, *_: Any) -> Any:
        return NotImplemented

    def _spend(self, size: int) -> None:
        """Count the bytes of a copy: a value may serve in as many calls as there are operations."""
        self._copied += size
        require(self._copied <= MOST_COPIES * self._size + 1_000_000, "it asks for too many copies of one value")

    def _dictionary(self, *arguments: Any) -> Any:
        """OrderedDict(), OrderedDict([[key, value], ...]) as Python 2 has it, Counter({...}), defaultdict(...)."""
        made: dict[Any, Any] = {}
        pairs = arguments[0] if arguments and not isinstance(arguments[0], Inert) else None
        if pairs:
            require(type(pairs) in (dict, list), "it holds a dictionary of no pairs")
            self._spend(_ENTRY_BYTES * len(pairs))
            items = list(pairs.items()) if type(pairs) is dict else pairs
            require(all(type(pair) in (list, tuple) for pair in items), "it holds a dictionary of no pairs")
            self._set_items(made, [item for key, value in items for item in (key, value)])
        return made

    def _items(self, values: Any = (), *_: Any) -> Any:
        """deque([...]), as a list."""
        if type(values) not in (list, tuple):
            return NotImplemented
        self._spend(_ENTRY_BYTES * len(values))
        return list(values)

    def _set(self, values: Any = (), *_: Any) -> Any:
        items = self._items(values)
        return items if items is NotImplemented else {self._key(item) for item in items}

    def _size_of(self, values: Any = (), *_: Any) -> tuple:
        require(type(values) in (list, tuple) and len(values) <= _MOST_DIMENSIONS, "it holds no proper shape")
        return tuple(values)

    def _bytes(self, value: Any = b"", encoding: Any = "latin1", *_: Any) -> Any:
        """_codecs.encode(text, "latin1"), as Python 3 writes bytes for Python 2; bytearray(bytes)."""
        if type(value) not in (str, bytes) or encoding not in ("latin1", "latin-1"):
            return NotImplemented
        self._spend(len(value))
        return value.encode("latin1") if type(value) is str else value

    def _complex(self, *parts: Any) -> Any:
        return complex(*parts) if len(parts) == 2 and all(type(p) in (int, float) for p in parts) else NotImplemented

    def _device(self, *parts: Any) -> Any:
        plain = all(type(p) is int or (type(p) is str and len(p) < 20) for p in parts)
        return ":".join(map(str, parts)) if plain else NotImplemented

    def _first(self, value: Any = None, *_: Any) -> Any:
        """A Parameter: the tensor in it."""
        return value if isinstance(value, Tensor) else NotImplemented

    def _of_type(self, function: Any = None, _type: Any = None, arguments: Any = (), *_: Any) -> Any:
        """A tensor with attributes, or of a type of its own."""
        builds = isinstance(function, Inert) and function.name.startswith("torch._utils._rebuild_tensor")
        return self._call(function, arguments) if builds else NotImplemented

    def _typed(self, storage: Any, *more: Any) -> Any:
        """_rebuild_tensor_v3: as _tensor, with a storage of bytes and the dtype after the hooks."""
        dtype = more[5]
        require(isinstance(dtype, torch.dtype) and isinstance(storage, Tensor), "it holds a tensor of no type")
        if not _computes(dtype):
            return NotImplemented
        return self._tensor(storage.view(dtype), *more[:5], *more[6:])

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        """more: requires_grad, hooks, and what is to be done to the stored values."""
        require(isinstance(storage, Tensor) and storage.ndim == 1, "it holds a tensor with no proper storage")
        require(type(size) is tuple and type(stride) is tuple, "it holds a tensor with no proper shape")
        numbers = (offset, *size, *stride)
        proper = len(size) == len(stride) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in numbers)
        require(proper, "it holds a tensor with no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
        require(last < len(storage), "it holds a tensor that reaches beyond its storage")
        made = storage.as_strided(size, stride, storage.storage_offset() + offset)  # it may be a part of one
        view = more[2] if len(more) > 2 and type(more[2]) is dict else {}
        made = torch._neg_view(made) if view.get("neg") is True else made
        return made.conj() if view.get("conj") is True else made

    def _scalar(self, dtype: Any = None, data: Any = b"", *_: Any) -> Any:
        made = self._array(data, dtype, (), "C")
        return made if made is NotImplemented else made.item()

    def _frombuffer(self, data: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C", *_: Any) -> Any:
        return self._array(data, dtype, shape, order)

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        """The numbers of an array of numpy's as a tensor; NotImplemented for objects, dates, text."""
        kind = _numpy_dtype(dtype)
        if kind is None or type(data) not in (bytes, str, bytearray) or type(shape) is not tuple:
            return NotImplemented
        self._spend(len(data))
        data = data.encode("latin1") if type(data) is str else data
        proper = len(shape) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
        require(proper and math.prod(shape) * kind.itemsize == len(data), "it holds an array that lacks its numbers")
        values = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))

    def _record(self, *arguments: Any) -> Inert:
        """Of a dtype or an array of numpy's, whose state is still to come."""
        return Inert("numpy.dtype" if arguments and type(arguments[0]) is str else ARRAY, arguments)


ARRAY = "numpy.core.multiarray._reconstruct"
_KNOWN: dict[str, str | None] = {
    "collections.OrderedDict": "dictionary",
    "collections.Counter": "dictionary",
    "collections.defaultdict": "dictionary",
    "collections.deque": "items",
    "builtins.set": "set",
    "builtins.frozenset": "set",
    "builtins.complex": "complex",
    "builtins.bytes": "bytes",
    "builtins.bytearray": "bytes",
    "_codecs.encode": "bytes",
    "torch.Size": "size_of",
    "torch.device": "device",
    "torch._utils._rebuild_tensor": "tensor",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch._utils._rebuild_tensor_v3": "typed",
    "torch._utils._rebuild_parameter": "first",
    "torch._utils._rebuild_parameter_with_state": "first",
    "torch.nn.parameter.Parameter": "first",
    "torch.autograd.variable.Variable": "first",
    "torch._tensor._rebuild_from_type_v2": "of_type",
    "torch.Tensor": None,
    "torch.storage._load_from_bytes": "stored",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy.core.numeric._frombuffer": "frombuffer",
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


@functools.cache
def _computes(dtype: torch.dtype) -> bool:
    """Whether torch turns values of this type into ordinary numbers; of the packed ones (float4) it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, dtype=dtype).to(torch.complex128)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
