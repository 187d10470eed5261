"""Reading a `.pth` file from anybody: nothing in it is run, and memory and time stay in proportion to its size.

The pickle inside is interpreted here, operation by operation, for both formats that torch.save has had and for plain
pickles; neither an Unpickler nor torch.load takes part. The result holds dictionaries, lists, tuples, sets, plain
values and dense tensors on the CPU. Every other object becomes an `Inert` record: what a file names is never
imported, what it would call is never called.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_OPERATIONS = 1_000_000  # of all pickles in a file; the largest checkpoint of ours has some 40,000
_MOST_VALUES = 1_000_000  # lists that share their items stand for endlessly many
_MOST_PARTS = 50_000  # of the archive
_MOST_COPIES = 4  # times the size of the file: a few bytes can ask for many copies of one value
_MOST_UNHASHED_KEYS = 20_000  # keys that are no strings: their hashes can be chosen to collide
_DEEPEST = 50
_MOST_DIMENSIONS = 8
_MOST_BITS = 128  # of a whole number
_LONGEST_NAME = 100
_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch.save before 1.6 begins


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


@dataclass(frozen=True)
class Contents:
    """What a file holds. inert: the names of all objects that were not made -> whether loading would call them."""

    value: Any
    inert: dict[str, bool]


def load(content: bytes) -> Contents:
    """What a file holds, with nothing in it run.

    Raises Refused for what no checkpoint needs, and errors of any type for a damaged file.
    """
    reader = _Reader(len(content))
    value = reader.archive(content) if content.startswith(b"PK") else reader.stream(content)
    return Contents(_Copy(len(content)).all(value), reader.names)


# -- the pickle ------------------------------------------------------------------------------------------------

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


class _Reader:
    """Interprets the pickles of one file; its counters hold for all of them together.

    names: those of the objects that are not made -> whether they would be called.
    """

    def __init__(self, size: int) -> None:
        self.names: dict[str, bool] = {}
        self._size, self._operations, self._copied, self._keys = size, 0, 0, 0
        self._storage: Callable[[str, int, int], Tensor] = self._no_storage
        self._nested = False

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
            _require(self._operations <= _MOST_OPERATIONS, "its pickle is too long for a checkpoint")
            if name in _LITERALS:
                if type(argument) is int:
                    _require(argument.bit_length() <= _MOST_BITS, "it holds a number of too many digits")
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                index = len(memo) if name == "MEMOIZE" else argument
                _require(0 <= index <= self._operations, "its pickle asks for more memory than it can need")
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
                stack.append(self._call(function, (*arguments, options) if options else arguments))
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
        _require(self._keys <= _MOST_UNHASHED_KEYS, "it holds too many keys that are no strings")
        if isinstance(key, Inert | Tensor | torch.dtype):  # classes, parameters: as text, one for each
            return f"<{key.name if isinstance(key, Inert) else type(key).__name__} {self._keys}>"
        shallow = key if type(key) is tuple and len(key) <= _MOST_DIMENSIONS else (key,)
        _require(all(type(item) in _SCALARS for item in shallow), "it holds a key that is no plain value")
        return key

    def _named(self, module: Any, attribute: Any) -> Any:
        """What stands for a name: a dtype, or a record."""
        _require(type(module) is str and type(attribute) is str, "it names something without a name")
        full = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1).replace("numpy._core.", "numpy.core.")
        if full in _DTYPES:
            return _DTYPES[full]
        name = ascii(full)[1:-1][:_LONGEST_NAME]
        if name not in _KNOWN and _storage_type(name) is None:
            self.names.setdefault(name, False)
        return Inert(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        """The value of a call of the few functions that checkpoints need; of any other, a record of the call."""
        _require(type(arguments) is tuple, "it calls something without arguments")
        only_named = isinstance(function, Inert) and function.arguments is None
        if only_named and _KNOWN.get(function.name):
            made = _KNOWN[function.name](self, *arguments)
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
        if target.name == _ARRAY and target.arguments is not None and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, data = state
            made = self._array(data, dtype, shape, "F" if fortran else "C")
            state = state if made is NotImplemented else made
        if target.arguments is None or (target.name == _ARRAY and not isinstance(state, Tensor)):
            self.names[target.name] = True  # a class or function would be changed, an array made of objects
        target.state = state

    # -- the functions that checkpoints need -------------------------------------------------------------------

    def _spend(self, count: int) -> None:
        self._copied += count
        _require(self._copied <= _MOST_COPIES * self._size, "it asks for too many copies of one value")

    def _dictionary(self, *arguments: Any) -> Any:
        """OrderedDict(), OrderedDict([[key, value], ...]) as Python 2 has it, Counter({...}), defaultdict(...)."""
        made: dict[Any, Any] = {}
        pairs = arguments[0] if arguments and not isinstance(arguments[0], Inert) else None
        if pairs:
            _require(type(pairs) in (dict, list), "it holds a dictionary of no pairs")
            self._spend(len(pairs))
            items = list(pairs.items()) if type(pairs) is dict else pairs
            _require(all(type(pair) in (list, tuple) for pair in items), "it holds a dictionary of no pairs")
            self._set_items(made, [item for key, value in items for item in (key, value)])
        return made

    def _items(self, values: Any = (), *_: Any) -> Any:
        """set([...]), frozenset([...]), deque([...]): a set of what can be hashed, else a list."""
        if type(values) not in (list, tuple):
            return NotImplemented
        self._spend(len(values))
        return list(values)

    def _set(self, values: Any = (), *_: Any) -> Any:
        items = self._items(values)
        return items if items is NotImplemented else {self._key(item) for item in items}

    def _size_of(self, values: Any = (), *_: Any) -> tuple:
        _require(type(values) in (list, tuple) and len(values) <= _MOST_DIMENSIONS, "it holds no proper shape")
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
        return ":".join(str(p) for p in parts) if all(type(p) in (int, str) for p in parts) else NotImplemented

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
        _require(isinstance(dtype, torch.dtype) and isinstance(storage, Tensor), "it holds a tensor of no type")
        if not _computes(dtype):
            return NotImplemented
        return self._tensor(storage.view(dtype), *more[:5], *more[6:])

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        """more: requires_grad, hooks, and what is to be done to the stored values."""
        _require(isinstance(storage, Tensor) and storage.ndim == 1, "it holds a tensor with no proper storage")
        _require(type(size) is tuple and type(stride) is tuple, "it holds a tensor with no proper shape")
        numbers = (offset, *size, *stride)
        proper = len(size) == len(stride) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in numbers)
        _require(proper, "it holds a tensor with no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
        _require(last < len(storage), "it holds a tensor that reaches beyond its storage")
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
        _require(proper and math.prod(shape) * kind.itemsize == len(data), "it holds an array that lacks its numbers")
        values = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))

    def _record(self, *arguments: Any) -> Inert:
        """Of a dtype or an array of numpy's, whose state is still to come."""
        return Inert("numpy.dtype" if arguments and type(arguments[0]) is str else _ARRAY, arguments)

    def _stored(self, data: Any = None, *_: Any) -> Any:
        """A storage in a plain pickle: the bytes of a file of torch.save of its own."""
        _require(type(data) is bytes and not self._nested, "it holds a storage that is none")
        storage, self._nested = self._storage, True
        made = self.stream(data)
        self._storage, self._nested = storage, False
        _require(isinstance(made, Tensor), "it holds a storage that is none")
        return made

    # -- storages ----------------------------------------------------------------------------------------------

    def _persistent(self, pid: Any) -> Any:
        """A storage, as a tensor of one dimension; in old files also a class with its source, which is only named."""
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        _require(type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage", "it holds a storage that is none")
        _, kind, key, _, count, *view = pid
        dtype = _storage_type(kind.name) if isinstance(kind, Inert) else None
        _require(dtype is not None, f"it holds a storage of an unknown type {str(kind)[:_LONGEST_NAME]}")
        _require(type(key) is str and type(count) is int and count >= 0, "it holds a storage that is none")
        whole = self._storage(key, count, dtype.itemsize).view(dtype)
        if not view or view[0] is None:
            return whole
        _require(type(view[0]) is tuple and len(view[0]) == 3, "it holds a storage that is none")
        _, offset, length = view[0]
        proper = type(offset) is int and type(length) is int and 0 <= offset <= offset + length <= count
        _require(proper, "it holds a tensor that reaches beyond its storage")
        return whole[offset : offset + length]

    def _no_storage(self, key: str, count: int, item: int) -> Tensor:
        raise Refused("it holds a storage where none can be")

    def archive(self, content: bytes) -> Any:
        """The object in a file of torch.save since 1.6: an archive of a pickle and a part for each storage."""
        parts = _parts(content)
        order = parts.get("byteorder", b"little")
        _require(order == b"little", "it was written in the byte order of another machine")
        storages: dict[str, Tensor] = {}

        def storage(key: str, count: int, item: int) -> Tensor:
            if key not in storages:
                storages[key] = _memory(bytearray(parts.pop(f"data/{key}".lower(), b"")))
            same = len(storages[key]) == count * item
            _require(same, "it holds a tensor whose storage has another size than the file declares")
            return storages[key]

        self._storage = storage
        return self.pickle(io.BytesIO(parts["data.pkl"]))

    def stream(self, content: bytes) -> Any:
        """The object in a file of torch.save before 1.6: five pickles, then the storages; or in a plain pickle."""
        stream, total = io.BytesIO(content), 0
        buffers: dict[str, tuple[int, bytearray]] = {}  # filled at the end: they come after the pickle

        def storage(key: str, count: int, item: int) -> Tensor:
            nonlocal total
            if key not in buffers:
                total += count * item
                _require(total <= len(content), "it holds a tensor whose storage has another size than the file")
                buffers[key] = count, bytearray(count * item)
            _require(len(buffers[key][1]) == count * item, "it holds a storage of two sizes")
            return _memory(buffers[key][1])

        self._storage = self._no_storage
        first = self.pickle(stream)
        if type(first) is not int or first != _MAGIC:
            return first
        self.pickle(stream)  # the version of the format
        system = self.pickle(stream)
        little = type(system) is dict and system.get("little_endian", True) is True
        _require(little, "it was written in the byte order of another machine")
        self._storage = storage
        value = self.pickle(stream)
        self._storage = self._no_storage
        keys, position = self.pickle(stream), stream.tell()
        _require(type(keys) is list and all(type(key) is str for key in keys), "it holds no list of its storages")
        _require(set(buffers) <= set(keys), "it lacks a storage")
        for key in keys:
            count, buffer = buffers.get(key, (0, bytearray()))
            _require(struct.unpack_from("<q", content, position) == (count,), "it holds a storage of two sizes")
            memoryview(buffer)[:] = content[position + 8 : position + 8 + len(buffer)]  # or raises ValueError
            position += 8 + len(buffer)
        return value


_ARRAY = "numpy.core.multiarray._reconstruct"
_KNOWN: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _Reader._dictionary,
    "collections.Counter": _Reader._dictionary,
    "collections.defaultdict": _Reader._dictionary,
    "collections.deque": _Reader._items,
    "builtins.set": _Reader._set,
    "builtins.frozenset": _Reader._set,
    "builtins.complex": _Reader._complex,
    "builtins.bytes": _Reader._bytes,
    "builtins.bytearray": _Reader._bytes,
    "_codecs.encode": _Reader._bytes,
    "torch.Size": _Reader._size_of,
    "torch.device": _Reader._device,
    "torch._utils._rebuild_tensor": _Reader._tensor,
    "torch._utils._rebuild_tensor_v2": _Reader._tensor,
    "torch._utils._rebuild_tensor_v3": _Reader._typed,
    "torch._utils._rebuild_parameter": _Reader._first,
    "torch._utils._rebuild_parameter_with_state": _Reader._first,
    "torch.nn.parameter.Parameter": _Reader._first,
    "torch.autograd.variable.Variable": _Reader._first,
    "torch._tensor._rebuild_from_type_v2": _Reader._of_type,
    "torch.Tensor": None,
    "torch.storage._load_from_bytes": _Reader._stored,
    "numpy.core.multiarray.scalar": _Reader._scalar,
    "numpy.core.numeric._frombuffer": _Reader._frombuffer,
    "numpy.dtype": _Reader._record,
    "numpy.ndarray": None,
    _ARRAY: _Reader._record,
}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def _contents(target: Any, kind: type) -> Any:
    """The items of a record, which is no list or dictionary itself but takes them."""
    _require(isinstance(target, Inert) and isinstance(target.contents, kind | None), "it adds items to what has none")
    if target.contents is None:
        target.contents = kind()
    return target.contents


