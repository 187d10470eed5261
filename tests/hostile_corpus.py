"""Damaged and malicious files, for every script that reads a `.pth` file or the data.

Most are made from a good file that the script at hand would take, so that the damage is refused and not the kind of
file; code in a file would create CANARY in the working directory.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import operator
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import checkpoints
from engine.cli import UserError

CANARY = "code-was-run"
SHELL = f"touch {CANARY}"
STORAGE = b"<the end of a storage>"  # replaced by what each format has there
IN_BYTES = ("torch.storage", "_load_from_bytes")  # a storage in a plain pickle: a file in the file
REBUILD = ("torch._utils", "_rebuild_tensor_v2")
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save before 1.6 begins
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Base:
    """A good file: its dictionary without the checksum."""

    raw: dict[str, Any]

    @functools.cached_property
    def content(self) -> bytes:
        return checkpoints.serialize(self.raw)


Make = Callable[[Base], bytes]
GROUPS: dict[str, dict[str, Any]] = {}  # of the cases: in each their names, with what `Case.content` is
HARMLESS = {
    *("code: beside good weights, new format", "code: beside good weights, old format"),
    *("state: 'wandb_id' is 'x' (1)", "state: 'threads' is '-1' (2)", f"state: 'threads' is '{2**62}' (6)"),
    *("training: moments in one place", "training: best weights in one place"),
    *("training: moments the other way", "training: best weights the other way"),
    *("packed: scales that overflow", "metadata: 'kind' is 'binary' (9)"),
}
DIVERGES = {"odd: weights that overflow", "odd: a variance of zero", "folding: overflows in the shift"}


@dataclass(frozen=True)
class Case:
    """A file to be made: of bytes, from a good file, or, in the group "not a file", by a function of its path."""

    group: str
    name: str
    content: bytes | Make | Callable[[Path], object]

    def write(self, path: Path, base: Base) -> None:
        if self.group == "not a file":
            self.content(path)
        else:
            path.write_bytes(self.content(base) if callable(self.content) else self.content)

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def harmless(self) -> bool:
        """The content is odd but does no harm where a script makes nothing of it: it may be taken."""
        return self.group in ("odd", "folding") or str(self) in HARMLESS

    @property
    def diverges(self) -> bool:
        """Only a training that begins with it can tell, and has written its own checkpoint by then."""
        return str(self) in DIVERGES


def corpus() -> list[Case]:
    """All cases, in a fixed order."""
    return [Case(group, name, content) for group, table in GROUPS.items() for name, content in table.items()]


def torch_bytes(value: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def refusal(path: Path, **options: Any) -> str:
    """The message with which `load` refuses a file, without the file's name, with which it must begin."""
    with pytest.raises(UserError) as refused:
        checkpoints.load(path, **options)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{path}: ")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# -- damage ----------------------------------------------------------------------------------------------------

