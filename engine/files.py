"""Files that survive a kill: atomic writes, previous runs archived, a folder lock that dies with its process."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from engine.cli import UserError, reason

_TEMPORARY = ".tmp-"
_STALE_SECONDS = 3600


def atomic_write(path: Path, write: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write `path` so that whoever looks, and whenever we are killed, sees the old file or the new one.

    write: the content, or a function that writes it to an open binary file.
    Raises UserError naming the file where it cannot be written; the old file then still stands.
    """
    remove_leftovers(path.parent, [path.name], sole_writer=False)
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{uuid.uuid4().hex[:8]}")  # does not end in .pth
    try:
        with open(temporary, "xb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the file that was there is untouched" if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {reason(error)}{kept}") from error
    finally:
        with contextlib.suppress(OSError):  # mostly because it has its new name
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be opened (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, names: Iterable[str], *, sole_writer: bool) -> None:
    """Delete what killed writers of `names` left behind in `folder`.

    sole_writer: no other process writes these names (the folder lock is held), so every leftover is dead;
    otherwise only those of an hour ago and older go.
    """
    for name in names:
        for path in folder.glob(f"{glob.escape(name)}{_TEMPORARY}*"):
            with contextlib.suppress(OSError):  # another process was faster, or it is not ours to delete
                if sole_writer or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def keep_source(source: Path, path: Path) -> None:
    """Raises UserError where `path`, which is to be written, is the file that it is made from."""
    if path.exists() and path.samefile(source):
        raise UserError(f"{source}: is the name of the file that is to be made; rename it or give another place")


def archive(folder: Path, names: Iterable[str]) -> Path | None:
    """Move the files of `names` that exist into one new folder `previous-N`; return it, or None if none exists.

    A kill on the way leaves each file in one of the two places. Raises UserError where they cannot be moved.
    """
    present = [name for name in names if os.path.lexists(folder / name)]
    if not present:
        return None
    target = next(path for n in itertools.count(1) if not os.path.lexists(path := folder / f"previous-{n}"))
    try:
        target.mkdir()
        for name in present:
            os.replace(folder / name, target / name)
    except OSError as error:
        raise UserError(f"{folder}: its files cannot be moved to {target}: {reason(error)}") from error
    return target


class FolderLock(contextlib.AbstractContextManager):
    """One training run a folder. The operating system drops the lock when the process dies, however it dies.

    Raises UserError naming the process that holds the folder.
    """

    NAME = ".run.lock"

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.NAME
        try:
            self._file = open(self.path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - for the whole run
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened: {reason(error)}") from error
        if not try_lock(self._file):
            self._file.seek(1)
            holder = self._file.read(1000).strip() or "holder unknown"
            self._file.close()
            raise UserError(
                f"{folder}: another run is using this folder ({holder}); give this one its own --output-dir"
            )
        self.check()
        self._file.truncate(0)
        since, command = time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv)
        # The first byte is the one that is locked: on Windows nobody else can read it.
        self._file.write(f"\nprocess {os.getpid()} on {socket.gethostname()} since {since}: {command}")
        self._file.flush()

    def check(self) -> None:
        """Raises UserError where the folder's lock is another than ours: what is in that folder is not this run's."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        raise UserError(
            f"{self.path.parent}: was removed, renamed or replaced while this run wrote to it; "
            "where its checkpoint_last.pth still exists, go on with --resume there"
        )

    def __exit__(self, *_: object) -> None:
        self._file.close()


def try_lock(file: IO[str]) -> bool:
    """Lock the first byte of `file` without waiting; False where another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # PermissionError on Windows
        return False
    return True
