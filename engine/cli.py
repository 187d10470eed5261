"""What every script's command line shares: options, one-line errors, the device, plain terminals.

Exit statuses: 0 done, 2 a mistake that one line explains, 130 Ctrl-C, 141 nobody reads the output, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import math
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

_LONGEST_MESSAGE = 2000


class UserError(Exception):
    """A wrong option, file or state of the machine: reported on one line, exit status 2, no traceback."""


class Interrupted(BaseException):
    """A signal asked the process to end. Derives from BaseException so that no `except Exception` eats it."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_status = 128 + signum
        self.message = "Terminated." if signum == signal.SIGTERM else "Interrupted."


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Each option with its default; None, booleans and flags carry theirs in their own words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action.default, bool) or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and that knows `--debug`."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def number(
    minimum: float, *, above: bool = False, maximum: float = math.inf, kind: type = float
) -> Callable[[str], Any]:
    """An argparse type: a finite number of at least `minimum` (strictly above it with `above`)."""
    bounds = f"{'above' if above else 'at least'} {minimum:g}"
    bounds += f" and at most {maximum:.15g}" if maximum < math.inf else ""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' * (kind is int)} number") from None
        if not minimum <= value <= maximum or value == math.inf or (above and value == minimum):
            raise argparse.ArgumentTypeError(f"{text} does not fit: {bounds} is needed")
        return value

    return parse


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `minimum` and at most `maximum`."""
    return number(minimum, maximum=maximum, kind=int)


def add_data_options(parser: ArgumentParser, *, batch_size: int) -> None:
    """The options of every script that touches the data: --data-dir --device --threads --batch-size."""
    group = parser.add_argument_group("data and device")
    add_data_dir_option(group)
    group.add_argument("--batch-size", type=integer(1), default=batch_size, help="images per batch")
    group.add_argument("--limit-test", type=integer(1), metavar="N", help="score the first N test images only")
    add_device_options(group)


def add_checkpoint_options(parser: ArgumentParser, default: str, help: str) -> None:
    """The checkpoint that a script reads, CKPT, and --weights-key."""
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(default), metavar="CKPT", help=help)
    parser.add_argument(
        "--weights-key", metavar="NAME", help="the entry of the file that holds the weights, where several could"
    )


def add_normalization_options(parser: ArgumentParser) -> None:
    """--mean and --std, three numbers each: see engine/normalization.py."""
    group = parser.add_argument_group("normalization, for networks trained elsewhere (the scale where 255 is 1)")
    channels = {"nargs": 3, "metavar": ("R", "G", "B")}
    group.add_argument("--mean", type=number(0, maximum=1), help="default: the training set's", **channels)
    group.add_argument("--std", type=number(0, above=True, maximum=1), help="default: the training set's", **channels)


def add_data_dir_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("CIFAR10_DIR") or "./data"),
        help="folder of CIFAR-10; downloaded there if missing (default: $CIFAR10_DIR, else ./data)",
    )


def add_device_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: torch's choice)")


def add_output_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("."),
        help="folder for what the script writes, created if missing (default: the working directory)",
    )


def select_device(name: str, threads: int | None = None) -> torch.device:
    """The torch device of `--device`, with `--threads` applied, on which float32 is float32.

    Raises UserError for a device that this machine or this torch does not have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default there are products of 10 bits
    torch.backends.cudnn.deterministic = True  # else no run could be repeated bit for bit
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch finds no Metal device; use --device cpu")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # its generator is then the one that is saved and restored
    return device


def prepare_output_dir(folder: Path, option: str = "--output-dir") -> Path:
    """Create `folder` if missing and prove that it can be written to.

    option: the one that names the folder. Raises UserError, before any long work, if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "is not a folder" if isinstance(error, FileExistsError) else reason(error)
        raise UserError(f"{option} {folder}: cannot be written to: {why}") from error
    return folder


def as_typed(value: object) -> str:
    """A path or another value as it is typed into a shell: in quotes where it is more than the plainest letters."""
    return str(value) if re.fullmatch(r"[A-Za-z0-9_./:\\+-]+", str(value)) else f'"{value}"'


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_PLAIN = {"✓": "[ok]", "⚠": "[!]", "✗": "[x]"}


def _degrade(error: UnicodeError) -> tuple[str, int]:
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


def use_plain_text_where_needed() -> None:
    """Let check marks become `[ok]` and the like on a terminal or pipe that cannot encode them.

    Where a stream is closed (`>&-`), what is written to it goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end of the process
    codecs.register_error("degrade", _degrade)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="degrade")


def fail(message: str) -> int:
    """Print `message` as exactly one line on stderr; return the exit status.

    It may quote what a file says of itself: control characters become `?`, and what is too long loses its middle.
    """
    line = " ".join(part.strip() for part in message.splitlines())
    line = "".join(char if char.isprintable() else "?" for char in line)
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[: _LONGEST_MESSAGE // 2]} ... {line[-_LONGEST_MESSAGE // 4 :]}"
    print(f"Error: {line}", file=sys.stderr, flush=True)
    return 2


def _stop(signum: int, _frame: object) -> None:
    raise Interrupted(signum)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says so in a RuntimeError, of a type of its own only for CUDA."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("allocate memory", "tried to allocate"))


def run(main: Callable[[], None]) -> None:
    """Run a script's main function and turn its errors into one line and an exit status."""
    use_plain_text_where_needed()
    tqdm.monitor_interval = 0  # its thread is not needed, and where memory is short it cannot start and warns
    for number in (signal.SIGINT, signal.SIGTERM):  # as exceptions, so that what must be cleaned up is
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for Ctrl-C in a job that nohup started
            signal.signal(number, _stop)
    try:
        try:
            main()
            sys.stdout.flush()
        finally:  # the process ends with its own status: another signal would only add a traceback
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
    except Interrupted as stop:
        if stop.message:
            print(stop.message, file=sys.stderr, flush=True)
        sys.exit(stop.exit_status)
    except BrokenPipeError:
        # The reader (`| head`) is gone: nothing is left to say; stop the interpreter's own flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # what a shell shows of a program that SIGPIPE has ended
    except Exception as error:
        if isinstance(error, UserError):
            message = str(error)
        elif is_out_of_memory(error):
            message = "out of memory; close other programs or, where the script has it, use a smaller --batch-size"
        elif isinstance(error, OSError):
            message = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
            message += "; free some space and run again" if error.errno == errno.ENOSPC else ""
        else:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        sys.exit(fail(message))
