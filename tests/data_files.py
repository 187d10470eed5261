"""Small data in both official formats of CIFAR-10: ten classes that a network can learn in a few steps.

Each class is a random pattern of 8 x 8 colors, enlarged to 32 x 32; an image is its class's pattern with
noise. A binary folder gets its own SHA256SUMS, as data that is not CIFAR-10 must have.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np


def make_records(count: int, seed: int) -> np.ndarray:
    """uint8 (count, 3073): label, then the red, green and blue plane. The same number of each class, shuffled."""
    patterns = np.random.default_rng(10).integers(40, 216, (10, 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3)
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % 10)
    pixels = patterns[labels] + random.normal(0, 25, (count, 3, 32, 32))
    pixels = pixels.clip(0, 255).astype(np.uint8).reshape(count, -1)
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)


def make_files(train: int, test: int, seed: int) -> dict[str, np.ndarray]:
    """Records by the name of the batch; `train` images in five batches of (nearly) the same size."""
    batches = {f"data_batch_{number}": 0 for number in range(1, 6)}
    records = np.array_split(make_records(train, seed), 5)
    return dict(zip(batches, records, strict=True)) | {"test_batch": make_records(test, seed + 1)}


def write_binary(folder: Path, train: int = 250, test: int = 100, seed: int = 0) -> Path:
    """Write data_batch_1.bin to data_batch_5.bin, test_batch.bin and SHA256SUMS; return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in make_files(train, test, seed).items():
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return write_sums(folder)


def write_python(folder: Path, train: int = 250, test: int = 100, seed: int = 0) -> Path:
    """Write data_batch_1 to data_batch_5 and test_batch, with the images of `write_binary` for the same arguments;
    return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in make_files(train, test, seed).items():
        (folder / name).write_bytes(pickle_batch(records))
    return folder


def write_sums(folder: Path) -> Path:
    """Write the SHA256SUMS of all files in `folder`, as `sha256sum *` does."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


class _Python2Pickler(pickle._Pickler):
    """Writes every string, of text or of bytes, as Python 2 wrote its own."""

    def save_string(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def pickle_batch(records: np.ndarray) -> bytes:
    """A batch as Python 2 pickled it for CIFAR-10."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump({"labels": records[:, 0].tolist(), "data": records[:, 1:]})
    return buffer.getvalue()
