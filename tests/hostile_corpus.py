"""Damaged and malicious files, for every script that reads a `.pth` file or the data.

A `Case` writes one of them. Most are made from a good file that the script at hand would take, so that the damage
is refused and not the kind of file; code in a file would create CANARY in the working directory.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoints

CANARY = "code-was-run"
STORAGE = b"<the end of a storage>"  # replaced by what each format has there
U1 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR"  # the dtype of a byte
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save before 1.6 begins
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Base:
    """A good file: the dictionary, without its checksum, and the bytes of the file."""

    raw: dict[str, Any]
    content: bytes

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Base:
        return cls(raw, checkpoints.serialize(raw))


Make = Callable[[Base], bytes]
Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Case:
    """name, group: for the report. write(path, base) makes the file.

    harmless: the content is odd but does no harm where a script makes nothing of it: it may be taken.
    diverges: only a training that begins with it can tell, and has written its own checkpoint by then.
    """

    group: str
    name: str
    write: Callable[[Path, Base], object]
    harmless: bool = False
    diverges: bool = False

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def corpus() -> list[Case]:
    """All cases, in a fixed order."""
    damage = [*truncated(), *flipped(), *overwritten(), *not_a_file(), *of_another_kind()]
    return [*damage, *code(), *bombs(), *crooked(), *values(), *metadata(), *odd()]


def _table(group: str, contents: dict[str, bytes | Make], **more: bool) -> Iterator[Case]:
    for title, content in contents.items():
        make = content if callable(content) else lambda _, c=content: c
        yield Case(group, title, lambda path, base, m=make: path.write_bytes(m(base)), **more)


def _strange(group: str, entries: dict[str, tuple], make: Callable[[str, Any], Make], **more: bool) -> Iterator[Case]:
    """A case for each strange value of each entry."""
    for key, strange in entries.items():
        for number, value in enumerate(strange):
            yield from _table(group, {f"{key!r} is {str(value)[:20]!r} ({number})": make(key, value)}, **more)


def torch_bytes(value: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


# -- damage ----------------------------------------------------------------------------------------------------


def _change_bytes(change: Callable[[bytes], bytes]) -> Make:
    return lambda base: change(base.content)


def truncated() -> Iterator[Case]:
    ends = [1, 2, 3, 4, 5, 16, 30, 64, 1000, -1, -2, -10, -21, -22, -23, -46, -100, -1000, -4096]
    yield from _table("truncated", {f"at {end}": _change_bytes(lambda c, e=end: c[:e]) for end in ends})
    for part in range(1, 21):
        yield from _table("truncated", {f"to {part}/21": _change_bytes(lambda c, n=part: c[: len(c) * n // 21])})


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


def _flip_anew(base: Base, seed: int) -> bytes:
    """A bit of a tensor flipped and the archive written anew: only the file's own checksum can tell."""
    raw = torch.load(io.BytesIO(base.content), weights_only=True)
    tensors = [v for v in raw.get("state_dict", raw).values() if isinstance(v, Tensor) and v.numel()]
    data = tensors[seed % len(tensors)].reshape(-1).view(torch.uint8)
    data[(seed * 7919) % len(data)] ^= 1 << (seed % 8)
    return torch_bytes(raw)


def flipped(group: str = "flipped") -> Iterator[Case]:
    for seed in range(15):
        yield from _table(group, {f"bit {seed}": _change_bytes(lambda c, n=seed: _flip(c, n))})
        yield from _table(group, {f"bit {seed}, archive written anew": lambda base, n=seed: _flip_anew(base, n)})


def _overwrite(content: bytes, share: float, filler: bytes) -> bytes:
    start = min(int(len(content) * share), len(content) - len(filler))
    return content[:start] + filler + content[start + len(filler) :]


def overwritten() -> Iterator[Case]:
    for name, filler in {"zeros": bytes(4096), "noise": random.Random(1).randbytes(4096)}.items():
        for part in (0, 0.1, 0.5, 0.9, 1):
            change = _change_bytes(lambda c, s=part, f=filler: _overwrite(c, s, f))
            yield from _table("overwritten", {f"{name} at {part}": change})
    changes = {
        "a byte before": lambda c: b"\n" + c,
        "a page before": lambda c: bytes(4096) + c,
        "as text": lambda c: c.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        "as UTF-8": lambda c: c.decode("latin1").encode(),
        "as hexadecimal": lambda c: c.hex().encode(),
        "halves swapped": lambda c: c[2000:] + c[:2000],
    }
    yield from _table("overwritten", {title: _change_bytes(change) for title, change in changes.items()})