def _storage_type(name: str) -> torch.dtype | None:
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


def _memory(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)


def _parts(content: bytes) -> dict[str, bytes]:
    """The parts of an archive by their names below its folder, in small letters: torch ignores the case."""
    _require(content.count(b"PK\x01\x02") <= _MOST_PARTS, "it is an archive of too many parts")
    parts: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        names = [info.filename.lower() for info in infos]
        inner = [name.partition("/")[2] for name in names]
        if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
            raise OtherKind("is a TorchScript program, not a checkpoint; save the state_dict of the network instead")
        if "data.pkl" not in inner:
            found = ascii(", ".join(names[:3]))[1:-1][:_LONGEST_NAME] if names else "nothing"
            raise OtherKind(f"is an archive that torch.save did not make ({found}); give a .pth file")
        _require(len({name.partition("/")[0] for name in names}) == 1, "it is an archive of several folders")
        ends = [info.header_offset for info in infos[1:]] + [len(content)]
        for info, name, end in zip(infos, inner, ends, strict=True):
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            apart = stored and info.header_offset + info.file_size < end
            _require(apart, "its parts are compressed or overlap, which torch.save never does")
            _require(name not in parts, "two of its parts have one name")
            parts[name] = archive.read(info)
    return parts


# -- what is handed out ----------------------------------------------------------------------------------------


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


