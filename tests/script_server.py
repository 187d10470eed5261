"""Training scripts in processes that start within milliseconds: forked from one process that has imported torch.

Each is a real process: own working directory, environment and output, own signals, killed as any other. What it lacks
is the time of the imports. A test can also name a moment at which the process sends itself a signal:

    at=("replace", 3, "SIGKILL")       at its 3rd file operation of that kind, just before it is done
    at=("half-written", 1, "SIGKILL")  with the first half of a file written
    at=("step", 6, "SIGINT")           in its 6th training step, before the backward pass: see MOMENTS
    at=("cifar10.load", 1, "SIGINT")   when the function of that name is called for the first time

or, with the name of an errno in the place of the signal's, at which an operation fails; or with "5000 bytes", at
which the process takes so much memory more.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = {"step": "torch.Tensor.backward", "scoring": "torch.bincount"}  # by what names of torch they are known
IMPORTED_LATE = ("matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo")


class Child:
    """One script that the server has started."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder
        self.ended = threading.Event()
        self.status = 0

    def wait(self, timeout: float = 400) -> int:
        """The exit status, as subprocess gives it: -9 for a process that SIGKILL has ended."""
        if not self.ended.wait(timeout):
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout} s\n{self.output}\n{self.errors}")
        return self.status

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def limit(self, *, cpu_seconds: int) -> None:
        """End the process by SIGXCPU after so much work (Linux)."""
        import resource

        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))

    def wait_until(self, condition: Callable[[], Any], timeout: float = 400) -> bool:
        """Look every half millisecond; False where the process has ended before the condition was met."""
        limit = time.monotonic() + timeout
        while not condition():
            if self.ended.is_set():
                return bool(condition())
            assert time.monotonic() < limit, f"it did not come about in {timeout} s"
            time.sleep(0.0005)
        return True


class ScriptServer:
    """The parent of the processes; as a context manager it ends with the test session."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._children: dict[int, Child] = {}
        self._replies: list[int] = []
        self._replied = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            with self._replied:
                child = self._children.setdefault(message["pid"], Child(message["pid"], Path(message["folder"])))
                if "status" in message:
                    del self._children[child.pid]
                    child.status = message["status"]
                    child.ended.set()
                else:
                    self._replies.append(child)
                    self._replied.notify()

    def start(
        self,
        script: str,
        *arguments: object,
        cwd: Path,
        env: dict[str, str] | None = None,
        at: tuple[str, int, str] | None = None,
    ) -> Child:
        """Start `script`, the name of a file such as "main.py", with these arguments."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {
            "script": script,
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "env": env or {},
            "at": at,
            "folder": str(folder),
        }
        with self._replied:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            assert self._replied.wait_for(lambda: self._replies, 400), "the server does not answer"
            return self._replies.pop()

    def run(self, script: str, *arguments: object, timeout: float = 400, expect: int = 0, **more: Any) -> Child:
        """Start it and wait for its end, with the exit status that is expected."""
        child = self.start(script, *arguments, **more)
        status = child.wait(timeout)
        assert status == expect, f"exit status {status}\n{child.output}\n{child.errors}"
        return child

    def limit(self, *, memory: int) -> None:
        """From now on a process may take so many bytes of memory more than the server has (Linux)."""
        import resource

        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, (most, most))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    for name in (*(path.stem for path in sorted(ROOT.glob("*.py"))), *IMPORTED_LATE):
        importlib.import_module(name)
    folders: dict[int, str] = {}
    open_ended = True
    while open_ended or folders:
        ready = select.select([0] if open_ended else [], [], [], 0.005)[0]
        if ready:
            line = _read_line()
            if line:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become(request)
                folders[pid] = request["folder"]
                _tell(pid=pid, folder=request["folder"])
            else:
                open_ended = False
                for pid in folders:
                    os.kill(pid, signal.SIGKILL)
        while folders:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _tell(pid=pid, folder=folders.pop(pid), status=os.waitstatus_to_exitcode(status))


def _read_line() -> bytes:
    """A line from descriptor 0, unbuffered: `select` must see what is left."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _tell(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _become(request: dict[str, Any]) -> None:
    """In the forked process: be the script, and never return."""
    status = 1
    try:
        folder = Path(request["folder"])
        for number, name, mode in ((0, os.devnull, "r"), (1, folder / "stdout", "w"), (2, folder / "stderr", "w")):
            with open(name, mode) as file:
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - to the end of the process
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = [str(ROOT / request["script"]), *request["arguments"]]
        if request["at"]:
            _arm(*request["at"])
        from engine import cli

        cli.run(sys.modules[Path(request["script"]).stem].main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arm(moment: str, number: int, name: str) -> None:
    """At a moment's `number`-th occurrence send this process the signal `name`, raise that error, or take memory."""
    left = number
    taken: list[bytearray] = []

    def occurred() -> None:
        nonlocal left
        left -= 1
        if left == 0 and name.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, name))
        elif left == 0 and name.endswith(" bytes"):
            taken.append(bytearray(int(name.split()[0])))
        elif left == 0:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            occurred()
            return function(*args, **kwargs)

        return replacement

    if moment in FILE_OPERATIONS:
        for operation in FILE_OPERATIONS if moment == "file operation" else (moment,):
            if operation == "half-written":
                builtins.open = _opening_half_written(builtins.open, occurred)
            elif operation != "file operation":
                setattr(os, operation, before(getattr(os, operation)))
        return
    owner, attribute = _resolve(MOMENTS.get(moment, moment))
    original = getattr(owner, attribute)
    replacement = before(original)
    setattr(owner, attribute, replacement)
    for other in list(sys.modules.values()):  # where it was imported by name
        if getattr(other, attribute, None) is original:
            setattr(other, attribute, replacement)


def _resolve(name: str) -> tuple[Any, str]:
    """ "engine.training.loop.Trainer.finish" -> the class and "finish"."""
    *path, attribute = name.split(".")
    for length in range(len(path), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            owner = importlib.import_module(".".join(path[:length]))
            for part in path[length:]:
                owner = getattr(owner, part)
            return owner, attribute
    raise ValueError(name)


FILE_OPERATIONS = ("file operation", "half-written", "replace", "fsync", "rename", "mkdir", "unlink", "rmdir")


def _opening_half_written(original: Callable[..., Any], occurred: Callable[[], None]) -> Callable[..., Any]:
    def replacement(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = original(file, mode, *args, **kwargs)
        if mode not in ("xb", "wb"):
            return opened
        write = opened.write

        class Halfway:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(opened, name)

            def write(self, content: bytes) -> int:
                half = len(content) // 2
                write(content[:half])
                opened.flush()
                occurred()
                return half + write(content[half:])

        return Halfway()

    return replacement


if __name__ == "__main__":
    _serve()