# -- no file, or one of another kind ---------------------------------------------------------------------------


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def not_a_file() -> Iterator[Case]:
    writers: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.write_bytes(b""),
        "missing": lambda path: None,
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a pipe": lambda path: os.mkfifo(path),
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "/dev/null": lambda path: path.symlink_to("/dev/null"),
        "/dev/tty": lambda path: path.symlink_to("/dev/tty"),
        "/proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
        "/proc/self/environ": lambda path: path.symlink_to("/proc/self/environ"),
        "a hole of 900 MB": lambda path: _sparse(path, 900_000_000),
        "a hole of 1 TB": lambda path: _sparse(path, 10**12),
    }
    for name, write in writers.items():
        yield Case("not a file", name, lambda path, _, w=write: w(path))


def of_another_kind() -> Iterator[Case]:
    """What looks like a checkpoint at first; files of other kinds altogether are in test_foreign.py."""
    shell, module = pickled(call("os", "system", text(f"touch {CANARY}"))), nn.Sequential(nn.Linear(2, 2))
    contents = {
        "text": b"epoch 1, accuracy 90%\n" * 50,
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros": bytes(10_000),
        "noise": random.Random(2).randbytes(10_000),
        "noise after PK": b"PK\x03\x04" + random.Random(3).randbytes(10_000),
        "noise after a magic number": MAGIC + random.Random(4).randbytes(10_000),
        "a magic number alone": MAGIC,
        "an empty zip": archive({}, folder=""),
        "a zip with no folder": archive({"data.pkl": pickle.dumps({}, 2)}, folder=""),
        "constants beside a pickle": archive({"data.pkl": shell, "constants.pkl": shell}),
        "code beside a pickle": archive({"data.pkl": shell, "code/__torch__.py": b"import os"}),
        "a tar that looks like a pickle": MAGIC.ljust(257, b"\0") + b"ustar" + bytes(250) + shell,
        "a whole module": torch_bytes(module),
        "a whole module, old format": torch_bytes(module, _use_new_zipfile_serialization=False),
        "a plain pickle": pickle.dumps({"linear.bias": [0.0] * 10}),
        "a pickled array": pickle.dumps(np.zeros(3)),
        "a list": torch_bytes([torch.zeros(3)]),
        "a tensor": torch_bytes(torch.zeros(3)),
        "None": torch_bytes(None),
        "a word": torch_bytes("resnet20"),
    }
    yield from _table("another kind", contents)


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


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def tupled(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: list[int]) -> bytes:
    return tupled(*map(whole, values))


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + tupled(*arguments) + b"R"


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + whole(count) + STORAGE


def tensor(count: int, size: list[int], stride: list[int], offset: int = 0, **more: Any) -> bytes:
    hooks = call("collections", "OrderedDict")
    arguments = storage(count, **more), whole(offset), numbers(size), numbers(stride), b"\x89", hooks
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def array(data: bytes, shape: list[int]) -> bytes:
    """An array of bytes of numpy's, as protocol 5 has it."""
    content = b"B" + struct.pack("<I", len(data)) + data
    return call("numpy._core.numeric", "_frombuffer", content, U1, numbers(shape), text("C"))


def stored(data: bytes) -> bytes:
    """A storage in a plain pickle: a file in the file."""
    return call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(data)) + data)


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def both(group: str, written: dict[str, bytes], **parts: bytes) -> Iterator[Case]:
    """Values written by hand, in an archive and in the old format, where a storage has one entry more."""
    more = {f"data/{key[1:]}": data for key, data in parts.items()}
    for title, value in written.items():
        yield from _table(group, {title: lambda _, v=value: archive({"data.pkl": pickled(v), **more})})
        yield from _table(group, {f"{title}, old format": lambda _, v=value: legacy(pickled(v))})


