"""Damaged and malicious files, for every script that reads a `.pth` file or the data.

A `Case` writes one of them. Most are made from a good file that the script at hand would take, so that the damage
is refused and not the kind of file; code in a file would create CANARY in the working directory.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import socket
import struct
import tarfile
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


@dataclass(frozen=True)
class Base:
    """A good file: the dictionary, without its checksum, and the bytes of the file."""

    raw: dict[str, Any]
    content: bytes

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Base:
        return cls(raw, checkpoints.serialize(raw))


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


def torch_bytes(value: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def corpus() -> list[Case]:
    """All cases, at least 300, in a fixed order."""
    groups = (
        truncated,
        flipped,
        overwritten,
        not_a_file,
        of_another_kind,
        code,
        bombs,
        crooked,
        values,
        metadata,
        odd,
        folding,
    )
    return [case for group in groups for case in group()]


def _bytes(group: str, name: str, change: Callable[[Base], bytes], **more: Any) -> Case:
    return Case(group, name, lambda path, base: path.write_bytes(change(base)), **more)


# -- damage ----------------------------------------------------------------------------------------------------


def truncated() -> Iterator[Case]:
    for length in (1, 2, 3, 4, 5, 16, 29, 30, 31, 64, 100, 1000):
        yield _bytes("truncated", f"to {length} bytes", lambda base, n=length: base.content[:n])
    for missing in (1, 2, 10, 21, 22, 23, 46, 100, 1000, 4096):
        yield _bytes("truncated", f"by {missing} bytes", lambda base, n=missing: base.content[:-n])
    for part in range(1, 31):
        yield _bytes("truncated", f"to {part}/31", lambda base, n=part: base.content[: len(base.content) * n // 31])


def _payload(content: bytes) -> list[range]:
    """Where in an archive the contents of its parts lie, apart from those that torch does not read."""
    places = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack(
                "<HH", content[info.header_offset + 26 : info.header_offset + 30]
            )
            start = info.header_offset + 30 + name_length + extra_length
            if info.filename.split("/", 1)[1].startswith("data"):
                places.append(range(start, start + info.file_size))
    return [place for place in places if place]


def _flip(content: bytes, seed: int) -> bytes:
    draw = random.Random(seed)
    parts = _payload(content)
    part = parts[0] if seed % 3 == 0 else draw.choice(parts)
    damaged = bytearray(content)
    damaged[draw.choice(part)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _flip_anew(base: Base, seed: int) -> bytes:
    """A bit of a tensor flipped and the archive written anew: only the file's own checksum can tell."""
    raw = torch.load(io.BytesIO(base.content), weights_only=True)
    holder = raw.get("state_dict", raw)
    tensors = [v for v in holder.values() if isinstance(v, Tensor) and v.numel()]
    data = tensors[seed % len(tensors)].reshape(-1).view(torch.uint8)
    data[(seed * 7919) % len(data)] ^= 1 << (seed % 8)
    return torch_bytes(raw)


def flipped() -> Iterator[Case]:
    for seed in range(40):
        yield _bytes("flipped", f"bit {seed}", lambda base, n=seed: _flip(base.content, n))
    for seed in range(20):
        yield _bytes("flipped", f"bit {seed}, archive written anew", lambda base, n=seed: _flip_anew(base, n))


def _overwrite(content: bytes, share: float, filler: bytes) -> bytes:
    start = min(int(len(content) * share), len(content) - len(filler))
    return content[:start] + filler + content[start + len(filler) :]


def overwritten() -> Iterator[Case]:
    noise = random.Random(1).randbytes(4096)
    for name, filler in (("zeros", bytes(4096)), ("ones", b"\xff" * 4096), ("noise", noise)):
        for part in (0, 0.1, 0.5, 0.9, 1):
            yield _bytes(
                "overwritten", f"{name} at {part}", lambda base, s=part, f=filler: _overwrite(base.content, s, f)
            )
    yield _bytes("overwritten", "a byte before", lambda base: b"\n" + base.content)
    yield _bytes("overwritten", "a page before", lambda base: bytes(4096) + base.content)
    yield _bytes("overwritten", "as text", lambda base: base.content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    yield _bytes("overwritten", "as UTF-8", lambda base: base.content.decode("latin1").encode())
    yield _bytes("overwritten", "as hexadecimal", lambda base: base.content.hex().encode())
    yield _bytes("overwritten", "halves swapped", lambda base: base.content[2000:] + base.content[:2000])


# -- no file, or one of another kind ---------------------------------------------------------------------------


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def _socket(path: Path, _base: Base) -> None:
    held = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # the address has room for a short name only
    try:
        held.bind(path.name)
    finally:
        os.chdir(here)
        held.close()


def not_a_file() -> Iterator[Case]:
    def of(name: str, write: Callable[[Path, Base], object]) -> Case:
        return Case("not a file", name, write)

    yield of("empty", lambda path, _: path.write_bytes(b""))
    yield of("missing", lambda path, _: None)
    yield of("a folder", lambda path, _: path.mkdir())
    yield of("a link to itself", lambda path, _: path.symlink_to(path.name))
    yield of("a link to nothing", lambda path, _: path.symlink_to("nothing"))
    yield of("a link to its folder", lambda path, _: path.symlink_to("."))
    yield of("a pipe", lambda path, _: os.mkfifo(path))
    yield of("a socket", _socket)
    for device in ("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/dev/tty"):
        yield of(device, lambda path, _, d=device: path.symlink_to(d))
    for place in ("/proc/self/mem", "/proc/self/environ", "/proc/kmsg"):
        yield of(place, lambda path, _, p=place: path.symlink_to(p))
    yield of("a hole of 900 MB", lambda path, _: _sparse(path, 900_000_000))
    yield of("a hole of 1 TB", lambda path, _: _sparse(path, 10**12))


def _module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def _scripted() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(_module(), torch.zeros(1, 2)), content)
    return content.getvalue()


