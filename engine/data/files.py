"""The files of CIFAR-10: both official formats, verified before they are parsed.

`cifar-10-batches-bin` holds records of 3,073 bytes: the label, then 1,024 bytes each of red, green and blue, row
by row. `cifar-10-batches-py` holds one pickled dictionary per file with the same content. A file is read once: the
bytes whose checksum is right are the bytes that are parsed.

A folder in the binary format may carry its own `SHA256SUMS` and hold other images. Python files must be the
official ones, because unpickling runs whatever code a file names.
"""

from __future__ import annotations

import hashlib
import pickle
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.cli import UserError, reason

RECORD_BYTES = 1 + 3 * 32 * 32
SUMS = "SHA256SUMS"
BINARY_FOLDER, PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
_TOO_LARGE = 2**30  # bytes; 35 times an official file

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
}


class Damaged(Exception):
    """A file of CIFAR-10 is missing or has the wrong checksum: another copy or a new download helps."""


@dataclass
class Files:
    """The content of a folder: for each file its records, uint8 (n, 3073). official: all are CIFAR-10's own."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    official: bool
    folder: Path


def read_folder(folder: Path, md5s: dict[str, str], train: bool) -> Files:
    """Read, verify and parse the files named in `md5s`; without `train` the test file only.

    Raises Damaged where a file of CIFAR-10 is missing or wrong, UserError where a new download cannot help.
    """
    sums = _read(folder / SUMS)
    found = Files([], [], True, folder)
    for name, official_md5 in md5s.items():
        is_test = name.startswith("test")
        if not (train or is_test):
            continue
        path = folder / name
        content = _read(path)
        if content is None or md5(content) != official_md5:
            if sums is None:
                problem = "is missing" if content is None else "does not have the checksum of CIFAR-10"
                raise Damaged(f"{path} {problem}")
            _check_own(path, content, sums)
            found.official = False
        records = parse_python(content) if md5s is PYTHON_MD5 else _parse_binary(path, content)
        (found.test if is_test else found.train).append(records)
    return found


def md5(content: bytes | memoryview) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()  # the publisher gives no other checksum


def parse_python(content: bytes) -> np.ndarray:
    """uint8 (n, 3073). Only for content whose official checksum is right: unpickling can run code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the age of the pickles
        batch = pickle.loads(content, encoding="bytes")  # written by Python 2
    return np.concatenate([np.array(batch[b"labels"], np.uint8)[:, None], batch[b"data"]], axis=1)


def _parse_binary(path: Path, content: bytes) -> np.ndarray:
    """uint8 (n, 3073). Raises UserError where the content is not whole records with labels 0 to 9."""
    if len(content) % RECORD_BYTES:
        raise UserError(f"{path}: {len(content):,} bytes are not a whole number of records of {RECORD_BYTES:,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    if records.size and records[:, 0].max() > 9:
        raise UserError(f"{path}: holds the label {records[:, 0].max()}; 0 to 9 are allowed")
    return records


def _check_own(path: Path, content: bytes | None, sums: bytes) -> None:
    """Raises UserError unless a file that is not CIFAR-10's is in the binary format and matches the folder's sums."""
    if path.suffix != ".bin":
        raise UserError(f"{path}: is not CIFAR-10's; a data set with its own {SUMS} must be in the binary format")
    if content is None:
        raise UserError(f"{path}: is missing; a folder with its own {SUMS} is never filled by a download")
    lines = sums.decode(errors="replace").replace(" *", "  ").splitlines()  # an asterisk: written on Windows
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in lines:
        raise UserError(f"{path}: has no line in {SUMS} that matches; make the folder again or remove it")


def _read(path: Path) -> bytes | None:
    """The content of a regular file; None where there is none. Anything else is refused: a pipe would block."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file; remove it")
        if status.st_size > _TOO_LARGE:
            raise UserError(f"{path}: has {status.st_size:,} bytes, too many for a file of CIFAR-10")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