class _Copy:
    """Copies nests into ones that share nothing, do not contain themselves and are of bounded size and depth.

    A record may be reached in many ways and from itself: it stays one record, and what it holds is copied once.
    """

    def __init__(self, size: int) -> None:
        self._values, self._bytes, self._size = 0, 0, size
        self._seen: set[int] = set()
        self._waiting: list[Inert] = []

    def all(self, value: Any) -> Any:
        made = self._of(value, 0)
        while self._waiting:
            record = self._waiting.pop()
            if record.arguments is not None:
                record.arguments = self._of(record.arguments, 0)
            record.state, record.contents = self._of(record.state, 0), self._of(record.contents, 0)
        return made

    def _of(self, value: Any, depth: int) -> Any:
        self._values += 1
        _require(
            self._values <= _MOST_VALUES and depth <= _DEEPEST, "it holds too many values for a checkpoint, or itself"
        )
        if isinstance(value, Inert):
            if value.name == _ARRAY and isinstance(value.state, Tensor):
                return self._tensor(value.state)
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._waiting.append(value)
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is dict:
            return {key: self._of(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._of(item, depth + 1) for item in value])
        return value  # sets hold plain values only

    def _tensor(self, value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        _require(size <= self._size, f"it holds a tensor of shape {tuple(value.shape)}, larger than the file")
        self._bytes += size
        _require(self._bytes <= _MOST_COPIES * self._size, "it holds too many tensors that share one place in memory")
        return value.resolve_conj().resolve_neg()