ENDS = [1, 2, 3, 4, 5, 16, 30, 64, 1000, -1, -2, -10, -21, -22, -23, -46, -100, -1000, -4096]
GROUPS["truncated"] = {f"at {end}": lambda b, end=end: b.content[:end] for end in ENDS}
GROUPS["truncated"] |= {f"to {n}/21": lambda b, n=n: b.content[: len(b.content) * n // 21] for n in range(1, 21)}


def _flip(content: bytes, seed: int) -> bytes:
    """A bit of the pickle or of a tensor; what lies between the parts of an archive is never read."""
    draw = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [info for info in archive.infolist() if "/data" in info.filename and info.file_size]
        part = parts[0] if seed % 3 == 0 else draw.choice(parts)
        start = content.index(archive.read(part), part.header_offset)
    damaged = bytearray(content)
    damaged[start + draw.randrange(part.file_size)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _flip_anew(content: bytes, seed: int) -> bytes:
    """A bit of a tensor flipped and the archive written anew: only the file's own checksum can tell."""
    raw = torch.load(io.BytesIO(content), weights_only=True)
    tensors = [v for v in raw.get("state_dict", raw).values() if isinstance(v, Tensor) and v.numel()]
    data = tensors[seed % len(tensors)].reshape(-1).view(torch.uint8)
    data[(seed * 7919) % len(data)] ^= 1 << (seed % 8)
    return torch_bytes(raw)


GROUPS["flipped"] = {f"bit {n}": lambda b, n=n: _flip(b.content, n) for n in range(15)}
GROUPS["flipped"] |= {f"bit {n}, archive written anew": lambda b, n=n: _flip_anew(b.content, n) for n in range(15)}


def _overwrite(content: bytes, share: float, filler: bytes) -> bytes:
    start = min(int(len(content) * share), len(content) - len(filler))
    return content[:start] + filler + content[start + len(filler) :]


FILLERS = {"zeros": bytes(4096), "noise": random.Random(1).randbytes(4096)}
GROUPS["overwritten"] = {
    f"{title} at {share}": lambda b, share=share, filler=filler: _overwrite(b.content, share, filler)
    for title, filler in FILLERS.items()
    for share in (0, 0.1, 0.5, 0.9, 1)
} | {
    "a byte before": lambda b: b"\n" + b.content,
    "a page before": lambda b: bytes(4096) + b.content,
    "as text": lambda b: b.content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    "as UTF-8": lambda b: b.content.decode("latin1").encode(),
    "as hexadecimal": lambda b: b.content.hex().encode(),
    "halves swapped": lambda b: b.content[2000:] + b.content[:2000],
}

# -- no file ---------------------------------------------------------------------------------------------------


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


DEVICES = ("/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "/proc/self/environ")
GROUPS["not a file"] = {device: lambda path, device=device: path.symlink_to(device) for device in DEVICES} | {
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a pipe": lambda path: os.mkfifo(path),
    "a hole of 300 MB": lambda path: _sparse(path, 300_000_000),
    "a hole of 1 TB": lambda path: _sparse(path, 10**12),
}

# -- pickles written by hand -----------------------------------------------------------------------------------


def archive(parts: dict[str, bytes], folder: str = "archive/", order: bytes = b"little", **options: Any) -> bytes:
    """A zip as torch.save lays it out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as file:
        for name, data in parts.items():
            file.writestr(folder + name, data.replace(STORAGE, b"tQ"))
        if folder:
            file.writestr(f"{folder}byteorder", order)
    return content.getvalue()


def legacy(data: bytes) -> bytes:
    """A pickle as the third object of a file before 1.6, with no storages behind it."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    data = data.replace(STORAGE, b"NtQ")  # not a view of a part of it
    return MAGIC + pickle.dumps(1001, 2) + pickle.dumps(system, 2) + data + pickle.dumps([], 2)


def put(value: Any) -> bytes:
    """A text, number, list, tuple or dictionary; bytes are operations of a pickle already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8b" + struct.pack("<i", len(data)) + data
    if isinstance(value, dict):
        return b"}(" + b"".join(put(key) + put(item) for key, item in value.items()) + b"u"
    items = b"".join(map(put, value))
    return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: Any) -> bytes:
    return name(module, attribute) + put(arguments) + b"R"


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + b"".join(map(put, ("storage", name("torch", kind), key, "cpu", count))) + STORAGE


def tensor(count: int, size: list[int], stride: list[int], offset: int = 0, **more: Any) -> bytes:
    hooks = call("collections", "OrderedDict")
    return call(*REBUILD, storage(count, **more), offset, tuple(size), tuple(stride), b"\x89", hooks)


def long_bytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def array(data: bytes, shape: tuple[int, ...]) -> bytes:
    """An array of bytes of numpy's, as protocol 5 has it."""
    return call("numpy._core.numeric", "_frombuffer", data, call("numpy", "dtype", "u1"), shape, "C")


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + put(value) + b"."


def both(values: dict[str, Any], stored: bytes = b"", write: Callable[[Any], bytes] = pickled) -> dict[str, Make]:
    """The pickle of each value in an archive beside `stored`, and in the old format."""
    new = {title: lambda _, v=v: archive({"data.pkl": write(v), "data/0": stored}) for title, v in values.items()}
    return new | {f"{title}, old format": lambda _, v=v: legacy(write(v)) for title, v in values.items()}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


# -- files of another kind, and code ---------------------------------------------------------------------------

COMMAND, SYSTEM, PYTHON = put(SHELL), name("os", "system"), f"open({CANARY!r}, 'w')"
CALL = call("os", "system", COMMAND)
HARM, MODULE = Call(os.system, SHELL), nn.Sequential(nn.Linear(2, 2))


def _onnx() -> bytes:
    import onnx

    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString()


SAFETENSORS = b'{"linear.bias":{"dtype":"F32","shape":[10],"data_offsets":[0,40]}}'
GROUPS["another kind"] = {
    "text": b"epoch 1, accuracy 90%\n" * 50,
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "zeros": bytes(10_000),
    "noise": random.Random(2).randbytes(10_000),
    "noise after PK": b"PK\x03\x04" + random.Random(3).randbytes(10_000),
    "noise after a magic number": MAGIC + random.Random(4).randbytes(10_000),
    "a magic number alone": MAGIC,
    "an empty zip": archive({}, folder=""),
    "a zip with no folder": archive({"data.pkl": pickle.dumps({}, 2)}, folder=""),
    "constants beside a pickle": archive({"data.pkl": pickled(CALL), "constants.pkl": pickled(CALL)}),
    "code beside a pickle": archive({"data.pkl": pickled(CALL), "code/__torch__.py": b"import os"}),
    "a tar that looks like a pickle": MAGIC.ljust(257, b"\0") + b"ustar" + bytes(250) + pickled(CALL),
    "a whole module": torch_bytes(MODULE),
    "a whole module, old format": torch_bytes(MODULE, _use_new_zipfile_serialization=False),
    "a plain pickle": pickle.dumps({"linear.bias": [0.0] * 10}),
    "a pickled array": pickle.dumps(np.zeros(3)),
    "a list": torch_bytes([torch.zeros(3)]),
    "a tensor": torch_bytes(torch.zeros(3)),
    "None": torch_bytes(None),
    "a word": torch_bytes("resnet20"),
    "TorchScript": lambda _: torch.jit.trace(MODULE, torch.zeros(1, 2)).save_to_buffer(),
    "ONNX": lambda _: _onnx(),
    "gzip": gzip.compress(b"a"),
    "safetensors": len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(40),
    "Keras, HDF5": b"\x89HDF\r\n\x1a\n" + bytes(1000),
    "Keras, archive": archive(dict.fromkeys(("metadata.json", "config.json", "model.weights.h5"), b"0"), folder=""),
    "a zip around a checkpoint": archive({"resnet20.pth": b"0"}, folder=""),
    "numpy": b"\x93NUMPY" + bytes(100),
    "a tar": tarfile.TarInfo("model.pth").tobuf(),
    "HTML after blank lines": b"\n\n\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "HTML after a mark": b"\xef\xbb\xbf<HTML lang=en>" + bytes(10),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "JSON": b'{"state_dict": {"linear.bias": [0, 1]}}',
}
CALLS = {
    "os.system": CALL,
    "eval, as Python 2 names it": call("__builtin__", "eval", PYTHON),
    "open": call("_io", "open", CANARY, "w"),
    "import": call("builtins", "__import__", "antigravity"),
    "numpy": call("numpy.testing._private.utils", "runstring", PYTHON, b"}"),
    "torch.load": call("torch.serialization", "load", "/etc/passwd"),
    "a tensor of a type": call("torch._tensor", "_rebuild_from_type_v2", SYSTEM, b"N", (SHELL,), b"}"),
    "a dotted name": b"\x80\x04" + put("torch") + put("serialization.os.system") + b"\x93(" + COMMAND + b"tR",
    "an instance": b"(" + COMMAND + b"ios\nsystem\n",
    "an object": b"(" + SYSTEM + COMMAND + b"o",
    "a new object": SYSTEM + put((SHELL,)) + b"\x81",
    "a state of a function": name("torch._utils", "_rebuild_tensor") + put({"__code__": SHELL}) + b"b",
    "a state of a class": name("torch.nn", "Linear") + put({"forward": SYSTEM}) + b"b",
    "a state of a dictionary": call("collections", "OrderedDict") + put({"items": SYSTEM}) + b"b",
    "a call that is dropped": CALL + b"0N",
    "a call of a call": call("builtins", "getattr", name("os", "path"), "os") + put((SHELL,)) + b"R",
    "a storage": b"(" + put("module") + CALL + put("a") + put("b") + STORAGE,
    "a registered extension": b"\x82\x01(" + COMMAND + b"tR",
    "a registered extension of two bytes": b"\x83\x01\x00(" + COMMAND + b"tR",
    "a registered extension of four bytes": b"\x84\x01\x00\x00\x00(" + COMMAND + b"tR",
}
TWICE = archive({"data.pkl": pickled({}), "dATA.pkl": pickled(CALL)})
GROUPS["code"] = both(CALLS)
GROUPS["code"] |= {
    "in a part of another case": TWICE,
    "in a second part of that name": TWICE.replace(b"dATA", b"data"),
}
for place in ("arch", "metrics", "state_dict", "epoch", "config"):
    change = {place: HARM, "checksum": "0" * 64}
    GROUPS["code"][f"as {place} of a checkpoint"] = lambda b, change=change: torch_bytes(b.raw | change)
for protocol in range(6):
    GROUPS["code"][f"protocol {protocol}"] = torch_bytes({"a": HARM}, pickle_protocol=protocol)
    GROUPS["code"][f"protocol {protocol}, a bare pickle"] = pickle.dumps(HARM, protocol)
for title, new in {"new": True, "old": False}.items():
    GROUPS["code"][f"beside good weights, {title} format"] = lambda b, new=new: torch_bytes(
        {"w": b.raw["state_dict"], "x": HARM}, _use_new_zipfile_serialization=new
    )

# -- bombs -----------------------------------------------------------------------------------------------------


def _remembered(value: str | bytes, use: bytes, times: int) -> bytes:
    """`value` kept in the memo, then `use` so many times, all in one list."""
    return put([put(value) + b"q\x00", use * times])


def _laughs(depth: int) -> bytes:
    """Lists of ten times the same list, `depth` levels deep: 10**depth values in all."""
    memo = [bytes([depth - 1 - level]) for level in range(depth)]  # the outermost comes first in the file
    value = b"]q" + memo[0] + b"(" + b"K\x01" * 10 + b"e"
    for level in range(1, depth):
        value = b"]q" + memo[level] + b"(" + value + (b"h" + memo[level - 1]) * 9 + b"e"
    return value


def _doubled(value: bytes, levels: int, function: bytes = b"") -> bytes:
    """A pair of a pair of ... `value`: 2**levels of it; with `function`, the call of it with each pair."""
    for level in range(levels):
        index = bytes([level])
        value += b"q" + index
        value += b"0" + function + (b"h" + index) * 2 + b"\x86R" if function else b"h" + index + b"\x86"
    return value


def _overlapping(count: int = 250, kernel: int = 8_000_000) -> bytes:
    """Each part contains all those behind it, down to one of zeros: `count` times 8 MB in all."""
    tail, infos = bytes(kernel), []
    for number in range(count):
        info = zipfile.ZipInfo(f"archive/data/{count - number:04}" if number else "archive/data.pkl")
        info.file_size, info.compress_size, info.CRC = len(tail), len(tail), zlib.crc32(tail)
        tail = info.FileHeader() + tail
        infos.append((info, len(tail)))
    content = io.BytesIO(tail)
    with zipfile.ZipFile(content, "a") as file:
        for info, size in reversed(infos):
            info.header_offset = len(tail) - size
            file.filelist.append(info)
    return content.getvalue()


def _deflated_zeros() -> bytes:
    parts = {"data.pkl": pickled({"a": tensor(10**8, [10**8], [1])}), "data/0": bytes(4 * 10**8)}
    return archive(parts, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def _deflated(base: Base) -> bytes:
    with zipfile.ZipFile(io.BytesIO(base.content)) as old:
        parts = {name.split("/", 1)[1]: old.read(name) for name in old.namelist() if "/data" in name}
    return archive(parts, compression=zipfile.ZIP_DEFLATED)


MILLION, PAIRS = "x" * 1_000_000, put([b"K\x01K\x02\x86" * 20_000])
THING, LOOP, MANY = call("a", "B"), b"h\x00", put((b"N" * 400_000,))
FILE = long_bytes(b"\x80\x02N.".ljust(10**6))
FROM_BUFFER = array(LOOP, (10**6,))
OF_A_DOUBLED_TYPE = b"(" + put("storage") + _doubled(b")", 40) + put("0") + put("cpu") + b"K\x01" + STORAGE
BOMBS = {
    "bytearray of 10 GB": call("__builtin__", "bytearray", 10**10),
    "bytes copied": _remembered(MILLION, name("_codecs", "encode") + put((LOOP, "latin1")) + b"R", 20_000),
    "sets copied": _remembered(put([*range(50_000)]), b"c__builtin__\nset\nh\x00\x85R", 20_000),
    "dictionaries copied": _remembered(PAIRS, b"ccollections\nOrderedDict\nh\x00\x85R", 20_000),
    "arrays copied": _remembered(MILLION, FROM_BUFFER, 20_000),
    "files in the file copied": _remembered(FILE, b"ctorch.storage\n_load_from_bytes\nh\x00\x85R", 20_000),
    "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
    "a memo of 10**9, in words": b"Np1000000000\n",
    "lists a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999,
    "tuples a hundred thousand deep": b")" + b"\x85" * 100_000,
    "dictionaries deep": (b"}" + put("a")) * 60_000 + b"N" + b"s" * 60_000,
    "lists fifty deep": b"]" * 60 + b"a" * 59,
    "a key that doubles": b"}" + _doubled(b")", 40) + b"Ns",
    "a member of a set that doubles": b"\x8f(" + _doubled(b")", 40) + b"\x90",
    "a tuple 400,000 deep as a key": b"}" + b")" + b"\x85" * 400_000 + b"Ns",
    "a value that doubles": _doubled(b")", 40),
    "the state of an object that doubles": THING + _doubled(b")", 40) + b"b",
    "objects that double": _doubled(b"N", 60, name("a", "B")),
    "objects in each other": THING + b"q\x00" + put({"me": LOOP}) + b"b",
    "objects a hundred thousand deep": name("a", "B") + b"q\x00" + LOOP * 99_999 + b"N" + b"\x85R" * 100_000,
    "a storage of a type that doubles": OF_A_DOUBLED_TYPE,
    "storages of many entries": _remembered(MANY, b"h\x00Q", 100_000),
    "names of a megabyte": _remembered(MILLION, b"h\x00h\x00\x93", 200_000),
    "a text many times": {"format_version": b"K\x01", "a": _remembered(MILLION, LOOP, 400_000)},
    "keys of a megabyte": _remembered(MILLION, b"}h\x00Ns", 150_000),
    "calls with many arguments": _remembered(MANY, b"ccollections\nOrderedDict\nh\x00R", 100_000),
    "modules in each other": THING + b"q\x00" + put({"_modules": {"a": LOOP, "b": LOOP}}) + b"b",
    "keys that collide": {i << 32: b"N" for i in range(30_000)},
    "a list that holds itself": b"]q\x00h\x00a",
    "a dictionary that holds itself": b"}q\x00" + put("state_dict") + b"h\x00s",
    "a million values": _laughs(6),
    "ten thousand billion values": _laughs(13),
    "thirty million dictionaries": [b"}" * 30_000_000],
    "a number of a million digits": {"epoch": 1 << 3_000_000, "format_version": 1},
    "a number of six hundred digits": {"epoch": b"\x8a\xff" + b"\x7f" * 255, "format_version": 1},
    "a number in a million letters": b"I" + b"9" * 1_000_000 + b"\n",
    "a key of a megabyte": {"k" * 1_000_000: b"N"},
    "a string longer than the file": b"X\xff\xff\xff\x7fabc",
    "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    "a frame longer than memory": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN",
    "a number longer than the file": b"\x8b\xff\xff\xff\x7f\x01",
    "a million tensors": _remembered(tensor(1, [1], [1]), LOOP, 1_000_000),
    "a storage of 4 TB": {"a": tensor(10**12, [10**12], [1])},
    "a storage of 2**62": {"a": tensor(2**62, [2**62], [1])},
    "a storage of 100 MB": {"a": tensor(25_000_000, [25_000_000], [1])},
    "two thousand storages of 4 GB": [storage(10**9, key=str(i)) for i in range(2000)],
    "4 TB from one number": {"a": tensor(1, [10**6, 10**6], [0, 0])},
    "2**64 values": {"a": tensor(1, [2**32, 2**32], [0, 0])},
}
GROUPS["bomb"] = both(BOMBS, stored=bytes(4)) | {
    "compressed": _deflated,
    "400 MB of zeros": lambda _: _deflated_zeros(),
    "overlapping parts": lambda _: _overlapping(),
    "sixty thousand parts": lambda _: archive({"data.pkl": b"N."} | {f"data/{i}": b"" for i in range(60_000)}),
}

# -- declared sizes that do not fit together, and types that are none ------------------------------------------

FOUR = bytes(16)
VECTOR: dict[str, Any] = {"count": 4, "size": [4], "stride": [1]}
PART = ("storage", name("torch", "FloatStorage"), "0", "0", b"K\x04", ("v", 0, 2))  # as torch 0.3 could have it
NEGATED = storage(4), 0, (4,), (1,), b"\x89", b"N", {"neg": b"\x88"}
IN_STORAGE = call(*IN_BYTES, long_bytes(pickled({})))
BUFFERS = {"_buffers": {"a": tensor(**VECTOR)}, "_non_persistent_buffers_set": b"K\x05"}
ARGUMENTS = {  # of the tensor: a vector of all four numbers
    "count": (5, 3, -4),
    "size": ([5], [-4], [2, 2]),
    "stride": ([-1], [2**62]),
    "offset": (1, -1, 2**62),
    "kind": ("DoubleStorage", "NoStorage"),
    "key": ("7", "../data.pkl", "k" * 1_000_000),
}
CROOKED = {
    **{f"{key} {str(v)[:20]}": tensor(**(VECTOR | {key: v})) for key, bad in ARGUMENTS.items() for v in bad},
    "five thousand dimensions": tensor(4, [1] * 5000, [1] * 5000),
    "no storage": call(*REBUILD, b"N", 0, b")", b")", b"\x89", b"N"),
    "a storage of no kind": put(("module", *"aaaa")) + b"Q",
    "a storage that is no tuple": put("storage") + b"Q",
    "a bare storage": storage(4),
    "a part of a storage": put(PART) + b"Q",
    "quantized": call("torch._utils", "_rebuild_qtensor", storage(4), 0, b"N", b"N", b"N", b"\x89", b"N"),
    "a negated tensor": call(*REBUILD, *NEGATED),
    "a tensor of nothing": call("torch", "Tensor", 10**10),
    "a parameter of nothing": call("torch.nn.parameter", "Parameter", b"N"),
    "an array of more than is there": array(long_bytes(b"abc"), (2, 2)),
    "an array of a negative shape": array(long_bytes(b""), (-1, 2)),
    "an array of too many dimensions": array(long_bytes(b"a"), (1,) * 100),
    "an array of no bytes": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", "u1"), b"N"),
    "a storage with no file in it": call(*IN_BYTES, long_bytes(b"abc")),
    "a storage in a storage": call(*IN_BYTES, long_bytes(pickled(IN_STORAGE))),
    "items of a number": b"K\x05K\x06a",
    "pairs of none": call("collections", "OrderedDict", b"](K\x05e"),
    "too few arguments": call(*REBUILD, storage(4)),
    "a module of odd parts": call("a", "B") + put({"_modules": {"a": b"N"}, **BUFFERS}) + b"b",
}
BROKEN = {
    "no end": b"\x80\x02}",
    "no beginning": b".",
    "nothing on the stack": b"\x80\x02R.",
    "no mark": b"\x80\x02u.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "protocol 200": b"\x80\xc8N.",
    "an unknown operation": b"\x80\x02\xfe.",
    "a name that is not UTF-8": b"\x80\x02c\xff\xfe\n\xff\n.",
    "a list as a key": b"\x80\x02}(]K\x01u.",
    "empty": b"",
}
GOOD = {"data.pkl": pickled({"a": tensor(**VECTOR)}), "data/0": FOUR}
GROUPS["crooked"] = both({title: {"a": value} for title, value in CROOKED.items()}, stored=FOUR)
GROUPS["crooked"] |= both(BROKEN, write=bytes)
GROUPS["crooked"]["of another byte order"] = archive(GOOD, order=b"big")

# -- whole files with wrong content, checksums right -------------------------------------------------------------

Change = dict[Any, Any] | Callable[[Any], object]  # new entries, or what is done to a part of the dictionary


def edited(change: Change, *place: Any) -> Make:
    """The good file with a change to the part of its dictionary at `place`."""

    def make(base: Base) -> bytes:
        raw = copy.deepcopy(base.raw)
        part = functools.reduce(operator.getitem, place, raw)
        part.update(change) if isinstance(change, dict) else change(part)
        return checkpoints.serialize(raw)

    return make


def strange(entries: dict[str, tuple], *place: Any) -> dict[str, Make]:
    """Each strange value of each entry of the part at `place`."""
    return {
        f"{key!r} is {str(value)[:20]!r} ({number})": edited({key: value}, *place)
        for key, strange in entries.items()
        for number, value in enumerate(strange)
    }


def _filled(key: str, value: float) -> Change:
    return lambda state: state[key].view(-1)[3:4].fill_(value)


def _cast(key: str, dtype: torch.dtype) -> Change:
    return lambda state: state.update({key: state[key].to(dtype)})


def _renamed(change: Callable[[str], str]) -> Change:
    return lambda state: [state.update({change(key): state.pop(key)}) for key in list(state)]


def _norm(**numbers: float) -> dict[str, Tensor]:
    return {f"bn1.{key}": torch.full((16,), value) for key, value in (numbers | {"running_var": 1.0}).items()}


def _four_bits() -> Tensor:
    """Two numbers a byte; older versions of torch have no such type: there bytes."""
    return torch.zeros(10, dtype=torch.uint8).view(getattr(torch, "float4_e2m1fn_x2", torch.uint8))


STORED = (torch.int64, torch.uint8, torch.bool, torch.complex64)  # dtypes of no weights
FILLED = ("conv1.weight", "layer2.1.conv2.weight", "linear.weight", "linear.bias", "bn1.running_var")
SHARED, THREE, LONG = torch.zeros(100_000), torch.ones(3), "x" * 100_000
CHANGES: dict[str, Change] = {
    **{f"{value} in {key}": _filled(key, value) for key in FILLED for value in (NAN, INFINITY, -INFINITY)},
    **{f"{key} as {dtype}": _cast(key, dtype) for key in ("conv1.weight", "bn1.bias") for dtype in STORED},
    "many views of one memory": {f"extra{i}": SHARED for i in range(400)},
    "a counter as float": _cast("bn1.num_batches_tracked", torch.float32),
    "a counter as vector": {"bn1.num_batches_tracked": torch.zeros(16)},
    "a negative variance": _filled("layer1.0.bn1.running_var", -1e-3),
    "conv1 transposed": {"conv1.weight": torch.zeros(3, 16, 3, 3)},
    "a classifier of 100 classes": {"linear.weight": torch.zeros(100, 64)},
    "a classifier of none": {"linear.weight": torch.zeros(0, 64)},
    "a bias that is a number": {"linear.bias": torch.tensor(0.0)},
    "a key too few": lambda state: state.pop("layer3.2.bn2.weight"),
    "a whole block too few": lambda state: [state.pop(key) for key in list(state) if key.startswith("layer3.2.")],
    "a block too many": {"layer1.3.conv1.weight": torch.zeros(16, 16, 3, 3)},
    "another name": _renamed(lambda key: key.replace("linear.weight", "fc.weight")),
    "a prefix that is none of ours": _renamed(lambda key: f"net.{key}"),
    "a key in two forms": {"module.linear.bias": torch.zeros(10)},
    "a number in place of a tensor": {"linear.bias": 5},
    "a list in place of a tensor": {"linear.bias": [0.0] * 10},
    "a dictionary in place of a tensor": {"linear.bias": {"a": torch.zeros(1)}},
    "a bias in a format to store, not to compute with": {"linear.bias": _four_bits()},
    "a name that is a number": {5: torch.zeros(1)},
    "a name that is a tuple": {("a",): torch.zeros(1)},
    "a name with escapes": {"\x1b[2Jlinear\r\n": torch.zeros(1)},
    "no counters": lambda state: [state.pop(key) for key in list(state) if key.endswith("num_batches_tracked")],
    "no tensors": lambda state: state.clear(),
}
GROUPS["values"] = {title: edited(change, "state_dict") for title, change in CHANGES.items()}
# BatchNorms that are finite, and beyond float32 once multiplied out; to be scored, if that works.
GROUPS["folding"] = {
    "cancels": edited(_norm(weight=1e4, running_mean=1e7, bias=1e11), "state_dict"),
    "overflows in the shift": edited(_norm(weight=1e38, running_mean=1e38, bias=0.0), "state_dict"),
}
METADATA = {
    "format_version": (0, 2, -1, 1.0, True, "1", None, [1], 2**63, THREE, torch.ones(1), NAN),
    "kind": ("", "ternary", None, 5, ["latent"], {"latent": 1}, THREE, LONG, "\x1b[2Jx", "binary", "binary_1bit"),
    "arch": ("resnet32", "resnet21", "", 5, ["resnet20"], THREE, "../../etc/passwd", LONG, "\n\n"),
    "logit_scale": (0, -1.0, 1e300, NAN, INFINITY, "1", None, [1.0], torch.ones(1), 1j),
    "state_dict": (None, 5, [], {}, "abc", {"a": {"b": 1}}, THREE),
    "quantizer": (5, [1], THREE),
}
GROUPS["metadata"] = strange(METADATA) | {
    "a checksum that is empty": lambda b: torch_bytes(b.raw | {"checksum": ""}),
    "a checksum that is a tensor": lambda b: torch_bytes(b.raw | {"checksum": THREE}),
    "no checksum": lambda b: torch_bytes(b.raw),
}

# -- odd, but without harm where nothing is made of it -----------------------------------------------------------


class _Dressed(OrderedDict):
    """Pickles as an OrderedDict with attributes that hide its methods."""

    def __reduce__(self) -> tuple:
        hidden = dict.fromkeys(("items", "keys", "values", "get", "__class__", "_metadata"), 5)
        return OrderedDict, (), hidden, None, iter(dict.items(self))


def _dressed(base: Base) -> bytes:
    raw = torch.load(io.BytesIO(base.content), weights_only=True)
    return torch_bytes(_Dressed({key: _Dressed(v) if isinstance(v, dict) else v for key, v in raw.items()}))


def _fill_all(numbers: dict[str, float]) -> Change:
    """Each number in all tensors whose names end so."""
    return lambda state: [
        tensor.fill_(value) for key, tensor in state.items() for end, value in numbers.items() if key.endswith(end)
    ]


ODD = {
    "metrics": (None, 5, [1], {"test_accuracy": "x"}, {"test_accuracy": [1]}, {"test_accuracy": NAN}, {5: 5}),
    "epoch": (-5, 2**62, "x", None, [1], INFINITY, THREE),
    "config": (None, 5, [1], {"seed": [1]}, {"help": True}, {5: 5}, {"arch": "\x1b[2J"}),
    "versions": (None, 5, {"torch": 5}, "\x1b[2J\x07"),
    "source_sha256": (5, LONG, "\x1b[2J"),
    "\x1b]0;title\x07": (1, "\x1b[2J"),
}
OVERFLOW = {"bn1.weight": 1e38, "bn1.bias": 1e38, "bn2.weight": 1e38, "bn2.bias": 1e38}
GROUPS["odd"] = strange(ODD) | {
    "attributes in the place of methods": _dressed,
    "weights that overflow": edited(_fill_all(OVERFLOW), "state_dict"),
    "a variance of zero": edited(_fill_all({"running_var": 0.0, "running_mean": -3e38}), "state_dict"),
}

# -- 1-bit files: the base is one --------------------------------------------------------------------------------

SIGNS = [torch.zeros(size, dtype=torch.uint8) for size in (33_541, 33_543, (1, 33_542), 0)]
SCALES = [torch.zeros(1385), torch.zeros(1386, 1), torch.full((1386,), NAN), torch.full((1386,), -INFINITY)]
PACKED = {
    "signs": (None, [1, 2], *SIGNS, torch.zeros(33_542, dtype=torch.int8), torch.zeros(33_542)),
    "floats": (None, "x", *SCALES, torch.zeros(1386).double(), torch.zeros(1386).int()),
    "arch": ("resnet32", "resnet110", "resnet8", "", None, 5, ["resnet20"], {"a": 1}, THREE, LONG),
    "batchnorm": ("kept", "none", None, 5, ["folded"], THREE),
    "format_version": (2, "1", None, THREE),
    "kind": ("binary", "latent", None, 5),
    "logit_scale": (0, "1", NAN),
}
GROUPS["packed"] = strange(PACKED) | GROUPS["flipped"]
GROUPS["packed"]["no checksum"] = GROUPS["metadata"]["no checksum"]
GROUPS["packed"]["scales that overflow"] = edited({"floats": torch.full((1386,), 3e38)})

# -- training states: the base is a checkpoint_last.pth in the middle of a run -----------------------------------


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest with its tensors changed, apart from single numbers."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) and value.ndim else value


def _best_weights(change: Callable[[Tensor], Any]) -> Make:
    return edited(lambda best: best.update(_changed(best, change)), "training", "best", "state_dict")


def _moments(change: Callable[[Tensor], Any]) -> Make:
    def every(training: dict[str, Any]) -> None:
        training["optimizers"] = [_changed(each, change) for each in training["optimizers"]]

    return edited(every, "training")


def _states(change: Callable[[dict], dict]) -> Make:
    """The state of the first optimizer changed."""
    return edited(lambda first: first.update(state=change(first["state"])), "training", "optimizers", 0)


def _turned(value: Tensor) -> Tensor:
    """Equal, and in memory the other way round."""
    backwards = list(reversed(range(value.ndim)))
    return value.permute(backwards).contiguous().permute(backwards)


KEYS = ("optimizers", "generators", "processes", "labels", "epoch", "history", "best", "wandb_id", "threads")
STRANGE = (None, "x", -1, [], {}, [None], 2**62, THREE, NAN)
OPTIONS = {
    "epochs": (0, -1, "x", None, 1.5, [1], torch.ones(2)),
    "batch_size": (0, "x", 2**70 % 2**63),
    "arch": ("resnet8", 5, "--help", "resnet56"),
    "lr": (-1.0, "x", NAN),
    "optimizer": ("lion",),
    "help": (True, "x"),
    "no-such-option": (1, True),
    "": (1,),
    "resume": ("other.pth",),
}
HISTORY = {
    "an epoch that is NaN in the history": {"epoch": NAN},
    "another epoch in the history": {"epoch": 7},
    "a huge loss": {"train_loss": 1.7e308},
    "a column that cannot be written": {"x\ud800": 1.0},
    "a column of formulas": {"$\\frac$": 1.0},
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "that are single numbers": lambda value: torch.tensor(0.0),
    "that are none": lambda value: None,
    "of another shape": lambda value: torch.zeros(3, 3),
    "of another type": lambda value: value.double(),
    "that are NaN": lambda value: torch.full_like(value.float(), NAN),
    "that are numbers": lambda value: 5,
    "in one place": lambda value: torch.zeros_like(value[:1]).expand(value.shape),
    "the other way": _turned,
}
GROUPS["state"] = strange(dict.fromkeys(KEYS, STRANGE), "training")
GROUPS["training"] = {
    **strange({"training": STRANGE}),
    **strange(OPTIONS, "config"),
    **{f"no {key}": edited(lambda state, key=key: state.pop(key), "training") for key in KEYS},
    **{title: edited(entries, "training", "history", -1) for title, entries in HISTORY.items()},
    **{f"moments {title}": _moments(change) for title, change in TENSORS.items()},
    **{f"best weights {title}": _best_weights(change) for title, change in TENSORS.items()},
    "best weights with negative variances": _best_weights(lambda value: value - 9),
    "no options": edited({"config": {5: 5}}),
    "no moments but the step": _states(lambda state: {i: {"step": torch.ones(())} for i in state}),
    "moments without a name": _states(lambda state: {i: {} for i in state}),
    "moments of one weight only": _states(lambda state: {0: state[0]}),
    "a step of 0": _states(lambda state: {i: m | {"step": torch.zeros(())} for i, m in state.items()}),
}

# -- data: a test_batch that its SHA256SUMS calls right, by the folder's name ------------------------------------

RECORD = bytes(3073)
NO_NUMBERS = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), (b"K\x00",), "b")
OBJECTS = put((b"K\x01", b"K\x01\x85", call("numpy", "dtype", "O8"), b"\x89", []))
HUGE = put((b"K\x01", (10**9, 3072), call("numpy", "dtype", "u1"), b"\x89", "x"))
BATCHES = {
    "code": CALL,
    "code inside": {"data": call("posix", "system", SHELL)},
    "a dotted name": b"\x80\x04" + put("numpy") + put("os.system") + b"\x93(" + COMMAND + b"tR",
    **{title: CALLS[title] for title in ("an instance", "a registered extension")},
    **{title: BOMBS[title] for title in ("a memo of 2**31", "lists a hundred thousand deep")},
    "a string longer than memory": BOMBS["a string longer than memory"],
    "bytearray of 1 TB": call("builtins", "bytearray", 10**12),
    "a billion values": _laughs(9),
    "no dictionary": 5,
    "no array": {"data": 5, "labels": []},
    "an array of objects": {"data": NO_NUMBERS + OBJECTS + b"b", "labels": []},
    "an array that is huge": {"data": NO_NUMBERS + HUGE + b"b", "labels": []},
    "an array with no content": {"data": NO_NUMBERS, "labels": []},
    "no labels": {"data": NO_NUMBERS},
}
DATA: dict[str, dict[str, bytes]] = {
    "cifar-10-batches-py": {title: pickled(value) for title, value in BATCHES.items()}
    | {"truncated": pickled({"a": 1})[:-5], "text": b"no data\n" * 100},
    "cifar-10-batches-bin": {
        "empty": b"",
        "a record too short": RECORD[:-1],
        "a record too long": RECORD + b"\0",
        "a label of 10": b"\x0a" + RECORD[1:],
        "a label of 255": RECORD + b"\xff" + RECORD[1:],
        "text": b"no data\n" * 1000,
    },
}