def _tar(names: dict[bytes, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in names.items():
            info = tarfile.TarInfo(name.decode("latin1"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def of_another_kind() -> Iterator[Case]:
    """What looks like a checkpoint at first; files of other kinds altogether are in test_foreign.py."""
    shell = pickled(call("os", "system", text(f"touch {CANARY}")))
    contents: dict[str, Callable[[], bytes]] = {
        "text": lambda: b"epoch 1, accuracy 90%\n" * 50,
        "HTML": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros": lambda: bytes(10_000),
        "ones": lambda: b"\xff" * 10_000,
        "noise": lambda: random.Random(2).randbytes(10_000),
        "noise after PK": lambda: b"PK\x03\x04" + random.Random(3).randbytes(10_000),
        "noise after a magic number": lambda: MAGIC + random.Random(4).randbytes(10_000),
        "a magic number alone": lambda: MAGIC,
        "an empty zip": lambda: archive({}, version=False),
        "a zip of text": lambda: archive({"readme.txt": b"hello"}, version=False),
        "a zip with no folder": lambda: archive({"data.pkl": pickle.dumps({}, 2)}, folder=""),
        "TorchScript": _scripted,
        "constants beside a pickle": lambda: archive({"data.pkl": shell, "constants.pkl": shell}),
        "code beside a pickle": lambda: archive({"data.pkl": shell, "code/__torch__.py": b"import os"}),
        "a whole module": lambda: torch_bytes(_module()),
        "a whole module, old format": lambda: torch_bytes(_module(), _use_new_zipfile_serialization=False),
        "a plain pickle": lambda: pickle.dumps({"linear.bias": [0.0] * 10}),
        "a pickled array": lambda: pickle.dumps(np.zeros(3)),
        "a tar": lambda: _tar({b"storages": b"\x80\x02K\x00.", b"tensors": b"\x80\x02K\x00.", b"pickle": shell}),
        "a tar that looks like a pickle": lambda: _tar(
            {MAGIC: b"", b"storages": b"\x80\x02K\x00.", b"pickle": shell}
        ),
        "an empty tar": lambda: _tar({}),
        "a list": lambda: torch_bytes([torch.zeros(3)]),
        "a tensor": lambda: torch_bytes(torch.zeros(3)),
        "None": lambda: torch_bytes(None),
        "a word": lambda: torch_bytes("resnet20"),
    }
    for title, make in contents.items():
        yield _bytes("another kind", title, lambda _, m=make: m())


# -- pickles written by hand -----------------------------------------------------------------------------------


def archive(
    parts: dict[str, bytes],
    *,
    folder: str = "archive/",
    version: bool = True,
    order: bytes = b"little",
    **options: Any,
) -> bytes:
    """A zip as torch.save lays it out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as file:
        for name, data in parts.items():
            file.writestr(folder + name, data.replace(STORAGE, b"tQ"))
        if version:
            file.writestr(f"{folder}byteorder", order)
            file.writestr(f"{folder}version", b"3\n")
    return content.getvalue()


def legacy(data: bytes, storages: dict[str, tuple[int, bytes]] | None = None) -> bytes:
    """A pickle as the third object of a file before 1.6; storages: the number of values of each, and its bytes."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    data = data.replace(STORAGE, b"NtQ")  # not a view of a part of it
    end = b"".join(struct.pack("<q", count) + content for count, content in (storages or {}).values())
    return (
        MAGIC + pickle.dumps(1001, 2) + pickle.dumps(system, 2) + data + pickle.dumps(list(storages or {}), 2) + end
    )


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


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def storage(count: int, key: str = "0", kind: str = "FloatStorage", view: bytes = STORAGE) -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + whole(count) + view


def tensor(count: int, size: list[int], stride: list[int], offset: int = 0, **more: Any) -> bytes:
    shape, steps = (b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (size, stride))
    hooks = call("collections", "OrderedDict")
    arguments = storage(count, **more), whole(offset), shape, steps, b"\x89", hooks
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def array(data: bytes, shape: list[int]) -> bytes:
    """An array of bytes of numpy's, as protocol 5 has it."""
    content = b"B" + struct.pack("<I", len(data)) + data
    numbers = b"(" + b"".join(map(whole, shape)) + b"t"
    return call("numpy._core.numeric", "_frombuffer", content, U1, numbers, text("C"))


def stored(data: bytes) -> bytes:
    """A storage in a plain pickle: a file in the file."""
    return call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(data)) + data)


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def both(group: str, title: str, value: Callable[[], bytes], **parts: bytes) -> Iterator[Case]:
    """A value written by hand, in an archive and in the old format, where a storage has one entry more."""

    def new(_: Base) -> bytes:
        return archive({"data.pkl": pickled(value()), **{f"data/{key[1:]}": data for key, data in parts.items()}})

    yield _bytes(group, title, new)
    yield _bytes(group, f"{title}, old format", lambda _: legacy(pickled(value())))


# -- code ------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def code() -> Iterator[Case]:
    shell, python = text(f"touch {CANARY}"), text(f"open({CANARY!r}, 'w')")
    calls = {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "eval, as Python 2 names it": call("__builtin__", "eval", python),
        "open": call("builtins", "open", text(CANARY), text("w")),
        "io.open": call("_io", "open", text(CANARY), text("w")),
        "subprocess": call("subprocess", "getoutput", shell),
        "runpy": call("runpy", "run_path", text("/etc/hostname")),
        "import": call("builtins", "__import__", text("antigravity")),
        "numpy": call("numpy.testing._private.utils", "runstring", python, b"}"),
        "torch.load": call("torch.serialization", "load", text("/etc/passwd")),
        "torch.hub": call("torch.hub", "load", text("/tmp"), text("x")),
        "timeit": call("timeit", "timeit", python),
        "a tensor of a type": call(
            "torch._tensor", "_rebuild_from_type_v2", name("os", "system"), b"N", b"(" + shell + b"t", b"}"
        ),
        "a dotted name": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93(" + shell + b"tR",
        "an instance": b"(" + shell + b"ios\nsystem\n",
        "an object": b"(" + name("os", "system") + shell + b"o",
        "a new object": name("os", "system") + b"(" + shell + b"t\x81",
        "a state of a function": name("torch._utils", "_rebuild_tensor") + dictionary(__code__=shell) + b"b",
        "a state of a class": name("torch.nn", "Linear") + dictionary(forward=name("os", "system")) + b"b",
        "a state of a dictionary": call("collections", "OrderedDict") + dictionary(items=name("os", "system")) + b"b",
        "a call that is dropped": call("os", "system", shell) + b"0N",
        "a call of a call": call("builtins", "getattr", name("os", "path"), text("os")) + b"(" + shell + b"tR",
        "a storage": b"(" + text("module") + call("os", "system", shell) + text("a") + text("b") + STORAGE,
        "a registered extension": b"\x82\x01(" + shell + b"tR",
        "a registered extension of two bytes": b"\x83\x01\x00(" + shell + b"tR",
        "a registered extension of four bytes": b"\x84\x01\x00\x00\x00(" + shell + b"tR",
    }
    for title, value in calls.items():
        yield from both("code", title, lambda v=value: v)
    for place in ("arch", "metrics", "state_dict", "epoch", "config"):
        for function, argument in ((os.system, f"touch {CANARY}"), (eval, f"open({CANARY!r}, 'w')")):
            harm = {place: Call(function, argument), "checksum": "0" * 64}
            title = f"{function.__name__} as {place} of a checkpoint"
            yield _bytes("code", title, lambda base, h=harm: torch_bytes(base.raw | h))
    harm = Call(os.system, f"touch {CANARY}")
    for form in (True, False):
        yield _bytes(
            "code",
            f"beside good weights, {'new' if form else 'old'} format",
            lambda base, f=form: torch_bytes(
                {"w": base.raw["state_dict"], "x": harm}, _use_new_zipfile_serialization=f
            ),
            harmless=True,
        )
    for protocol in range(6):
        yield _bytes(
            "code", f"protocol {protocol}", lambda _, n=protocol: torch_bytes({"a": harm}, pickle_protocol=n)
        )
        yield _bytes("code", f"protocol {protocol}, a bare pickle", lambda _, n=protocol: pickle.dumps(harm, n))
    yield _bytes(
        "code", "in place of the magic number", lambda _: pickle.dumps(Call(os.system, f"touch {CANARY}"), 2)
    )
    yield _bytes(
        "code",
        "in a part of another case",
        lambda _: archive({"data.pkl": pickle.dumps({}, 2), "DATA.PKL": pickled(calls["os.system"])}),
    )
    yield _bytes(
        "code",
        "in a second part of that name",
        lambda _: archive({"data.pkl": pickled(calls["os.system"])}) and _twice(calls["os.system"]),
    )


def _twice(value: bytes) -> bytes:
    first = archive({"data.pkl": pickle.dumps({}, 2), "dATA.pkl": pickled(value)})
    return first.replace(b"dATA.pkl", b"data.pkl")


# -- bombs -----------------------------------------------------------------------------------------------------


def _remembered(value: bytes, use: bytes, times: int) -> bytes:
    """`value` kept in the memo, then `use` so many times, all in one list."""
    return b"](" + value + b"q\x00" + use * times + b"e"


def _laughs(depth: int) -> bytes:
    """Lists of ten times the same list, `depth` levels deep: 10**depth values in all."""
    memo = [bytes([depth - 1 - level]) for level in range(depth)]  # the outermost comes first in the file
    value = b"]q" + memo[0] + b"(" + b"K\x01" * 10 + b"e"
    for level in range(1, depth):
        value = b"]q" + memo[level] + b"(" + value + (b"h" + memo[level - 1]) * 9 + b"e"
    return value


def _doubled(value: bytes, levels: int, function: bytes = b"") -> bytes:
    """A pair of a pair of ... `value`: 2**levels of it; with `function`, the call of it with each pair."""
    if not function:
        return value + b"2\x86" * levels
    for level in range(levels):
        index = bytes([level])
        value += b"q" + index + b"0" + function + (b"h" + index) * 2 + b"\x86R"
    return value


def _many_parts(count: int) -> bytes:
    return archive({"data.pkl": pickle.dumps({}, 2)} | {f"data/{i}": b"" for i in range(count)})


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
        parts = {info.filename.split("/", 1)[1]: old.read(info) for info in old.infolist()}
    return archive(parts, version=False, compression=zipfile.ZIP_DEFLATED)


def bombs() -> Iterator[Case]:
    million = text("x" * 1_000_000)
    pairs = b"](" + b"K\x01K\x02\x86" * 20_000 + b"e"
    sizes = {
        "bytearray of 1 TB": call("builtins", "bytearray", whole(10**12)),
        "bytearray of 10 GB": call("__builtin__", "bytearray", whole(10**10)),
        "bytes copied": _remembered(million, b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR", 20_000),
        "sets copied": _remembered(
            b"](" + b"".join(whole(i) for i in range(50_000)) + b"e", b"c__builtin__\nset\nh\x00\x85R", 20_000
        ),
        "dictionaries copied": _remembered(pairs, b"ccollections\nOrderedDict\nh\x00\x85R", 20_000),
        "counters": _remembered(pairs, b"ccollections\nCounter\nh\x00\x85R", 20_000),
        "shapes copied": _remembered(b"(" + b"K\x01" * 50_000 + b"t", b"ctorch\nSize\nh\x00\x85R", 20_000),
        "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
        "a memo of 10**9, in words": b"Np1000000000\n",
        "lists a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999,
        "tuples a hundred thousand deep": b")" + b"\x85" * 100_000,
        "dictionaries deep": (b"}" + text("a")) * 60_000 + b"N" + b"s" * 60_000,
        "arrays copied": _remembered(
            million,
            name("numpy.core.numeric", "_frombuffer")
            + b"(h\x00"
            + U1
            + b"("
            + whole(10**6)
            + b"t"
            + text("C")
            + b"tR",
            20_000,
        ),
        "a key that doubles": b"}" + _doubled(b")", 40) + b"Ns",
        "a member of a set that doubles": b"\x8f(" + _doubled(b")", 40) + b"\x90",
        "a tuple 400,000 deep as a key": b"}" + b")" + b"\x85" * 400_000 + b"Ns",
        "a value that doubles": _doubled(b")", 40),
        "the state of an object that doubles": call("a", "B") + _doubled(b")", 40) + b"b",
        "objects that double": _doubled(b"N", 60, name("a", "B")),
        "objects in each other": call("a", "B") + b"q\x00" + dictionary(me=b"h\x00") + b"b",
        "objects a hundred thousand deep": name("a", "B") + b"q\x00" + b"h\x00" * 99_999 + b"N" + b"\x85R" * 100_000,
        "a storage of a type that doubles": b"("
        + text("storage")
        + _doubled(b")", 40)
        + text("0")
        + text("cpu")
        + b"K\x01"
        + STORAGE,
        "names of a megabyte": _remembered(million, b"h\x00h\x00\x93", 200_000),
        "a text many times": dictionary(format_version=b"K\x01", a=_remembered(million, b"h\x00", 400_000)),
        "keys of a megabyte": _remembered(million, b"}h\x00Ns", 150_000),
        "calls with many arguments": _remembered(b"(" + b"N" * 400_000 + b"t", b"ctorch\nSize\nh\x00R", 100_000),
        "new objects with many arguments": _remembered(
            b"(" + b"N" * 400_000 + b"t", b"ca\nB\nh\x00}" + text("k") + b"Ns\x92", 60_000
        ),
        "devices of a megabyte": _remembered(million, b"ctorch\ndevice\nh\x00K\x01\x86R", 100_000),
        "modules in each other": call("a", "B")
        + b"q\x00"
        + dictionary(_modules=dictionary(a=b"h\x00", b=b"h\x00"))
        + b"b",
        "keys that collide": b"}(" + b"".join(whole(i << 32) + b"N" for i in range(30_000)) + b"u",
        "lists fifty deep": b"]" * 60 + b"a" * 59,
        "a list that holds itself": b"]q\x00h\x00a",
        "a dictionary that holds itself": b"}q\x00" + text("state_dict") + b"h\x00s",
        "a million values": _laughs(6),
        "a billion values": _laughs(9),
        "ten thousand billion values": _laughs(13),
        "two million values": b"](" + b"N" * 2_000_000 + b"e",
        "thirty million dictionaries": b"](" + b"}" * 30_000_000 + b"e",
        "a number of a million digits": dictionary(epoch=whole(1 << 3_000_000), format_version=whole(1)),
        "a number of six hundred digits": dictionary(epoch=b"\x8a\xff" + b"\x7f" * 255, format_version=whole(1)),
        "a number in a million letters": b"I" + b"9" * 1_000_000 + b"\n",
        "a key of a megabyte": dictionary(**{"k" * 1_000_000: b"N"}),
        "a string longer than the file": b"X\xff\xff\xff\x7fabc",
        "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        "a frame longer than memory": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN",
        "a number longer than the file": b"\x8b\xff\xff\xff\x7f\x01",
        "a million tensors": _remembered(tensor(1, [1], [1]), b"h\x00", 1_000_000),
        "a storage of 4 TB": dictionary(a=tensor(10**12, [10**12], [1])),
        "a storage of 2**62": dictionary(a=tensor(2**62, [2**62], [1])),
        "a storage of 100 MB": dictionary(a=tensor(25_000_000, [25_000_000], [1])),
        "4 TB from one number": dictionary(a=tensor(1, [10**6, 10**6], [0, 0])),
        "2**64 values": dictionary(a=tensor(1, [2**32, 2**32], [0, 0])),
    }
    for title, value in sizes.items():
        yield from both("bomb", title, lambda v=value: v, _0=bytes(4))
    storages = b"](" + b"".join(storage(10**9, key=str(i)) for i in range(2000)) + b"e"
    yield _bytes(
        "bomb",
        "two thousand storages of 4 GB, old format",
        lambda _: legacy(pickled(storages.replace(b"tQ", b"NtQ"))),
    )
    yield _bytes("bomb", "compressed", _deflated)
    bomb = {"data.pkl": pickled(dictionary(a=tensor(10**8, [10**8], [1]))), "data/0": bytes(4 * 10**8)}
    yield _bytes(
        "bomb",
        "400 MB of zeros compressed",
        lambda _: archive(bomb, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
    )
    yield _bytes(
        "bomb", "compressed by bzip2", lambda base: archive({"data.pkl": bytes(10**7)}, compression=zipfile.ZIP_BZIP2)
    )
    yield _bytes("bomb", "overlapping parts", lambda _: _overlapping())
    yield _bytes("bomb", "sixty thousand parts", lambda _: _many_parts(60_000))


# -- tensors that are not what they say --------------------------------------------------------------------------


def crooked() -> Iterator[Case]:
    """Declared sizes that do not fit together, and types that are none."""
    four = bytes(16)
    shapes = {
        "more values than stored": tensor(4, [5], [1]),
        "a larger storage than stored": tensor(5, [5], [1]),
        "a smaller storage than stored": tensor(3, [3], [1]),
        "a much larger storage than stored": tensor(250_000, [250_000], [1]),
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
        "sixty-five dimensions": tensor(4, [1] * 65, [1] * 65),
        "no storage": call("torch._utils", "_rebuild_tensor_v2", b"N", whole(0), b"(t", b"(t", b"\x89", b"N"),
        "a storage of no type": call(
            "torch._utils", "_rebuild_tensor_v2", storage(4, kind="NoStorage"), whole(0), b"(t", b"(t", b"\x89", b"N"
        ),
        "a part that is not there": tensor(4, [4], [1], key="7"),
        "a part with a path": tensor(4, [4], [1], key="../data.pkl"),
        "a key of a megabyte": tensor(4, [4], [1], key="k" * 1_000_000),
        "a storage of no kind": b"(" + text("module") + text("a") + text("b") + text("c") + text("d") + b"tQ",
        "a storage that is no tuple": text("storage") + b"Q",
        "a bare storage": storage(4),
        "sparse": call(
            "torch._utils",
            "_rebuild_sparse_tensor",
            call("torch.serialization", "_get_layout", text("torch.sparse_coo")),
            b"N",
        ),
        "quantized": call("torch._utils", "_rebuild_qtensor", storage(4), whole(0), b"N", b"N", b"N", b"\x89", b"N"),
        "on no device": call(
            "torch._utils",
            "_rebuild_meta_tensor_no_storage",
            name("torch", "float32"),
            b"(K\x04t",
            b"(K\x01t",
            b"\x89",
        ),
        "a tensor of nothing": call("torch", "Tensor", whole(10**10)),
        "a parameter of nothing": call("torch.nn.parameter", "Parameter", b"N"),
        "an unknown device": call("torch", "device", text("nowhere:5")),
        "an array of more than is there": array(b"abc", [2, 2]),
        "an array of a negative shape": array(b"", [-1, 2]),
        "an array of too many dimensions": array(b"a", [1] * 100),
        "an array of no bytes": call("numpy.core.multiarray", "scalar", U1, b"N"),
        "a storage with no file in it": stored(b"abc"),
        "a storage in a storage": stored(pickled(stored(b"\x80\x02}."))),
        "items of a number": b"K\x05K\x06a",
        "pairs of none": call("collections", "OrderedDict", b"](K\x05e"),
        "too few arguments": call("torch._utils", "_rebuild_tensor_v2", storage(4)),
    }
    for title, value in shapes.items():
        yield from both("crooked", title, lambda v=value: dictionary(a=v), _0=four)
    views = {"beyond": (2, 9), "before": (-1, 2), "huge": (2**62, 2**62)}
    for title, (offset, length) in views.items():
        view = b"(" + text("v") + whole(offset) + whole(length) + b"ttQ"
        made = dictionary(a=storage(4, view=view))
        yield _bytes("crooked", f"a view {title} its storage", lambda _, v=made: legacy(pickled(v), {"0": (4, four)}))
    good = {"data.pkl": pickled(dictionary(a=tensor(4, [4], [1]))), "data/0": four}
    yield _bytes("crooked", "of another byte order", lambda _: archive(good, order=b"big"))
    yield _bytes("crooked", "storages that lack", lambda _: legacy(pickled(dictionary(a=tensor(4, [4], [1])))))
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
        yield _bytes("crooked", title, lambda _, v=value: archive({"data.pkl": v}))
        yield _bytes("crooked", f"{title}, old format", lambda _, v=value: legacy(v))


# -- whole files with wrong content, checksums right -------------------------------------------------------------


def _with(base: Base, **changes: Any) -> bytes:
    return checkpoints.serialize(base.raw | changes)


def _state(base: Base, change: Callable[[dict[str, Tensor]], object]) -> bytes:
    """The network's tensors changed; those of a 1-bit file lie in one tensor of floats and one of signs."""
    state = {key: value.clone() for key, value in base.raw["state_dict"].items()}
    change(state)
    return _with(base, state_dict=state)


def _set(key: str, value: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: value})


def _fill(key: str, value: float, index: int = 0) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state[key].view(-1)[index : index + 1].fill_(value)


def _cast(key: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: torch.zeros(state[key].shape, dtype=dtype)})


def _reshape(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: torch.zeros(shape)})


def _four_bits() -> Tensor:
    """Two numbers a byte; older versions of torch have no such type: there bytes."""
    dtype = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
    return torch.zeros(10, dtype=torch.uint8).view(dtype)


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({new: state.pop(old)})


def values() -> Iterator[Case]:
    changes: dict[str, Callable[[dict[str, Tensor]], object]] = {}
    for key in ("conv1.weight", "layer2.1.conv2.weight", "linear.weight", "linear.bias", "bn1.running_var"):
        for word, value in (("NaN", float("nan")), ("infinity", float("inf")), ("minus infinity", -float("inf"))):
            changes[f"{word} in {key}"] = _fill(key, value, 3)
    for key in ("conv1.weight", "linear.weight", "bn1.bias"):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            changes[f"{key} as {dtype}"] = _cast(key, dtype)
    changes |= {
        "many views of one memory": lambda state: state.update(
            {f"extra.{i}": shared for shared in [torch.zeros(100_000)] for i in range(400)}
        ),
        "a counter as float": _cast("bn1.num_batches_tracked", torch.float32),
        "a counter as vector": _reshape("bn1.num_batches_tracked", 16),
        "a negative variance": _fill("layer1.0.bn1.running_var", -1e-3),
        "conv1 transposed": _reshape("conv1.weight", 3, 16, 3, 3),
        "conv1 flat": _reshape("conv1.weight", 432),
        "a classifier of 100 classes": _reshape("linear.weight", 100, 64),
        "a classifier of none": _reshape("linear.weight", 0, 64),
        "a bias that is a number": _reshape("linear.bias"),
        "a key too few": lambda state: state.pop("layer3.2.bn2.weight"),
        "a whole block too few": lambda state: [state.pop(key) for key in list(state) if key.startswith("layer3.2.")],
        "a block too many": lambda state: state.update({"layer1.3.conv1.weight": torch.zeros(16, 16, 3, 3)}),
        "a key too many": _set("fc.weight", torch.zeros(10, 64)),
        "another name": _rename("linear.weight", "fc.weight"),
        "a prefix that is none of ours": lambda state: [_rename(key, f"net.{key}")(state) for key in list(state)],
        "a key in two forms": lambda state: state.update({"module.linear.bias": state["linear.bias"]}),
        "a number in place of a tensor": _set("linear.bias", 5),
        "a list in place of a tensor": _set("linear.bias", [0.0] * 10),
        "a dictionary in place of a tensor": _set("layer1.0.conv1.weight", {"a": torch.zeros(1)}),
        "a name that is a number": _set(5, torch.zeros(1)),
        "a name that is a tuple": _set(("a",), torch.zeros(1)),
        "a bias in a format to store, not to compute with": _set("linear.bias", _four_bits()),
        "a name with escapes": _set("\x1b[2Jlinear\r\n", torch.zeros(1)),
        "no tensors": lambda state: state.clear(),
    }
    for title, change in changes.items():
        yield _bytes("values", title, lambda base, c=change: _state(base, c))


def folding() -> Iterator[Case]:
    """BatchNorms that are finite, and beyond float32 once they are multiplied out; to be scored, if that works."""
    for title, weight, mean, bias in (("cancels", 1e4, 1e7, 1e11), ("overflows in the shift", 1e38, 1e38, 0.0)):
        change = {"bn1.weight": weight, "bn1.running_mean": mean, "bn1.bias": bias}
        numbers = {"bn1.running_var": torch.ones(16)} | {
            key: torch.full((16,), value) for key, value in change.items()
        }
        yield _bytes(
            "folding",
            title,
            lambda base, n=numbers: _state(base, lambda state: state.update(n)),
            harmless=True,
            diverges="overflows" in title,  # as a teacher it is folded too
        )


METADATA = {
    "format_version": (0, 2, -1, 1.0, True, "1", None, [1], 2**63, torch.ones(3), torch.ones(1), float("nan")),
    "kind": (
        "",
        "ternary",
        None,
        5,
        ["latent"],
        {"latent": 1},
        torch.ones(3),
        "x" * 100_000,
        "\x1b[31mlatent",
        "binary_1bit",
    ),
    "arch": ("resnet32", "resnet21", "", 5, ["resnet20"], torch.ones(3), "../../etc/passwd", "y" * 100_000, "\n\n"),
    "logit_scale": (0, -1.0, 1e300, float("nan"), float("inf"), "1", None, [1.0], torch.ones(1), 1j),
    "state_dict": (None, 5, [], {}, "abc", {"a": {"b": 1}}, torch.zeros(3)),
}


def metadata() -> Iterator[Case]:
    for key, wrong in METADATA.items():
        for number, value in enumerate(wrong):
            title = f"{key} is {str(value)[:20]!r} ({number})"
            yield _bytes("metadata", title, lambda base, k=key, v=value: _with(base, **{k: v}))
    yield _bytes("metadata", "no checksum", lambda base: torch_bytes(base.raw))
    yield _bytes(
        "metadata", "a checksum that is a tensor", lambda base: torch_bytes(base.raw | {"checksum": torch.ones(3)})
    )
    yield _bytes("metadata", "a checksum of nothing", lambda base: torch_bytes(base.raw | {"checksum": ""}))


# -- odd, but without harm where nothing is made of it -----------------------------------------------------------


class _Dressed(OrderedDict):
    """Pickles as an OrderedDict with attributes that hide its methods."""

    def __reduce__(self) -> tuple:
        hidden = dict.fromkeys(("items", "keys", "values", "get", "__class__", "_metadata"), 5)
        return OrderedDict, (), hidden, None, iter(dict.items(self))


def odd() -> Iterator[Case]:
    entries = {
        "metrics": (
            None,
            5,
            [1],
            {"test_accuracy": "x"},
            {"test_accuracy": [1]},
            {"test_accuracy": float("nan")},
            {5: 5},
        ),
        "epoch": (-5, 2**62, "x", None, [1], float("inf"), torch.ones(3)),
        "config": (None, 5, [1], {"seed": [1]}, {"help": True}, {5: 5}, {"arch": "\x1b[2J"}),
        "versions": (None, 5, {"torch": 5}, "\x1b[2J\x07"),
        "source_sha256": (5, "x" * 100_000, "\x1b[2J"),
        "\x1b]0;title\x07": (1, "\x1b[2J"),
    }
    for key, strange in entries.items():
        for number, value in enumerate(strange):
            title = f"{key!r} is {str(value)[:20]!r} ({number})"
            yield _bytes("odd", title, lambda base, k=key, v=value: _with(base, **{k: v}), harmless=True)

    def dressed(base: Base) -> bytes:
        raw = torch.load(io.BytesIO(base.content), weights_only=True)
        return torch_bytes(_Dressed({key: _Dressed(v) if isinstance(v, dict) else v for key, v in raw.items()}))

    def negated(base: Base) -> bytes:
        state = {k: torch._neg_view(v) if v.is_floating_point() else v for k, v in base.raw["state_dict"].items()}
        return torch_bytes(base.raw | {"state_dict": state, "checksum": "0"})

    yield _bytes("odd", "attributes in the place of methods", dressed, harmless=True)
    yield _bytes("odd", "tensors with a negative bit", negated)
    for title, change in {"weights that overflow": _overflowing, "a variance of zero": _vanishing}.items():
        yield _bytes("odd", title, lambda base, c=change: _state(base, c), harmless=True, diverges=True)


def _overflowing(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        if ".bn" in key and key.endswith((".weight", ".bias")):
            value.fill_(1e38)


def _vanishing(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        if key.endswith("running_var"):
            value.zero_()
        elif key.endswith("running_mean"):
            value.fill_(-3e38)


# -- 1-bit files -------------------------------------------------------------------------------------------------


def packed() -> Iterator[Case]:
    """For the scripts that take `best_model_binary_1bit.pth`; base is one."""
    for key, wrong in {
        "signs": (
            None,
            [1, 2],
            torch.zeros(33_541, dtype=torch.uint8),
            torch.zeros(33_543, dtype=torch.uint8),
            torch.zeros(33_542, dtype=torch.int8),
            torch.zeros(33_542),
            torch.zeros(1, 33_542, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.uint8),
        ),
        "floats": (
            None,
            "x",
            torch.zeros(1385),
            torch.zeros(1386, 1),
            torch.zeros(1386, dtype=torch.float64),
            torch.zeros(1386, dtype=torch.int32),
            torch.full((1386,), float("nan")),
            torch.full((1386,), float("-inf")),
        ),
        "arch": (
            "resnet32",
            "resnet110",
            "resnet8",
            "",
            None,
            5,
            ["resnet20"],
            {"a": 1},
            torch.ones(2),
            "z" * 100_000,
        ),
        "batchnorm": ("kept", "none", None, 5, ["folded"], torch.ones(2)),
        "format_version": (2, "1", None, torch.ones(2)),
        "kind": ("binary", "latent", None, 5),
        "logit_scale": (0, "1", float("nan")),
    }.items():
        for number, value in enumerate(wrong):
            title = f"{key} is {str(value)[:20]!r} ({number})"
            yield _bytes("packed", title, lambda base, k=key, v=value: _with(base, **{k: v}))
    for seed in range(20):
        yield _bytes("packed", f"bit {seed} flipped, archive written anew", lambda base, n=seed: _flip_anew(base, n))
        yield _bytes("packed", f"bit {seed} flipped", lambda base, n=seed: _flip(base.content, n))
    yield _bytes("packed", "no checksum", lambda base: torch_bytes(base.raw))
    yield _bytes(
        "packed", "scales that overflow", lambda base: _with(base, floats=torch.full((1386,), 3e38)), harmless=True
    )


# -- training states ---------------------------------------------------------------------------------------------


def training() -> Iterator[Case]:
    """For --resume; base is a checkpoint_last.pth in the middle of a run."""

    def state(title: str, harmless: bool = False, **changes: Any) -> Case:
        def change(base: Base) -> bytes:
            return _with(base, training=base.raw["training"] | changes)

        return _bytes("state", title, change, harmless=harmless)

    strange = (None, "x", -1, [], {}, [None], 2**62, torch.ones(3), float("nan"))
    keys = ("optimizers", "generators", "processes", "labels", "epoch", "history", "best", "wandb_id", "threads")
    for key in keys:
        for number, value in enumerate(strange):
            right = (key, number) in RIGHT_STATES
            yield state(f"{key} is {str(value)[:20]!r} ({number})", harmless=right, **{key: value})
    for key in keys:
        yield _bytes("training", f"no {key}", lambda base, k=key: _without(base, k))
    for value in strange:
        yield _bytes("training", f"training is {str(value)[:20]!r}", lambda base, v=value: _with(base, training=v))
    options = {
        "epochs": (0, -1, "x", None, 1.5, [1], torch.ones(2)),
        "batch_size": (0, "x", 2**70 % 2**63),
        "arch": ("resnet8", 5, "--help", "resnet56"),
        "lr": (-1.0, "x", float("nan")),
        "optimizer": ("lion",),
        "help": (True, "x"),
        "no-such-option": (1, True),
        "": (1,),
        "resume": ("other.pth",),
    }
    for key, wrong in options.items():
        for number, value in enumerate(wrong):
            title = f"option {key!r} is {str(value)[:20]!r} ({number})"
            yield _bytes(
                "training", title, lambda base, k=key, v=value: _with(base, config=base.raw["config"] | {k: v})
            )
    yield _bytes("training", "no options", lambda base: _with(base, config={5: 5}))
    for title, change in {
        "that are single numbers": lambda value: torch.tensor(0.0),
        "that are none": lambda value: None,
        "of another shape": lambda value: torch.zeros(3, 3),
        "of another type": lambda value: value.double(),
        "that are NaN": lambda value: torch.full_like(value.float(), float("nan")),
        "that are numbers": lambda value: 5,
    }.items():
        yield _bytes("training", f"moments {title}", lambda base, c=change: _moments(base, c))
        yield _bytes("training", f"best weights {title}", lambda base, c=change: _best_weights(base, c))
    for title, change in (("moments", _moments), ("best weights", _best_weights)):
        yield _bytes("training", f"{title} in one place", lambda base, c=change: c(base, _spread), harmless=True)
        yield _bytes("training", f"{title} the other way", lambda base, c=change: c(base, _turned), harmless=True)
    for title, change in {
        "no moments but the step": lambda state: {i: {"step": torch.ones(())} for i in state},
        "moments without a name": lambda state: {i: {} for i in state},
        "moments of one weight only": lambda state: {0: state[0]},
        "a step of 0": lambda state: {i: m | {"step": torch.zeros(())} for i, m in state.items()},
    }.items():
        yield _bytes("training", title, lambda base, c=change: _states(base, c))
    for title, change in {
        "an epoch that is NaN": {"epoch": float("nan")},
        "another epoch": {"epoch": 7},
        "a huge loss": {"train_loss": 1.7e308},
        "a column that cannot be written": {"x\ud800": 1.0},
        "a column of formulas": {"$\\frac$": 1.0},
    }.items():
        yield _bytes("training", f"history with {title}", lambda base, c=change: _history(base, c))
    yield _bytes("training", "best weights with negative variances", lambda base: _best_weights(base, _less))


# Of the strange values these are right: any name, and any number.
RIGHT_STATES = {("wandb_id", 1), ("threads", 2), ("threads", 6)}


def _without(base: Base, key: str) -> bytes:
    return _with(base, training={name: value for name, value in base.raw["training"].items() if name != key})


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest with its tensors changed, apart from single numbers."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) and value.ndim else value


def _moments(base: Base, change: Callable[[Tensor], Any]) -> bytes:
    optimizers = [_changed(optimizer, change) for optimizer in base.raw["training"]["optimizers"]]
    return _with(base, training=base.raw["training"] | {"optimizers": optimizers})


def _states(base: Base, change: Callable[[dict], dict]) -> bytes:
    """The state of the first optimizer changed: the SGD of main.py, the Adam of main_binary.py."""
    first, *others = base.raw["training"]["optimizers"]
    optimizers = [first | {"state": change(first["state"])}, *others]
    return _with(base, training=base.raw["training"] | {"optimizers": optimizers})


def _history(base: Base, change: dict[str, float]) -> bytes:
    history = base.raw["training"]["history"]
    return _with(base, training=base.raw["training"] | {"history": [*history[:-1], history[-1] | change]})


def _less(value: Tensor) -> Tensor:
    return value - 9


def _spread(value: Tensor) -> Tensor:
    """Of the same shape and type, and all of it one number in memory."""
    return torch.zeros(1, dtype=value.dtype).expand(value.shape)


def _turned(value: Tensor) -> Tensor:
    """Equal, and in memory the other way round."""
    backwards = list(reversed(range(value.ndim)))
    return value.permute(backwards).contiguous().permute(backwards)


def _best_weights(base: Base, change: Callable[[Tensor], Any]) -> bytes:
    best = base.raw["training"]["best"]
    best = best | {"state_dict": _changed(best["state_dict"], change)}
    return _with(base, training=base.raw["training"] | {"best": best})


# -- data ----------------------------------------------------------------------------------------------------------


def data_files() -> Iterator[tuple[str, str, bytes]]:
    """(description, "binary" or "python", content) of a test_batch that its SHA256SUMS calls right."""
    record = bytes(3073)
    yield from (
        ("binary " + title, "binary", content)
        for title, content in {
            "empty": b"",
            "one byte": b"\0",
            "a record too short": record[:-1],
            "a record too long": record + b"\0",
            "a label of 10": b"\x0a" + record[1:],
            "a label of 255": record + b"\xff" + record[1:],
            "text": b"no data\n" * 1000,
        }.items()
    )
    shell = text(f"touch {CANARY}")
    array = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"(K\x00t", text("b"))
    pickles = {
        "code": call("os", "system", shell),
        "code inside": dictionary(data=call("posix", "system", shell)),
        "eval": call("builtins", "eval", text(f"open({CANARY!r}, 'w')")),
        "a dotted name": b"\x80\x04" + text("numpy") + text("os.system") + b"\x93(" + shell + b"tR",
        "an instance": b"(" + shell + b"ios\nsystem\n",
        "a registered extension": b"\x82\x01(" + shell + b"tR",
        "bytearray of 1 TB": call("builtins", "bytearray", whole(10**12)),
        "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
        "a list that holds itself": b"]q\x00h\x00a",
        "a billion values": _laughs(9),
        "lists a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999,
        "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        "no dictionary": b"K\x05",
        "no array": dictionary(data=b"K\x05", labels=b"]"),
        "an array of objects": dictionary(
            data=array + b"(K\x01K\x01\x85" + call("numpy", "dtype", text("O8")) + b"\x89]tb", labels=b"]"
        ),
        "an array that is huge": dictionary(
            data=array
            + b"(K\x01"
            + whole(10**9)
            + whole(3072)
            + b"\x86"
            + call("numpy", "dtype", text("u1"))
            + b"\x89"
            + text("x")
            + b"tb",
            labels=b"]",
        ),
        "an array with no content": dictionary(data=array, labels=b"]"),
        "no labels": dictionary(data=array),
    }
    for title, value in pickles.items():
        yield f"python {title}", "python", pickled(value)
    yield "python truncated", "python", pickled(dictionary(a=b"K\x01"))[:-5]
    yield "python empty", "python", b""
    yield "python text", "python", b"no data\n" * 100