# -- code ------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def code() -> Iterator[Case]:
    shell, python = text(f"touch {CANARY}"), text(f"open({CANARY!r}, 'w')")
    system = name("os", "system")
    calls = {
        "os.system": call("os", "system", shell),
        "eval, as Python 2 names it": call("__builtin__", "eval", python),
        "open": call("_io", "open", text(CANARY), text("w")),
        "import": call("builtins", "__import__", text("antigravity")),
        "numpy": call("numpy.testing._private.utils", "runstring", python, b"}"),
        "torch.load": call("torch.serialization", "load", text("/etc/passwd")),
        "a tensor of a type": call("torch._tensor", "_rebuild_from_type_v2", system, b"N", tupled(shell), b"}"),
        "a dotted name": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93(" + shell + b"tR",
        "an instance": b"(" + shell + b"ios\nsystem\n",
        "an object": b"(" + system + shell + b"o",
        "a new object": system + tupled(shell) + b"\x81",
        "a state of a function": name("torch._utils", "_rebuild_tensor") + dictionary(__code__=shell) + b"b",
        "a state of a class": name("torch.nn", "Linear") + dictionary(forward=system) + b"b",
        "a state of a dictionary": call("collections", "OrderedDict") + dictionary(items=system) + b"b",
        "a call that is dropped": call("os", "system", shell) + b"0N",
        "a call of a call": call("builtins", "getattr", name("os", "path"), text("os")) + tupled(shell) + b"R",
        "a storage": b"(" + text("module") + call("os", "system", shell) + text("a") + text("b") + STORAGE,
        "a registered extension": b"\x82\x01(" + shell + b"tR",
        "a registered extension of two bytes": b"\x83\x01\x00(" + shell + b"tR",
        "a registered extension of four bytes": b"\x84\x01\x00\x00\x00(" + shell + b"tR",
    }
    yield from both("code", calls)
    harm, parts = Call(os.system, f"touch {CANARY}"), {"data.pkl": pickle.dumps({}, 2)}
    for place in ("arch", "metrics", "state_dict", "epoch", "config"):
        changes = {place: harm, "checksum": "0" * 64}
        yield from _table("code", {f"as {place} of a checkpoint": lambda b, c=changes: torch_bytes(b.raw | c)})
    for protocol in range(6):
        contents = {
            f"protocol {protocol}": torch_bytes({"a": harm}, pickle_protocol=protocol),
            f"protocol {protocol}, a bare pickle": pickle.dumps(harm, protocol),
        }
        yield from _table("code", contents)
    twice = archive(parts | {"dATA.pkl": pickled(calls["os.system"])})
    names = {"in a part of another case": twice, "in a second part of that name": twice.replace(b"dATA", b"data")}
    yield from _table("code", names)
    for title, form in {"new": True, "old": False}.items():

        def beside(base: Base, form: bool = form) -> bytes:
            return torch_bytes({"w": base.raw["state_dict"], "x": harm}, _use_new_zipfile_serialization=form)

        yield from _table("code", {f"beside good weights, {title} format": beside}, harmless=True)


# -- bombs -----------------------------------------------------------------------------------------------------


def _remembered(value: bytes, use: bytes, times: int) -> bytes:
    """`value` kept in the memo, then `use` so many times, all in one list."""
    return listed(value + b"q\x00", use * times)


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
    tail, entries = bytes(kernel), []
    for number in range(count):
        name = b"archive/data.pkl" if number == 0 else f"archive/data/{count - number:04}".encode()
        about = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(tail), len(tail), len(tail), len(name), 0)
        entries.append((about, name, len(tail)))
        tail = b"PK\x03\x04" + about + name + tail
    directory = b"".join(
        b"PK\x01\x02\x14\x00" + about + struct.pack("<HHHII", 0, 0, 0, 0, len(tail) - size - 30 - len(name)) + name
        for about, name, size in reversed(entries)
    )
    return tail + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), len(tail), 0)


def _deflated(base: Base) -> bytes:
    with zipfile.ZipFile(io.BytesIO(base.content)) as old:
        parts = {
            info.filename.split("/", 1)[1]: old.read(info) for info in old.infolist() if "/data" in info.filename
        }
    return archive(parts, compression=zipfile.ZIP_DEFLATED)


