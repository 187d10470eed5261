"""metrics.csv, training_curves.png, and Weights & Biases, whose absence or trouble must not harm a run."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import small_options
from script_server import Child, ScriptServer

from engine.checkpoints import LAST
from engine.cli import as_typed
from engine.training import tracking

ROOT = Path(__file__).resolve().parent.parent

KEY = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}


# -- files -------------------------------------------------------------------------------------------------------


def row(epoch: int, **more: float) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 2 / epoch, "test_accuracy": 10.0 * epoch, "lr": 0.1 / epoch} | more


def test_metrics_are_a_line_an_epoch(tmp_path: Path) -> None:
    tracking.write_metrics(tmp_path, [row(1), row(2, flipped=0.123456789)])
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["epoch"] for line in rows] == ["1", "2"]
    assert rows[0]["flipped"] == ""
    assert float(rows[1]["flipped"]) == pytest.approx(0.123456789, rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 6, 150])
@pytest.mark.parametrize("binary", [True, False])
def test_curves_show_every_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, binary: bool
) -> None:
    """Also in epochs in which nothing flips and the learning rate is 0, where a logarithm has no value."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    more = {"flipped": 0.0, "saturated": 3.0, "latent_lr": 0.01} if binary else {}
    history = [row(epoch, **more) for epoch in range(1, epochs + 1)]
    history[-1]["lr"] = 0.0
    if binary:
        history[-1]["latent_lr"] = 1e-17  # where --latent-decay-power may take it
    tracking.draw_curves(tmp_path, history, "title")
    image = (tmp_path / "training_curves.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert 600 < width < 2000
    assert 300 < height < 1000
    labels = {text.get_text() for axes in figures[0].axes for text in axes.get_legend().get_texts()}
    wanted = {"train loss", f"test accuracy (best {10.0 * epochs:.2f})", "lr"}
    assert labels == wanted | ({"flipped", "saturated", "latent lr"} if binary else set())
    for axes in figures[0].axes:
        lowest, highest = axes.get_ylim()
        assert all(lowest <= y <= highest for line in axes.lines for y in line.get_ydata())


# -- Weights & Biases --------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Callable[[str], dict[str, str]]]:
    """server(kind): a server on this machine that does harm in one way; the environment that leads wandb to it."""
    sockets: list[socket.socket] = []

    def serve(listening: socket.socket, kind: str) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            sockets.append(connection)
            if kind != "hang":
                connection.recv(65536)
                error = b"HTTP/1.1 500 Trouble\r\nContent-Length: 0\r\n\r\n"
                connection.sendall(error if kind == "error" else b"\x00\xff rubbish " * 99)
                connection.close()

    def start(kind: str) -> dict[str, str]:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        if kind == "refuse":
            listening.close()
        else:
            sockets.append(listening)
            threading.Thread(target=serve, args=(listening, kind), daemon=True).start()
        return KEY | {"WANDB_BASE_URL": f"http://127.0.0.1:{port}"}

    yield start
    for opened in sockets:
        opened.close()


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """An environment by which the processes of a test are known; at its end none of them may be left."""
    mark = uuid.uuid4().hex
    yield {"TEST_MARK": mark}
    limit = time.monotonic() + 30
    while left := _processes_with(mark):
        assert time.monotonic() < limit, f"left running: {left}"
        time.sleep(0.1)


def _processes_with(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended
    return found


def one_epoch(scripts: ScriptServer, data: Path, folder: Path, env: dict[str, str], *more: object) -> Child:
    options = small_options(data, epochs=1)
    options[options.index("disabled")] = "auto"
    child = scripts.run("main.py", *options, *more, cwd=folder, env=env)
    assert child.errors == ""
    return child


def notices(child: Child) -> list[str]:
    return [line for line in child.output.splitlines() if "Weights & Biases" in line]


def test_without_a_key_the_run_is_tracked_offline(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, marked: dict[str, str]
) -> None:
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    out = tmp_path / "with space"
    child = one_epoch(scripts, small_data, tmp_path, marked | home, "--output-dir", out)
    command = f'wandb sync "{out}/wandb"/offline-run-*'
    assert notices(child) == [f"Weights & Biases: offline; to upload it later: {command}"]
    (log,) = out.glob("wandb/offline-run-*/*.wandb")
    assert b"train_accuracy" in log.read_bytes()  # it holds the epoch's numbers
    assert not (tmp_path / "wandb").exists()
    wandb_id = re.search(r"run-(\w+)\.wandb", log.name)[1]
    import torch

    assert torch.load(out / LAST, weights_only=True)["training"]["wandb_id"] == wandb_id


LONG_FORM = [pytest.param(kind, marks=pytest.mark.full) for kind in ("error", "rubbish")]


@pytest.mark.parametrize("kind", ["hang", "refuse", *LONG_FORM])
def test_a_server_in_trouble_costs_seconds_and_no_numbers(
    scripts: ScriptServer,
    small_data: Path,
    tmp_path: Path,
    server: Callable[[str], dict[str, str]],
    marked: dict[str, str],
    kind: str,
) -> None:
    started = time.monotonic()
    child = one_epoch(scripts, small_data, tmp_path, server(kind) | marked)
    assert time.monotonic() - started < 90  # the epoch itself, on a busy machine, included
    first, second = notices(child)
    assert first.startswith("Weights & Biases could not be started online (")
    assert second.startswith("Weights & Biases: offline; ")
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train_accuracy" in log.read_bytes()


def test_what_a_wandb_that_hangs_costs(
    tmp_path: Path, marked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience at the start and at the end, and nothing in between."""
    assert tracking.START_PATIENCE <= 10
    assert tracking.END_PATIENCE <= 10
    monkeypatch.setattr(tracking, "START_PATIENCE", 2.0)
    (tmp_path / "wandb.py").write_text("import time\nSettings = dict\ndef init(**_): time.sleep(40)\n")
    for name, value in (marked | {"PYTHONPATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    started = time.monotonic()
    run = tracking.WandbRun("online", tmp_path, name="n", config={}, run_id="abc", say=said.append)
    assert time.monotonic() - started < 6
    assert os.getsid(run._process.pid) != os.getsid(0)  # Ctrl-C does not reach it
    started = time.monotonic()
    for epoch in range(1, 5000):  # more than a pipe holds
        run.log(row(epoch))
    assert time.monotonic() - started < 1
    run.finish(0, 2.0)
    assert time.monotonic() - started < 6
    assert said[0] == "Weights & Biases could not be started online (no answer within 2 s)."
    assert said[-1].startswith("Weights & Biases has not taken everything; to upload it later: wandb sync ")


def test_ctrl_c_while_it_starts(
    scripts: ScriptServer,
    small_data: Path,
    tmp_path: Path,
    server: Callable[[str], dict[str, str]],
    marked: dict[str, str],
) -> None:
    options = small_options(small_data, epochs=1)
    options[options.index("disabled")] = "online"
    at = ("queue.SimpleQueue", 2, "SIGINT")  # made as its process starts
    child = scripts.run("main.py", *options, cwd=tmp_path, env=server("hang") | marked, at=at, expect=130)
    script, data = as_typed(ROOT / "main.py"), as_typed(small_data)
    go_on = f"Go on with: python3 {script} --resume --data-dir {data} --wandb online"
    assert child.errors.splitlines()[-1].endswith(go_on)


def test_a_wandb_that_cannot_be_imported_costs_one_line(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, marked: dict[str, str]
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "wandb.py").write_text("raise ImportError('broken')")
    env = {"PYTHONPATH": str(tmp_path / "stub")} | marked
    child = one_epoch(scripts, small_data, tmp_path, env, "--wandb", "offline")
    assert [line for line in notices(child) if "offline;" not in line] == [
        "Weights & Biases was not used (ImportError)."
    ]


def test_without_wandb_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    run = tracking.WandbRun("auto", tmp_path, name="n", config={}, run_id="abc", say=said.append)
    run.log(row(1))
    run.finish(0, 1)
    assert said == ["Weights & Biases is not installed; the run goes on without it."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, ["offline"]),
        ("auto", KEY, ["online"]),
        ("auto", KEY | {"WANDB_MODE": "offline"}, ["offline"]),
        ("auto", {"WANDB_MODE": "disabled"}, []),
        ("auto", {"WANDB_MODE": "nonsense"}, ["offline"]),
        ("online", {"WANDB_MODE": "disabled"}, ["online"]),
        ("disabled", KEY, []),
    ],
)
def test_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, environment: dict[str, str], expected: list[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    begun: list[str] = []
    monkeypatch.setattr(tracking.WandbRun, "_begin", lambda self, mode: begun.append(mode))
    tracking.WandbRun(mode, tmp_path, name="n", config={}, run_id="abc", say=lambda _: None)
    assert begun == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("machine api.wandb.ai login user password k", True),
        ("machine elsewhere login user password k", False),
        ("nonsense", False),
    ],
)
def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: bool) -> None:
    for name in ("NETRC", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".netrc"
    path.write_text(content)
    path.chmod(0o600)
    assert tracking._has_api_key() is expected
    monkeypatch.setenv("NETRC", str(path.rename(tmp_path / "mine")))
    assert tracking._has_api_key() is expected


def test_the_process_of_wandb_ends_with_the_training(tmp_path: Path, marked: dict[str, str]) -> None:
    """It sees the end of its input, also when the training was killed and has said nothing."""
    import subprocess
    import sys

    process = subprocess.Popen(
        [sys.executable, str(Path(tracking.__file__).with_name("wandb_process.py"))],
        env=os.environ | marked,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    about = {"project": "p", "dir": str(tmp_path), "mode": "offline", "id": "x", "patience": 8, "program": "main.py"}
    process.stdin.write(json.dumps(about) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"url": None}
    process.stdin.close()
    process.wait(60)
