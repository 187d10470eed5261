"""CIFAR-10 as tensors: splits, augmentation of whole batches, loaders.

    python3 cifar10.py     find or download the data, print counts and statistics, draw an augmented batch

The data set is Krizhevsky's (Learning Multiple Layers of Features from Tiny Images, 2009): 50,000 training
and 10,000 test images of 32 x 32 pixels in ten classes. `engine/data` finds, downloads and verifies the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine import cli
from engine.cli import UserError
from engine.data.fetch import find_or_download
from engine.data.files import SUMS
from engine.files import atomic_write

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Of the 50,000 training images, per channel (R, G, B), on the scale where 255 is 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

SIDE = 32
PAD = 4
EVAL_BATCH = 500  # images per batch when scoring; any size gives the same figures but for rounding

Triple = tuple[float, float, float]  # one value per channel


# --- Splits


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, 32, 32, 3), contiguous; labels int64 (N,) in 0..9."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: torch.Tensor) -> Split:
        """The images of these indices, or where this mask is true."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Data:
    """The result of `load`.

    train is None if only the test split was asked for, val is None if nothing was held out. official is False
    for a folder with its own SHA256SUMS. limited_test: `limit_test` left test images out.
    """

    train: Split | None
    val: Split | None
    test: Split
    official: bool
    folder: Path
    limited_test: bool

    @property
    def scored_on(self) -> str:
        """The images that choose the best epoch, for a message."""
        if self.val is not None:
            return f"{len(self.val):,} held-out images"
        return f"{len(self.test):,} test images" + (", not all of them (--limit-test)" if self.limited_test else "")

    def count(self, split: str) -> int:
        """Images of the split "train", "val" or "test"; 0 where there is none."""
        return len(getattr(self, split) or ())

    def batches(
        self, split: str, device: torch.device, *, batch_size: int = EVAL_BATCH, **more: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`eval_batches` of the split of that name; `more` as there."""
        return eval_batches(getattr(self, split), batch_size, device, **more)


def load(
    data_dir: Path,
    *,
    val_size: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    train: bool = True,
) -> Data:
    """Find CIFAR-10 in `data_dir`, or download it there, verify every file that is read, and split it.

    val_size: number of training images held out as `val`, the same number of each class (to within one): the
        last ones of each class in file order, so the split is the same for every seed and every run.
    limit_train: number of the remaining training images to keep, the same number of each class: the first ones
        in file order.
    limit_test: number of test images to keep, the first ones.
    train=False: only the test file is read and verified.

    A limit beyond the number of images means all of them. Prints a note where files are passed over or
    downloaded, and where the data is not CIFAR-10. Raises UserError where the data can be neither found nor
    downloaded, or the sizes do not fit.
    """
    files = find_or_download(Path(data_dir), train)
    if not files.official:
        print(f"Note: {files.folder} carries its own {SUMS}: this is not CIFAR-10.", flush=True)
    training, val = None, None
    if train:
        training, val = _hold_out(_split(files.train, f"{files.folder}: its train files"), val_size)
        if limit_train is not None:
            training = training.take(_balanced(training.labels, limit_train))
    test = _split(files.test, f"{files.folder}: its test files")
    limited = limit_test is not None and limit_test < len(test)
    if limited:
        test = test.take(torch.arange(limit_test))
    return Data(training, val, test, files.official, files.folder, limited)


def _split(records: list[np.ndarray], title: str) -> Split:
    """Records uint8 (n, 3073) of each file -> one Split. title: the files, for an error."""
    count = sum(map(len, records))
    if count == 0:
        raise UserError(f"{title} hold no images")
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    planes = [part[:, 1:].reshape(-1, 3, SIDE, SIDE) for part in records]
    np.concatenate([part.transpose(0, 2, 3, 1) for part in planes], out=images)  # without a second copy
    labels = np.concatenate([part[:, 0] for part in records]).astype(np.int64)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _hold_out(train: Split, val_size: int) -> tuple[Split, Split | None]:
    if val_size == 0:
        return train, None
    if not 0 < val_size < len(train):
        raise UserError(f"--val-size {val_size}: must be at least 0 and below the {len(train)} training images")
    held = torch.zeros(len(train), dtype=torch.bool)
    held[_balanced(train.labels.flip(0), val_size)] = True  # the first ones from the end
    held = held.flip(0)
    return train.take(~held), train.take(held)


def _balanced(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of `count` elements: the first ones of each class, the same number of each (to within
    one) as long as the classes have that many."""
    rank = torch.empty_like(labels)  # index within its class
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        rank[members] = torch.arange(len(members))
    first = torch.argsort(rank * len(CLASSES) + labels)[:count]
    return first.sort().values


# --- Normalization, augmentation, loaders


@lru_cache
def _scale_and_shift(device: torch.device, mean: Triple, std: Triple) -> tuple[torch.Tensor, torch.Tensor]:
    """Each float32 (3072,): one value per byte of an image, so that the arithmetic runs over long rows."""
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    return (1 / (255 * std)).repeat(SIDE * SIDE), (-mean / std).repeat(SIDE * SIDE)


def normalize(images: torch.Tensor, *, mean: Triple = MEAN, std: Triple = STD) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32) in channels_last memory: (x / 255 - mean) / std.

    mean, std: tuples of three floats; other than the default for networks trained elsewhere with other values.
    """
    scale, shift = _scale_and_shift(images.device, mean, std)
    rows = torch.addcmul(shift, images.flatten(1).float(), scale)
    return rows.view(images.shape).permute(0, 3, 1, 2)


def augment(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Pad with 4 black pixels, crop 32 x 32, mirror some: He et al. 2015, section 4.2.

    images: uint8 (N, 32, 32, 3). offsets: int64 (N, 2) in 0..8, row and column of the crop; (4, 4) is the
    center. flips: bool (N,), mirrored left to right. Returns uint8 (N, 32, 32, 3).
    """
    count, device = len(images), images.device
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))  # (N, 40, 40, 3)
    wide = SIDE + 2 * PAD
    steps = torch.arange(SIDE, device=device)
    rows = offsets[:, :1] + steps  # (N, 32)
    columns = offsets[:, 1:] + torch.where(flips[:, None], steps.flip(0), steps)  # (N, 32)
    rows = rows + wide * torch.arange(count, device=device)[:, None]  # of all images stacked vertically
    pixels = wide * rows[:, :, None] + columns[:, None, :]  # (N, 32, 32)
    return padded.view(-1, 3)[pixels.view(-1)].view_as(images)