def bombs() -> Iterator[Case]:
    million, pairs = text("x" * 1_000_000), listed(b"K\x01K\x02\x86" * 20_000)
    thing, loop, many = call("a", "B"), b"h\x00", tupled(b"N" * 400_000)
    file = b"B" + struct.pack("<I", 10**6) + b"\x80\x02N.".ljust(10**6)
    from_buffer = name("numpy.core.numeric", "_frombuffer") + tupled(loop, U1, numbers([10**6]), text("C")) + b"R"
    of_a_doubled_type = b"(" + text("storage") + _doubled(b")", 40) + text("0") + text("cpu") + b"K\x01" + STORAGE
    sizes = {
        "bytearray of 10 GB": call("__builtin__", "bytearray", whole(10**10)),
        "bytes copied": _remembered(million, name("_codecs", "encode") + tupled(loop, text("latin1")) + b"R", 20_000),
        "sets copied": _remembered(listed(*map(whole, range(50_000))), b"c__builtin__\nset\nh\x00\x85R", 20_000),
        "dictionaries copied": _remembered(pairs, b"ccollections\nOrderedDict\nh\x00\x85R", 20_000),
        "arrays copied": _remembered(million, from_buffer, 20_000),
        "files in the file copied": _remembered(file, b"ctorch.storage\n_load_from_bytes\nh\x00\x85R", 20_000),
        "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
        "a memo of 10**9, in words": b"Np1000000000\n",
        "lists a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999,
        "tuples a hundred thousand deep": b")" + b"\x85" * 100_000,
        "dictionaries deep": (b"}" + text("a")) * 60_000 + b"N" + b"s" * 60_000,
        "lists fifty deep": b"]" * 60 + b"a" * 59,
        "a key that doubles": b"}" + _doubled(b")", 40) + b"Ns",
        "a member of a set that doubles": b"\x8f(" + _doubled(b")", 40) + b"\x90",
        "a tuple 400,000 deep as a key": b"}" + b")" + b"\x85" * 400_000 + b"Ns",
        "a value that doubles": _doubled(b")", 40),
        "the state of an object that doubles": thing + _doubled(b")", 40) + b"b",
        "objects that double": _doubled(b"N", 60, name("a", "B")),
        "objects in each other": thing + b"q\x00" + dictionary(me=loop) + b"b",
        "objects a hundred thousand deep": name("a", "B") + b"q\x00" + loop * 99_999 + b"N" + b"\x85R" * 100_000,
        "a storage of a type that doubles": of_a_doubled_type,
        "storages of many entries": _remembered(many, b"h\x00Q", 100_000),
        "names of a megabyte": _remembered(million, b"h\x00h\x00\x93", 200_000),
        "a text many times": dictionary(format_version=b"K\x01", a=_remembered(million, loop, 400_000)),
        "keys of a megabyte": _remembered(million, b"}h\x00Ns", 150_000),
        "calls with many arguments": _remembered(many, b"ccollections\nOrderedDict\nh\x00R", 100_000),
        "modules in each other": thing + b"q\x00" + dictionary(_modules=dictionary(a=loop, b=loop)) + b"b",
        "keys that collide": b"}(" + b"".join(whole(i << 32) + b"N" for i in range(30_000)) + b"u",
        "a list that holds itself": b"]q\x00h\x00a",
        "a dictionary that holds itself": b"}q\x00" + text("state_dict") + b"h\x00s",
        "a million values": _laughs(6),
        "ten thousand billion values": _laughs(13),
        "thirty million dictionaries": listed(b"}" * 30_000_000),
        "a number of a million digits": dictionary(epoch=whole(1 << 3_000_000), format_version=whole(1)),
        "a number of six hundred digits": dictionary(epoch=b"\x8a\xff" + b"\x7f" * 255, format_version=whole(1)),
        "a number in a million letters": b"I" + b"9" * 1_000_000 + b"\n",
        "a key of a megabyte": dictionary(**{"k" * 1_000_000: b"N"}),
        "a string longer than the file": b"X\xff\xff\xff\x7fabc",
        "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        "a frame longer than memory": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN",
        "a number longer than the file": b"\x8b\xff\xff\xff\x7f\x01",
        "a million tensors": _remembered(tensor(1, [1], [1]), loop, 1_000_000),
        "a storage of 4 TB": dictionary(a=tensor(10**12, [10**12], [1])),
        "a storage of 2**62": dictionary(a=tensor(2**62, [2**62], [1])),
        "a storage of 100 MB": dictionary(a=tensor(25_000_000, [25_000_000], [1])),
        "two thousand storages of 4 GB": listed(*(storage(10**9, key=str(i)) for i in range(2000))),
        "4 TB from one number": dictionary(a=tensor(1, [10**6, 10**6], [0, 0])),
        "2**64 values": dictionary(a=tensor(1, [2**32, 2**32], [0, 0])),
    }
    yield from both("bomb", sizes, _0=bytes(4))
    zeros = {"data.pkl": pickled(dictionary(a=tensor(10**8, [10**8], [1]))), "data/0": bytes(4 * 10**8)}
    archives: dict[str, Make] = {
        "compressed": _deflated,
        "400 MB of zeros": lambda _: archive(zeros, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
        "overlapping parts": lambda _: _overlapping(),
        "sixty thousand parts": lambda _: archive({"data.pkl": b"N."} | {f"data/{i}": b"" for i in range(60_000)}),
    }
    yield from _table("bomb", archives)


# -- tensors that are not what they say --------------------------------------------------------------------------


def crooked() -> Iterator[Case]:
    """Declared sizes that do not fit together, and types that are none."""
    four, rebuild = bytes(16), ("torch._utils", "_rebuild_tensor_v2")
    view = tupled(text("v"), whole(0), whole(2))  # as torch 0.3 could have it
    part = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") * 2 + b"K\x04" + view + b"tQ"
    negated = storage(4), whole(0), numbers([4]), numbers([1]), b"\x89", b"N", dictionary(neg=b"\x88")
    buffers = {"_buffers": dictionary(a=tensor(4, [4], [1])), "_non_persistent_buffers_set": b"K\x05"}
    shapes = {
        "more values than stored": tensor(4, [5], [1]),
        "a larger storage than stored": tensor(5, [5], [1]),
        "a smaller storage than stored": tensor(3, [3], [1]),
        "another type than stored": tensor(4, [4], [1], kind="DoubleStorage"),
        "an offset beyond the end": tensor(4, [4], [1], offset=1),
        "an offset before the beginning": tensor(4, [4], [1], offset=-1),
        "a huge offset": tensor(4, [1], [1], offset=2**62),
        "a negative size": tensor(4, [-4], [1]),
        "a negative stride": tensor(4, [4], [-1]),
        "a huge stride": tensor(4, [2], [2**62]),
        "a negative storage": tensor(-4, [4], [1]),
        "strides of another number": tensor(4, [2, 2], [1]),
        "five thousand dimensions": tensor(4, [1] * 5000, [1] * 5000),
        "no storage": call(*rebuild, b"N", whole(0), b")", b")", b"\x89", b"N"),
        "a storage of no type": call(*rebuild, storage(4, kind="NoStorage"), whole(0), b")", b")", b"\x89", b"N"),
        "a part that is not there": tensor(4, [4], [1], key="7"),
        "a part with a path": tensor(4, [4], [1], key="../data.pkl"),
        "a key of a megabyte": tensor(4, [4], [1], key="k" * 1_000_000),
        "a storage of no kind": b"(" + text("module") + text("a") * 4 + b"tQ",
        "a storage that is no tuple": text("storage") + b"Q",
        "a bare storage": storage(4),
        "a part of a storage": part,
        "quantized": call("torch._utils", "_rebuild_qtensor", storage(4), whole(0), b"N", b"N", b"N", b"\x89", b"N"),
        "a negated tensor": call(*rebuild, *negated),
        "a tensor of nothing": call("torch", "Tensor", whole(10**10)),
        "a parameter of nothing": call("torch.nn.parameter", "Parameter", b"N"),
        "an array of more than is there": array(b"abc", [2, 2]),
        "an array of a negative shape": array(b"", [-1, 2]),
        "an array of too many dimensions": array(b"a", [1] * 100),
        "an array of no bytes": call("numpy.core.multiarray", "scalar", U1, b"N"),
        "a storage with no file in it": stored(b"abc"),
        "a storage in a storage": stored(pickled(stored(b"\x80\x02}."))),
        "items of a number": b"K\x05K\x06a",
        "pairs of none": call("collections", "OrderedDict", b"](K\x05e"),
        "too few arguments": call(*rebuild, storage(4)),
        "a module of odd parts": call("a", "B") + dictionary(_modules=dictionary(a=b"N"), **buffers) + b"b",
    }
    yield from both("crooked", {title: dictionary(a=value) for title, value in shapes.items()}, _0=four)
    good = {"data.pkl": pickled(dictionary(a=tensor(4, [4], [1]))), "data/0": four}
    yield from _table("crooked", {"of another byte order": archive(good, order=b"big")})
    for title, value in {
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
    }.items():
        yield from _table("crooked", {title: archive({"data.pkl": value}), f"{title}, old format": legacy(value)})


# -- whole files with wrong content, checksums right -------------------------------------------------------------


def _edited(change: Callable[[dict[str, Any]], object]) -> Make:
    """The good file with what `change` does to its dictionary."""

    def make(base: Base) -> bytes:
        raw = copy.deepcopy(base.raw)
        change(raw)
        return checkpoints.serialize(raw)

    return make


def _with(key: str, value: Any) -> Make:
    return _edited(lambda raw: raw.update({key: value}))


def _state(change: Change) -> Make:
    """The network's tensors changed."""
    return _edited(lambda raw: change(raw["state_dict"]))


def _set(**entries: Any) -> Change:
    """Entries by their names, where __ stands for a point."""
    return lambda state: state.update({key.replace("__", "."): value for key, value in entries.items()})


def _fill(key: str, value: float) -> Change:
    return lambda state: state[key].view(-1)[3:4].fill_(value)


def _cast(key: str, dtype: torch.dtype) -> Change:
    return lambda state: state.update({key: state[key].to(dtype)})


def _four_bits() -> Tensor:
    """Two numbers a byte; older versions of torch have no such type: there bytes."""
    return torch.zeros(10, dtype=torch.uint8).view(getattr(torch, "float4_e2m1fn_x2", torch.uint8))


def _rename_all(change: Callable[[str], str]) -> Change:
    return lambda state: [state.update({change(key): state.pop(key)}) for key in list(state)]


def values() -> Iterator[Case]:
    changes: dict[str, Change] = {}
    for key in ("conv1.weight", "layer2.1.conv2.weight", "linear.weight", "linear.bias", "bn1.running_var"):
        changes |= {f"{value} in {key}": _fill(key, value) for value in (NAN, INFINITY, -INFINITY)}
    for key in ("conv1.weight", "bn1.bias"):
        types = (torch.int64, torch.uint8, torch.bool, torch.complex64)
        changes |= {f"{key} as {dtype}": _cast(key, dtype) for dtype in types}
    shared = torch.zeros(100_000)
    changes |= {
        "many views of one memory": _set(**{f"extra{i}": shared for i in range(400)}),
        "a counter as float": _cast("bn1.num_batches_tracked", torch.float32),
        "a counter as vector": _set(bn1__num_batches_tracked=torch.zeros(16)),
        "a negative variance": _fill("layer1.0.bn1.running_var", -1e-3),
        "conv1 transposed": _set(conv1__weight=torch.zeros(3, 16, 3, 3)),
        "a classifier of 100 classes": _set(linear__weight=torch.zeros(100, 64)),
        "a classifier of none": _set(linear__weight=torch.zeros(0, 64)),
        "a bias that is a number": _set(linear__bias=torch.tensor(0.0)),
        "a key too few": lambda state: state.pop("layer3.2.bn2.weight"),
        "a whole block too few": lambda state: [state.pop(key) for key in list(state) if key.startswith("layer3.2.")],
        "a block too many": _set(layer1__3__conv1__weight=torch.zeros(16, 16, 3, 3)),
        "another name": _rename_all(lambda key: key.replace("linear.weight", "fc.weight")),
        "a prefix that is none of ours": _rename_all(lambda key: f"net.{key}"),
        "a key in two forms": _set(module__linear__bias=torch.zeros(10)),
        "a number in place of a tensor": _set(linear__bias=5),
        "a list in place of a tensor": _set(linear__bias=[0.0] * 10),
        "a dictionary in place of a tensor": _set(linear__bias={"a": torch.zeros(1)}),
        "a bias in a format to store, not to compute with": _set(linear__bias=_four_bits()),
        "a name that is a number": lambda state: state.update({5: torch.zeros(1)}),
        "a name that is a tuple": lambda state: state.update({("a",): torch.zeros(1)}),
        "a name with escapes": lambda state: state.update({"\x1b[2Jlinear\r\n": torch.zeros(1)}),
        "no tensors": lambda state: state.clear(),
    }
    yield from _table("values", {title: _state(change) for title, change in changes.items()})

    # BatchNorms that are finite, and beyond float32 once they are multiplied out; to be scored, if that works.
    for title, weight, mean, bias in (("cancels", 1e4, 1e7, 1e11), ("overflows in the shift", 1e38, 1e38, 0.0)):
        numbers = {"weight": weight, "running_mean": mean, "bias": bias, "running_var": 1.0}
        change = _set(**{f"bn1__{key}": torch.full((16,), value) for key, value in numbers.items()})
        diverges = "overflows" in title  # as a teacher it is folded too
        yield from _table("folding", {title: _state(change)}, harmless=True, diverges=diverges)


def metadata() -> Iterator[Case]:
    one, three, long = torch.ones(1), torch.ones(3), "x" * 100_000
    wrong = {
        "format_version": (0, 2, -1, 1.0, True, "1", None, [1], 2**63, three, one, NAN),
        "kind": ("", "ternary", None, 5, ["latent"], {"latent": 1}, three, long, "\x1b[31mlatent", "binary_1bit"),
        "arch": ("resnet32", "resnet21", "", 5, ["resnet20"], three, "../../etc/passwd", long, "\n\n"),
        "logit_scale": (0, -1.0, 1e300, NAN, INFINITY, "1", None, [1.0], one, 1j),
        "state_dict": (None, 5, [], {}, "abc", {"a": {"b": 1}}, three),
        "quantizer": (5, [1], three),
    }
    yield from _strange("metadata", wrong, _with)
    for value in ("", three):
        title = f"a checksum that is {str(value)[:20]}"
        yield from _table("metadata", {title: lambda b, v=value: torch_bytes(b.raw | {"checksum": v})})
    yield from _table("metadata", {"no checksum": lambda base: torch_bytes(base.raw)})


# -- odd, but without harm where nothing is made of it -----------------------------------------------------------


class _Dressed(OrderedDict):
    """Pickles as an OrderedDict with attributes that hide its methods."""

    def __reduce__(self) -> tuple:
        hidden = dict.fromkeys(("items", "keys", "values", "get", "__class__", "_metadata"), 5)
        return OrderedDict, (), hidden, None, iter(dict.items(self))


def odd() -> Iterator[Case]:
    strange = {
        "metrics": (None, 5, [1], {"test_accuracy": "x"}, {"test_accuracy": [1]}, {"test_accuracy": NAN}, {5: 5}),
        "epoch": (-5, 2**62, "x", None, [1], INFINITY, torch.ones(3)),
        "config": (None, 5, [1], {"seed": [1]}, {"help": True}, {5: 5}, {"arch": "\x1b[2J"}),
        "versions": (None, 5, {"torch": 5}, "\x1b[2J\x07"),
        "source_sha256": (5, "x" * 100_000, "\x1b[2J"),
        "\x1b]0;title\x07": (1, "\x1b[2J"),
    }
    yield from _strange("odd", strange, _with, harmless=True)

    def dressed(base: Base) -> bytes:
        raw = torch.load(io.BytesIO(base.content), weights_only=True)
        return torch_bytes(_Dressed({key: _Dressed(v) if isinstance(v, dict) else v for key, v in raw.items()}))

    yield from _table("odd", {"attributes in the place of methods": dressed}, harmless=True)
    extreme = {
        "weights that overflow": {"bn1.weight": 1e38, "bn1.bias": 1e38, "bn2.weight": 1e38, "bn2.bias": 1e38},
        "a variance of zero": {"running_var": 0.0, "running_mean": -3e38},
    }
    for title, numbers in extreme.items():

        def change(state: dict[str, Tensor], numbers: dict[str, float] = numbers) -> None:
            for key, tensor in state.items():
                for end, value in numbers.items():
                    if key.endswith(end):
                        tensor.fill_(value)

        yield from _table("odd", {title: _state(change)}, harmless=True, diverges=True)


# -- 1-bit files -------------------------------------------------------------------------------------------------


def packed() -> Iterator[Case]:
    """For the scripts that take `best_model_binary_1bit.pth`; base is one."""
    byte, two = torch.uint8, torch.ones(2)
    signs = [torch.zeros(size, dtype=byte) for size in (33_541, 33_543, (1, 33_542), 0)]
    floats = [torch.zeros(1385), torch.zeros(1386, 1), torch.full((1386,), NAN), torch.full((1386,), -INFINITY)]
    wrong = {
        "signs": (None, [1, 2], *signs, torch.zeros(33_542, dtype=torch.int8), torch.zeros(33_542)),
        "floats": (None, "x", *floats, torch.zeros(1386).double(), torch.zeros(1386).int()),
        "arch": ("resnet32", "resnet110", "resnet8", "", None, 5, ["resnet20"], {"a": 1}, two, "z" * 100_000),
        "batchnorm": ("kept", "none", None, 5, ["folded"], two),
        "format_version": (2, "1", None, two),
        "kind": ("binary", "latent", None, 5),
        "logit_scale": (0, "1", NAN),
    }
    yield from _strange("packed", wrong, _with)
    yield from flipped("packed")
    yield from _table("packed", {"no checksum": lambda base: torch_bytes(base.raw)})
    yield from _table("packed", {"scales that overflow": _with("floats", torch.full((1386,), 3e38))}, harmless=True)


# -- training states ---------------------------------------------------------------------------------------------


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest with its tensors changed, apart from single numbers."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) and value.ndim else value


def _training(change: Change) -> Make:
    return _edited(lambda raw: change(raw["training"]))


def _best_weights(change: Callable[[Tensor], Any]) -> Make:
    return _training(
        lambda state: state["best"].update(_changed({"state_dict": state["best"]["state_dict"]}, change))
    )


def _tensors(title: str, change: Callable[[Tensor], Any]) -> dict[str, Make]:
    def moments(state: dict[str, Any]) -> None:
        state["optimizers"] = [_changed(each, change) for each in state["optimizers"]]

    return {f"moments {title}": _training(moments), f"best weights {title}": _best_weights(change)}


def _moments(change: Callable[[dict], dict]) -> Make:
    """The state of the first optimizer changed."""
    return _training(lambda state: state["optimizers"][0].update(state=change(state["optimizers"][0]["state"])))


def _history(change: dict[str, float]) -> Make:
    return _training(lambda state: state["history"][-1].update(change))


def _turned(value: Tensor) -> Tensor:
    """Equal, and in memory the other way round."""
    backwards = list(reversed(range(value.ndim)))
    return value.permute(backwards).contiguous().permute(backwards)


def training() -> Iterator[Case]:
    """For --resume; base is a checkpoint_last.pth in the middle of a run."""
    strange = (None, "x", -1, [], {}, [None], 2**62, torch.ones(3), NAN)
    keys = ("optimizers", "generators", "processes", "labels", "epoch", "history", "best", "wandb_id", "threads")
    right = {("wandb_id", 1), ("threads", 2), ("threads", 6)}  # any name, and any number

    for key in keys:
        for number, value in enumerate(strange):
            make = _training(lambda state, k=key, v=value: state.update({k: v}))
            title = f"{key} is {str(value)[:20]!r} ({number})"
            yield from _table("state", {title: make}, harmless=(key, number) in right)
        yield from _table("training", {f"no {key}": _training(lambda state, k=key: state.pop(k))})
    yield from _strange("training", {"training": strange}, _with)
    options = {
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

    def option(key: str, value: Any) -> Make:
        return _edited(lambda raw: raw["config"].update({key: value}))

    yield from _strange("training", options, option)
    for title, change in {
        "that are single numbers": lambda value: torch.tensor(0.0),
        "that are none": lambda value: None,
        "of another shape": lambda value: torch.zeros(3, 3),
        "of another type": lambda value: value.double(),
        "that are NaN": lambda value: torch.full_like(value.float(), NAN),
        "that are numbers": lambda value: 5,
    }.items():
        yield from _table("training", _tensors(title, change))
    expanded = _tensors("in one place", lambda value: torch.zeros_like(value[:1]).expand(value.shape))
    yield from _table("training", expanded | _tensors("the other way", _turned), harmless=True)
    contents = {
        "no options": _with("config", {5: 5}),
        "no moments but the step": _moments(lambda state: {i: {"step": torch.ones(())} for i in state}),
        "moments without a name": _moments(lambda state: {i: {} for i in state}),
        "moments of one weight only": _moments(lambda state: {0: state[0]}),
        "a step of 0": _moments(lambda state: {i: m | {"step": torch.zeros(())} for i, m in state.items()}),
        "an epoch that is NaN in the history": _history({"epoch": NAN}),
        "another epoch in the history": _history({"epoch": 7}),
        "a huge loss": _history({"train_loss": 1.7e308}),
        "a column that cannot be written": _history({"x\ud800": 1.0}),
        "a column of formulas": _history({"$\\frac$": 1.0}),
        "best weights with negative variances": _best_weights(lambda value: value - 9),
    }
    yield from _table("training", contents)


# -- data ----------------------------------------------------------------------------------------------------------


def data_files() -> Iterator[tuple[str, str, bytes]]:
    """(description, "binary" or "python", content) of a test_batch that its SHA256SUMS calls right."""
    record = bytes(3073)
    binary = {
        "empty": b"",
        "a record too short": record[:-1],
        "a record too long": record + b"\0",
        "a label of 10": b"\x0a" + record[1:],
        "a label of 255": record + b"\xff" + record[1:],
        "text": b"no data\n" * 1000,
    }
    yield from ((f"binary {title}", "binary", content) for title, content in binary.items())
    shell = text(f"touch {CANARY}")
    array = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), tupled(b"K\x00"), text("b"))
    objects = tupled(b"K\x01", b"K\x01\x85", call("numpy", "dtype", text("O8")), b"\x89", b"]")
    huge = tupled(b"K\x01", numbers([10**9, 3072]), call("numpy", "dtype", text("u1")), b"\x89", text("x"))
    pickles = {
        "code": call("os", "system", shell),
        "code inside": dictionary(data=call("posix", "system", shell)),
        "a dotted name": b"\x80\x04" + text("numpy") + text("os.system") + b"\x93(" + shell + b"tR",
        "an instance": b"(" + shell + b"ios\nsystem\n",
        "a registered extension": b"\x82\x01(" + shell + b"tR",
        "bytearray of 1 TB": call("builtins", "bytearray", whole(10**12)),
        "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
        "a billion values": _laughs(9),
        "lists a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999,
        "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        "no dictionary": b"K\x05",
        "no array": dictionary(data=b"K\x05", labels=b"]"),
        "an array of objects": dictionary(data=array + objects + b"b", labels=b"]"),
        "an array that is huge": dictionary(data=array + huge + b"b", labels=b"]"),
        "an array with no content": dictionary(data=array, labels=b"]"),
        "no labels": dictionary(data=array),
    }
    yield from ((f"python {title}", "python", pickled(value)) for title, value in pickles.items())
    yield "python truncated", "python", pickled(dictionary(a=b"K\x01"))[:-5]
    yield "python text", "python", b"no data\n" * 100
