"""Reading a `.pth` file from anybody: nothing in it is run, and memory stays in proportion to the file's size.

`torch.load(weights_only=True)` does the loading. By itself it leaves room for harm: a few bytes can ask for an array
of any size, a short list can be copied a million times over, versions before 2.6 could be led to run code by a tar
archive. So a rehearsal that makes nothing goes through the file first, and only what checkpoints need passes.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor

_MOST_OPERATIONS = 1_000_000  # of the pickles in one file; the largest checkpoint of ours has some 40,000
_MOST_PARTS = 50_000  # of the archive
_MOST_VALUES = 200_000  # lists that share or hold themselves stand for endlessly many
_DEEPEST = 50
_MOST_SHARED = 4  # times the size of the file: tensors may share a storage, a million of them too
_MOST_DIMENSIONS = 8
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object itself, the storages' names


class Refused(Exception):
    """The file asks for something that no checkpoint needs."""


def load(content: bytes) -> Any:
    """What a file of torch.save holds: dictionaries, lists, sets, plain values and dense tensors on the CPU.

    Raises Refused for anything else, and whatever the readers below raise for a file that is damaged.
    """
    archive = content.startswith(b"PK")
    if archive:
        content, pickles, parts = _rewrite(content)
    else:
        _refuse_tar(content)
        pickles, parts = [content], None
    for data in pickles:
        stream = io.BytesIO(data)
        for _ in range(1 if archive else _LEGACY_PICKLES):
            start = stream.tell()
            _count_operations(stream)
            _Rehearsal(data[start : stream.tell()], parts, len(content)).load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return _Plain(len(content)).of(value)


def _rewrite(content: bytes) -> tuple[bytes, list[bytes], dict[str, int]]:
    """The archive written anew, its pickles, and the size of each part.

    Readers of zip files differ in what they make of a crooked one. Of a new one torch sees what we have looked at.
    """
    if content.count(b"PK\x01\x02") > _MOST_PARTS:
        raise Refused("it is an archive of too many parts")
    fresh, pickles, sizes = io.BytesIO(), [], {}
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(fresh, "w") as new:
        infos = old.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or (
            sum(info.file_size for info in infos) > len(content)
        ):
            raise Refused("its parts are compressed or overlap, which torch.save never does")
        for info in infos:
            folder, _, name = info.filename.lower().partition("/")  # torch finds parts whatever their case
            if name in sizes or folder != infos[0].filename.lower().partition("/")[0]:
                raise Refused("two of its parts have one name, or it has several folders")
            data = old.read(info)
            sizes[name] = len(data)
            if name.endswith(".pkl"):
                pickles.append(data)
            new.writestr(zipfile.ZipInfo(info.filename), data)
    return fresh.getvalue(), pickles, sizes


def _refuse_tar(content: bytes) -> None:
    try:
        tarfile.open(fileobj=io.BytesIO(content), mode="r:").close()
    except (tarfile.TarError, ValueError, OverflowError):
        return
    raise Refused("it is a tar archive")


def _count_operations(stream: io.BytesIO) -> None:
    """Look through one pickle without carrying it out; leaves `stream` behind it."""
    most = len(stream.getbuffer())
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _MOST_OPERATIONS:
            raise Refused("its pickle is too long for a checkpoint")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > most:
            raise Refused("its pickle asks for more memory than it can need")


class _Anything:
    """Stands for any object while rehearsing; what is done to it is of no account."""

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary(dict):
    """Stands for an OrderedDict while rehearsing: unlike a plain dictionary it can be given attributes."""


class _Rehearsal(pickle.Unpickler):
    """Goes through a pickle with stand-ins for the few names that checkpoints need, and refuses all others.

    parts: the sizes of the archive's parts by name; None for the format before PyTorch 1.6. limit: bytes in all.
    """

    _ITEM_BYTES = dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1)
    _ITEM_BYTES |= dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2)
    _ITEM_BYTES |= dict.fromkeys(("IntStorage", "FloatStorage"), 4)
    _ITEM_BYTES |= dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8)
    _ITEM_BYTES |= {"ComplexDoubleStorage": 16}
    _DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))

    def __init__(self, data: bytes, parts: dict[str, int] | None, limit: int) -> None:
        super().__init__(io.BytesIO(data))
        self._parts, self._limit, self._copied = parts, limit, 0

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a name: never a class, whose attributes a pickle could change."""
        known = {
            "collections.OrderedDict": self._dictionary,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": self._anything,
            "torch.Size": self._size,
            "torch.device": self._anything,
            "builtins.complex": self._anything,
            "builtins.set": self._copy,
            "builtins.bytearray": self._copy,
            "_codecs.encode": self._copy,  # bytes, as Python 3 writes them for Python 2
        }
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full in known:
            return known[full]
        if module in ("torch", "torch.storage") and name in self._ITEM_BYTES:
            return name
        if module == "torch" and name in self._DTYPES:
            return _Anything()
        raise Refused(f"{ascii(full)[1:80].rstrip(chr(39))}, which could run code when loaded")

    def persistent_load(self, pid: Any) -> _Anything:
        """A storage: its declared size must be that of its part of the archive, or fit into the file."""
        if self._parts is None:
            _, storage, key, _, count, _ = pid
        else:
            _, storage, key, _, count = pid
        size = self._ITEM_BYTES[storage]
        if type(key) is not str or type(count) is not int or count < 0:
            raise Refused("it holds a tensor with no proper storage")
        known = self._limit if self._parts is None else self._parts.get(f"data/{key}".lower(), -1)
        if count * size > known or (self._parts is not None and count * size != known):
            raise Refused("it holds a tensor whose storage has another size than the file declares")
        return _Anything()

    def _dictionary(self) -> _Dictionary:
        """Without arguments, as torch.save has it: one could be copied a million times."""
        return _Dictionary()

    def _anything(self, *_: object) -> _Anything:
        return _Anything()

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> _Anything:
        if not isinstance(storage, _Anything) or len(size) > _MOST_DIMENSIONS:
            raise Refused("it holds a tensor with no proper storage or shape")
        return _Anything()

    def _size(self, values: Any = ()) -> tuple:
        if len(values) > _MOST_DIMENSIONS:
            raise Refused("it holds a shape of too many dimensions")
        return tuple(values)

    def _copy(self, values: Any, encoding: str = "latin1") -> Any:
        """Bytes or a set, made of a string or a list that may serve many times."""
        if not isinstance(values, str | list) or encoding not in ("latin1", "latin-1"):
            raise Refused("it asks for bytes that it does not hold")
        self._copied += len(values)
        if self._copied > self._limit:
            raise Refused("it holds too many copies of one value")
        return values


