"""What all tests share: the import path, small data, scripts run as processes with no way to the network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The tests run in as many processes as there are cores (pytest-xdist): one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import data_files  # noqa: E402 - needs the path
import runs  # noqa: E402
import script_server  # noqa: E402
import torch  # noqa: E402

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full` in their long form")
    parser.addoption(
        "--need-real-data", action="store_true", help="fail where CIFAR-10 is missing instead of skipping"
    )


STARTS_PROCESSES = {
    "scripts",
    "run_script",
    "child_environment",
}  # fixtures: who uses one of them, or a fixture of it


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="the long form: run with --full"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
        slow = any(item.get_closest_marker(name) for name in ("cuda", "full", "real_data", "slow"))
        if not slow and not STARTS_PROCESSES & set(item.fixturenames):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `-m quick` a test that starts a process after all fails: it is to be marked `slow`."""
    if request.config.getoption("markexpr") == "quick":

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("a quick test starts no process: mark it slow")

        monkeypatch.setattr("os.fork", refuse)
        monkeypatch.setattr("subprocess.Popen.__init__", refuse)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --data-dir: 250 training images (50 a file) and 100 test images, binary format."""
    return data_files.write_binary(tmp_path_factory.mktemp("small") / "cifar-10-batches-bin").parent


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """A folder for --data-dir that holds CIFAR-10 itself."""
    without = pytest.fail if request.config.getoption("--need-real-data") else pytest.skip
    folder = Path(os.environ.get("CIFAR10_DIR") or ROOT / "data").resolve()
    names = (
        "cifar-10-batches-bin/test_batch.bin",
        "cifar-10-batches-py/test_batch",
        "test_batch.bin",
        "test_batch",
    )
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        without(f"no CIFAR-10 in {folder}: set CIFAR10_DIR or run python3 cifar10.py")
    if (path.parent / "SHA256SUMS").exists():
        without(f"{path.parent} is not CIFAR-10")
    return folder


def offline_environment() -> dict[str, str]:
    """The environment of child processes: one thread, and every way to the network leads to a closed port."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONIOENCODING": "utf-8",
        "npm_config_offline": "true",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment[name] = "http://127.0.0.1:9"
    # The tests say themselves what they want of these.
    for name in ("CIFAR10_DIR", "WANDB_MODE", "WANDB_API_KEY", "COLUMNS"):
        environment.pop(name, None)
    return environment


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_script("main.py", "--epochs", 1, cwd=folder): the script run by this Python; the finished process.

    check: fail the test, showing what the script wrote, unless it exits 0. env: added to the environment.
    """

    def run(
        script: str,
        *arguments: object,
        cwd: Path,
        check: bool = True,
        env: dict[str, str] | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=cwd,
            env=offline_environment() | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
        )
        if check and done.returncode:
            pytest.fail(f"{script} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done

    return run


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """For tests that start processes themselves."""
    return offline_environment()


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[script_server.ScriptServer]:
    """Training scripts as processes without the time of their imports, and with no way to the network."""
    server = script_server.ScriptServer(offline_environment(), tmp_path_factory.mktemp("scripts"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(
    scripts: script_server.ScriptServer, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """finished("main.py"): the folder of a small run of that script, not to be written to.

    What the run printed is in the file beside it whose name ends in "-output".
    """
    made: dict[str, Path] = {}

    def make(script: str) -> Path:
        if script not in made:
            folder = tmp_path_factory.mktemp("finished")
            child = scripts.run(script, *runs.small_options(small_data), cwd=folder)
            assert child.errors == ""
            Path(f"{folder}-output").write_text(child.output)
            made[script] = folder
        return made[script]

    return make


@pytest.fixture
def float_run(finished: Callable[[str], Path]) -> Path:
    """The folder of a finished run of main.py. Not to be written to."""
    return finished("main.py")


@pytest.fixture
def binary_run(finished: Callable[[str], Path]) -> Path:
    """The folder of a finished run of main_binary.py. Not to be written to."""
    return finished("main_binary.py")