class TrainLoader:
    """Shuffled, augmented, normalized batches: float32 (B, 3, 32, 32) channels_last and labels int64 (B,).

    The plan of an epoch (order, crops, mirrored images) is a pure function of (seed, epoch), so a resumed run
    draws the same plans. Every image comes once per epoch; a short last batch is kept. The images move to
    `device` once, as uint8.

    batch_size is that of all processes together. With world_size W, each batch is cut into W contiguous shards
    of the same size, of which this loader gives number `rank`. The fewer than W images at the end of the order
    that do not divide are left out, different ones in every epoch. The plain mean over the processes' gradients is
    then the mean over the images.
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
    ) -> None:
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"batches of {batch_size} for {world_size} processes, rank {rank}")
        if len(split) < world_size:
            raise UserError(f"--limit-train: {len(split)} images are too few for {world_size} processes")
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.images_per_epoch = len(split) - len(split) % world_size  # of all processes
        self.steps_per_epoch = -(-self.images_per_epoch // batch_size)

    def _plan(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The plan of an epoch, in order of use: images int64 (N,), crop offsets int64 (N, 2), mirrored bool (N,)."""
        # SeedSequence mixes the two numbers, so that neighboring seeds and epochs share nothing.
        mixed = np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        count, device = len(self.labels), self.images.device
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(0, 2 * PAD + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        return order.to(device), offsets.to(device), flips.to(device)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch number `epoch`, or this process's shard of each."""
        order, offsets, flips = self._plan(epoch)
        for first in range(0, self.images_per_epoch, self.batch_size):
            size = min(self.batch_size, self.images_per_epoch - first) // self.world_size
            shard = slice(first + size * self.rank, first + size * (self.rank + 1))
            images = augment(self.images[order[shard]], offsets[shard], flips[shard])
            yield normalize(images), self.labels[order[shard]]


def load_for_training(
    args: argparse.Namespace, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> tuple[Data, TrainLoader]:
    """`load` and `TrainLoader` with the options of a training script (data_dir, val_size, batch_size, ...)."""
    data = load(args.data_dir, val_size=args.val_size, limit_train=args.limit_train, limit_test=args.limit_test)
    loader = TrainLoader(data.train, args.batch_size, seed=args.seed, device=device, rank=rank, world_size=world_size)
    return data, loader


def eval_batches(
    split: Split,
    batch_size: int,
    device: torch.device | str = "cpu",
    *,
    rank: int = 0,
    world_size: int = 1,
    **scale: Triple,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image of `split` once, in order: normalized float32 (B, 3, 32, 32), labels int64 (B,).

    With several processes, process `rank` gets images rank, rank + world_size, and so on. scale: the mean and std
    of `normalize`.
    """
    images, labels = split.images[rank::world_size], split.labels[rank::world_size]
    for batch, its_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield normalize(batch.to(device), **scale), its_labels.to(device)


# --- python3 cifar10.py


def channel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over all pixels of each channel of uint8 (N, 32, 32, 3), where 255 is 1.

    From the histogram of the 256 values: exact sums, and no copy of the images in floating point.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(3)])
    shares = counts.double() / counts.sum(1, keepdim=True)  # (3, 256)
    means = (shares * values).sum(1)
    stds = (shares * (values - means[:, None]) ** 2).sum(1).sqrt()
    return means.tolist(), stds.tolist()


def save_picture(path: Path, split: Split, seed: int) -> None:
    """Save a PNG of up to 64 training images, each beside its augmented version in an epoch, four times as large."""
    from PIL import Image
    from torchvision.utils import make_grid

    order, offsets, flips = (part[:64] for part in TrainLoader(split, 64, seed=seed)._plan(0))
    images = split.images[order]
    pairs = torch.stack([images, augment(images, offsets, flips)], 1).flatten(0, 1).permute(0, 3, 1, 2)
    sheet = make_grid(pairs, nrow=16, pad_value=255)  # (3, height, width)
    picture = Image.fromarray(sheet.permute(1, 2, 0).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy())
    atomic_write(path, lambda file: picture.save(file, format="PNG"))


def _print_report(data: Data) -> None:
    print(f"Data: {data.folder}")
    print("Checksums: all right, " + ("CIFAR-10" if data.official else f"by its own {SUMS}"))
    print(f"\n{'class':<12}{'train':>8}{'test':>8}")
    counts = [split.labels.bincount(minlength=len(CLASSES)).tolist() for split in (data.train, data.test)]
    for name, train, test in zip(CLASSES, *counts, strict=True):
        print(f"{name:<12}{train:>8,}{test:>8,}")
    print(f"{'all':<12}{len(data.train):>8,}{len(data.test):>8,}")
    print(f"\n{'channel':<10}{'mean':>8}{'used':>9}{'std':>10}{'used':>9}")
    means, stds = channel_statistics(data.train.images)
    for name, mean, used_mean, std, used_std in zip(("red", "green", "blue"), means, MEAN, stds, STD, strict=True):
        print(f"{name:<10}{mean:>8.4f}{used_mean:>9.4f}{std:>10.4f}{used_std:>9.4f}")


def main() -> None:
    parser = cli.ArgumentParser("Find or download CIFAR-10, verify it, print its statistics, draw a batch.")
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