@functools.cache
def _converts(dtype: torch.dtype) -> bool:
    """Whether torch turns values of this type into ordinary numbers; of the packed ones (float4) it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, dtype=dtype).to(torch.complex128)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


class _Plain:
    """Copies a loaded nest into plain dictionaries, lists, tuples, sets, values and dense tensors, or raises Refused.

    Objects from a pickle can have attributes in the place of methods; what is handed on has none.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._values, self._bytes = limit, 0, 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self._values += 1
        if self._values > _MOST_VALUES or depth > _DEEPEST:
            raise Refused("it holds too many values for a checkpoint, or itself")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {self._key(key): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, tuple):
            return tuple(self.of(item, depth + 1) for item in value)
        if isinstance(value, set):
            return {self._key(item) for item in value}
        if value is None or isinstance(
            value, bool | float | complex | str | bytes | bytearray | torch.dtype | torch.device
        ):
            return value
        if type(value) is int and value.bit_length() <= 64:
            return value
        raise Refused(f"it holds a {type(value).__name__} that is no plain value")

    def _key(self, key: Any) -> Any:
        if isinstance(key, str | float | bool) or key is None or (type(key) is int and key.bit_length() <= 64):
            return key
        raise Refused(f"it holds a {type(key).__name__} as a key of a dictionary or in a set")

    def _tensor(self, value: Tensor) -> Tensor:
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
            raise Refused("it holds a tensor that is not plain and dense")
        if not _converts(value.dtype):
            raise Refused(f"it holds a tensor of type {value.dtype}, with which nothing can be computed")
        if value.numel() * value.element_size() > self._limit:
            raise Refused(f"it holds a tensor of shape {tuple(value.shape)}, larger than the file")
        self._bytes += value.numel() * value.element_size()
        if self._bytes > _MOST_SHARED * self._limit:
            raise Refused("it holds too many tensors that share one place in memory")
        return value.detach().resolve_conj().resolve_neg()
