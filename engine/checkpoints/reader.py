"""Reading a `.pth` file from anybody: nothing in it is run, and memory and time stay in proportion to its size.

Both formats that torch.save has had, and plain pickles; torch.load takes no part. pickles.py interprets what is in
the pickle. Here are the file around it, the storages of its tensors, and the bounds of what is returned.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.pickles import ARRAY, MOST_COPIES, Inert, Interpreter, OtherKind, require, storage_type

_MOST_VALUES = 1_000_000  # lists that share their items stand for endlessly many
_MOST_TEXT = 32  # times the size of the file: short names that a file holds once may occur often
_MOST_PARTS = 50_000  # of the archive
_DEEPEST = 50
_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch.save before 1.6 begins


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


class _Reader(Interpreter):
    """The pickles of a file with the storages beside them."""

    _storage: Callable[[str, int, int], Tensor] | None = None  # key, number of values, bytes of each -> its bytes

    def _stored(self, data: Any) -> Any:
        """A storage in a plain pickle: the bytes of a file of torch.save of its own."""
        require(type(data) is bytes, "it holds an invalid storage")
        self._spend(len(data))
        return self.stream(data)

    def _persistent(self, pid: Any) -> Any:
        """A storage, as a tensor of one dimension; in old files also a class with its source, which is only named."""
        require(type(pid) is tuple and 4 <= len(pid) <= 6, "it holds an invalid storage")
        if len(pid) == 4 and pid[0] == "module":
            return pid[1]
        _, kind, key, _, count = pid[:5]
        require(pid[0] == "storage" and pid[5:] in ((), (None,)), "it holds an invalid storage")  # None: no view
        name = kind.name if isinstance(kind, Inert) else type(kind).__name__
        dtype = storage_type(name)
        require(dtype is not None, f"it holds a storage of an unknown type, {name}")
        require(type(key) is str and type(count) is int, "it holds an invalid storage")
        require(self._storage is not None, "it holds a storage where none can be")
        return self._storage(key, count, dtype.itemsize).view(dtype)

    def archive(self, content: bytes) -> Any:
        """The object in a file of torch.save since 1.6: an archive of a pickle and a part for each storage."""
        parts = _parts(content)
        require(parts.get("byteorder", b"little") == b"little", "it was written in the byte order of another machine")
        storages: dict[str, Tensor] = {}

        def storage(key: str, count: int, item: int) -> Tensor:
            if key not in storages:
                storages[key] = _memory(bytearray(parts.pop(f"data/{key}".lower(), b"")))
            same = len(storages[key]) == count * item
            require(same, "it holds a tensor whose storage has another size than the file declares")
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
                require(total <= len(content), "it holds a tensor whose storage has another size than the file")
                buffers[key] = count, bytearray(count * item)
            require(len(buffers[key][1]) == count * item, "it holds a storage of two sizes")
            return _memory(buffers[key][1])

        first = self.pickle(stream)
        if type(first) is not int or first != _MAGIC:
            return first
        self.pickle(stream)  # the version of the format
        system = self.pickle(stream)
        little = type(system) is dict and system.get("little_endian") is True
        require(little, "it was written in the byte order of another machine")
        self._storage = storage
        value = self.pickle(stream)
        self._storage = None
        keys, position = self.pickle(stream), stream.tell()
        require(type(keys) is list and all(type(key) is str for key in keys), "it holds no list of its storages")
        require(set(buffers) <= set(keys), "it lacks a storage")
        for key in keys:
            count, buffer = buffers.get(key, (0, bytearray()))
            require(struct.unpack_from("<q", content, position) == (count,), "it holds a storage of two sizes")
            memoryview(buffer)[:] = content[position + 8 : position + 8 + len(buffer)]  # or raises ValueError
            position += 8 + len(buffer)
        return value


def _memory(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)


def _parts(content: bytes) -> dict[str, bytes]:
    """The parts of an archive by their names below its folder, in small letters: torch ignores the case."""
    require(content.count(b"PK\x01\x02") <= _MOST_PARTS, "it is an archive of too many parts")
    parts: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        names = [info.filename.lower() for info in infos]
        inner = [name.partition("/")[2] for name in names]
        if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
            raise OtherKind("is a TorchScript program, not a checkpoint; save the state_dict of the network instead")
        if "data.pkl" not in inner:
            found = ascii(", ".join(names[:3]))[1:100] if names else "nothing"
            raise OtherKind(f"is an archive that torch.save did not make ({found}); give a .pth file")
        ends = [info.header_offset for info in infos[1:]] + [len(content)]
        for info, name, end in zip(infos, inner, ends, strict=True):
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            apart = stored and info.header_offset + info.file_size < end
            require(apart, "its parts are compressed or overlap, which torch.save never does")
            require(name not in parts, "two of its parts have one name")
            parts[name] = archive.read(info)
    return parts


class _Copy:
    """Copies a nest into one that shares nothing, does not contain itself and is of bounded size and depth.

    A record may be reached in many ways and from itself: it stays one record, and what it holds is copied once.
    Text counts wherever it occurs: whoever looks at the result meets it every time.
    """

    def __init__(self, size: int) -> None:
        self._values, self._text, self._bytes, self._size = 0, 0, 0, size
        self._seen: set[int] = set()
        self._waiting: list[Inert] = []

    def all(self, value: Any) -> Any:
        made = self._of(value, 0)
        while self._waiting:
            record = self._waiting.pop()
            held = record.arguments, record.state, record.contents
            record.arguments, record.state, record.contents = (self._of(each, 0) for each in held)
        return made

    def _of(self, value: Any, depth: int) -> Any:
        self._values += 1
        bounded = self._values <= _MOST_VALUES and depth <= _DEEPEST
        require(bounded, "it holds too many values for a checkpoint, or itself")
        if isinstance(value, Inert) and value.name == ARRAY and isinstance(value.state, Tensor):
            value = value.state
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            require(size <= self._size, f"it holds a tensor of shape {tuple(value.shape)}, larger than the file")
            self._bytes += size
            shared = self._bytes > MOST_COPIES * self._size
            require(not shared, "it holds too many tensors that share one place in memory")
        elif isinstance(value, Inert):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._waiting.append(value)
        elif type(value) in (list, tuple):
            return type(value)([self._of(item, depth + 1) for item in value])
        elif type(value) is dict:
            self._count(value)
            return {key: self._of(item, depth + 1) for key, item in value.items()}
        else:  # the members of a set are plain values
            self._count(value if type(value) is set else (value,))
        return value

    def _count(self, values: Any) -> None:
        """Count the text in plain values, in tuples too, which keys may be."""
        flat = [each for value in values for each in (value if type(value) is tuple else (value,))]
        self._values += len(flat)
        self._text += sum(len(each) for each in flat if type(each) in (str, bytes, bytearray))
        require(self._text <= _MOST_TEXT * self._size + 1_000_000, "it holds too many copies of one text")
