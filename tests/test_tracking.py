"""metrics.csv, training_curves.png, and Weights & Biases, whose absence or failure must not affect a run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_options
from script_server import ScriptServer

from engine.checkpoints import LAST
from engine.training import wandb_run
from engine.training.curves import draw_curves
from engine.training.tracking import FlipRateMeter, write_metrics
from models import BC

# -- numbers and files -------------------------------------------------------------------------------------------


def row(epoch: int, **more: float) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 2 / epoch, "test_accuracy": 50 - 10.0 / epoch, "lr": 0.1 / epoch} | more


def test_metrics_are_a_line_an_epoch(tmp_path: Path) -> None:
    write_metrics(tmp_path, [row(1), row(2, flipped=0.123456789)])
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["epoch"] for line in rows] == ["1", "2"]
    assert rows[0]["flipped"] == ""
    assert float(rows[1]["flipped"]) == pytest.approx(0.123456789, rel=1e-5)


def test_flip_rate_and_saturation() -> None:
    bc = BC(torch.nn.Linear(4, 1, bias=False))
    (weight,) = bc.targets()
    weight.data = torch.tensor([[0.5, -0.5, 0.0, 1.0]])
    meter = FlipRateMeter(bc)
    meter.begin()
    weight.data = torch.tensor([[-1.0, -0.2, -0.0, 1.0]])
    assert meter.end() == {"flipped": 25, "saturated": 50}
    with bc.binarized():  # the latent weights count, whatever the network holds at the moment
        assert meter.end() == {"flipped": 25, "saturated": 50}


@pytest.mark.parametrize("epochs", [1, 2, 150])
@pytest.mark.parametrize("binary", [True, False])
def test_curves_show_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, binary: bool) -> None:
    """Zeros as well, which a logarithmic axis cannot show; and the legends cover none of them."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    history = [row(epoch) for epoch in range(1, epochs + 1)]
    for number, line in enumerate(history if binary else []):
        line |= {"flipped": 0.0, "latent_lr": 0.01, "saturated": 0.0 if number < 3 else 1e-4 * number**2}
    history[-1]["lr"] = 0.0
    draw_curves(tmp_path, history, "title")
    width, height = struct.unpack(">II", (tmp_path / "training_curves.png").read_bytes()[16:24])
    assert 600 < width < 2000 > 2 * height > 600
    drawn = set()
    for axes in figures[0].axes:
        legend = axes.get_legend()
        labels = [text.get_text() for text in legend.get_texts()]
        drawn |= set(labels)
        assert not legend.get_window_extent().overlaps(axes.get_window_extent().padded(-1))
        (lowest, highest), (left, right) = axes.get_ylim(), axes.get_xlim()
        for line in axes.lines:
            assert line.get_label() not in labels or len(line.get_xdata()) == epochs
            assert all(left < x < right for x in line.get_xdata())
            assert all(lowest < y < highest for y in line.get_ydata())
        assert [tick for tick in axes.get_xticks() if left < tick < right and tick == int(tick)]
        ticks = {label.get_text() for label in axes.get_yticklabels() if lowest < label.get_position()[1] < highest}
        assert len(ticks - {""}) >= 2
    names = {"train loss", "lr"} | ({"flipped", "saturated", "latent lr"} if binary else set())
    assert drawn == names | {f"test accuracy (best {history[-1]['test_accuracy']:.2f})"}
    assert figures[0].get_facecolor() == (1, 1, 1, 1)


# -- Weights & Biases --------------------------------------------------------------------------------------------


def read_run(path: Path) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The id, the rows and the summary in a .wandb file, which has the form of LevelDB's log: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content = path.read_bytes(), 7, b""
    run_id, rows, summary = "", [], {}
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, content = Record.FromString(content), b""
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                rows.append({".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            for item in record.summary.update:
                summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return run_id, rows, summary


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An environment without an API key, by which processes are known; at the test's end none of them may be left."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    environment = {"TEST_MARK": uuid.uuid4().hex, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield environment
    wait_for_processes_with(environment["TEST_MARK"])


def wait_for_processes_with(mark: str) -> None:
    """Wait until no process has this in its environment, at three looks in a row: none is seen while it execs."""
    limit = time.monotonic() + 30
    looks = 0
    while looks < 3:
        looks += 1
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended
                if mark.encode() in path.read_bytes():
                    assert time.monotonic() < limit, f"left running: {(path.parent / 'cmdline').read_bytes()}"
                    looks = 0
        time.sleep(0.1)


@pytest.fixture
def train(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, marked: dict[str, str]
) -> Callable[..., tuple[str, list[Path]]]:
    """train(*options): main_binary.py for two epochs; what it said of Weights & Biases, and the .wandb files."""

    def run(*options: Any, env: dict[str, str] | None = None, **how: Any) -> tuple[str, list[Path]]:
        if "--resume" not in options:
            options = (*small_options(small_data, epochs=2), *options)
        options = (*options, "--wandb", "auto", "--data-dir", small_data)
        child = scripts.run("main_binary.py", *options, cwd=tmp_path, env=marked | (env or {}), **how)
        assert how or child.errors == ""
        lines = [line for line in child.output.splitlines() if line.startswith("Weights & Biases: ")]
        return "\n".join(lines).removeprefix("Weights & Biases: "), sorted(tmp_path.rglob("*.wandb"))

    return run


def begin(folder: Path, said: list[str], mode: str = "auto") -> wandb_run.WandbRun:
    return wandb_run.WandbRun(mode, folder, 12, said.append, name="n", config={"a": 1}, id="abc")


@pytest.mark.slow
def test_rows_histograms_and_summary(tmp_path: Path, marked: dict[str, str]) -> None:
    said: list[str] = []
    run = begin(tmp_path, said, "offline")
    for epoch in range(1, 13):
        run.log(row(epoch), lambda: torch.tensor([-1.0, 0.1, 0.1, 1.0]))
    run.finish(0, {"best_test_accuracy": 49.5, "one_bit_bytes": 33542})
    assert said == []
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run_id, rows, summary = read_run(path)
    assert run_id == "abc"
    assert [line["train_loss"] for line in rows] == [2 / epoch for epoch in range(1, 13)]
    assert [line["epoch"] for line in rows if "latent_weights.values" in line] == [10, 12]
    assert rows[9]["latent_weights.bins"] == [-1 + number / 32 for number in range(65)]
    counts = enumerate(rows[9]["latent_weights.values"])
    assert {number: count for number, count in counts if count} == {0: 1, 35: 2, 63: 1}
    assert summary["best_test_accuracy"] == 49.5
    assert summary["one_bit_bytes"] == 33542
    assert not list(tmp_path.glob("wandb/feed*"))


def test_without_a_key_a_run_is_offline_and_resumes_as_the_same(tmp_path: Path, train: Callable) -> None:
    out = tmp_path / "with space"
    notice, _ = train("--output-dir", out, at=("torch.bincount", 2, "SIGTERM"), expect=143)
    assert notice.startswith("offline (")
    assert notice.endswith(f'; to upload it later: wandb sync "{out}/wandb"/offline-run-*')
    _, paths = train("--resume", "--output-dir", out)
    run_id = torch.load(out / LAST, weights_only=True)["training"]["wandb_id"]
    (first_id, first, _), (second_id, second, summary) = map(read_run, paths)
    assert first_id == second_id == run_id
    assert [line["epoch"] for line in first + second] == [1, 2]
    assert sum(second[0]["latent_weights.values"]) == 268_336
    assert summary["final_test_accuracy"] == second[0]["test_accuracy"] <= summary["best_test_accuracy"]
    assert summary["one_bit_bytes"] == 33_542


def test_a_killed_run_is_in_its_file(tmp_path: Path, train: Callable, marked: dict[str, str]) -> None:
    train(at=("torch.bincount", 2, "SIGKILL"), expect=-signal.SIGKILL)
    wait_for_processes_with(marked["TEST_MARK"])
    (path,) = tmp_path.rglob("*.wandb")
    assert [line["epoch"] for line in read_run(path)[1]] == [1]


@pytest.mark.parametrize("kind", ["hang", "refuse"])
def test_a_server_in_trouble_costs_seconds_and_no_numbers(train: Callable, kind: str) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        host, port = server.getsockname()
        if kind == "refuse":
            server.close()
        notice, paths = train(env={"WANDB_API_KEY": 40 * "0", "WANDB_BASE_URL": f"http://{host}:{port}"})
    assert time.monotonic() - started < 90  # the epochs themselves, on a busy machine, included
    assert notice.startswith("offline (")
    assert "API key" not in notice
    assert [line["epoch"] for path in paths for line in read_run(path)[1]] == [1, 2]


@pytest.fixture
def stub(tmp_path: Path, marked: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """stub(code): wandb is now this code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return (tmp_path / "wandb.py").write_text


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_wandb_that_hangs_costs(
    tmp_path: Path, stub: Callable, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Its patience at the end, and nothing before; Ctrl-C ends the wait."""
    assert wandb_run.PATIENCE < 20
    monkeypatch.setattr(wandb_run, "PATIENCE", 60.0 if interrupted else 1.0)
    stub("import time\ndef init(**_): time.sleep(100)\n")
    said: list[str] = []
    started = time.monotonic()
    run = begin(tmp_path, said)
    assert os.getsid(run._process.pid) != os.getsid(0)  # Ctrl-C does not reach it
    for epoch in range(1, 2000):  # more than a pipe holds
        run.log(row(epoch))
    assert time.monotonic() - started < 2
    if interrupted:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            run.finish(0, {})
    else:
        run.finish(0, {})
        assert "wandb sync" in said[0]
    assert time.monotonic() - started < 8


FAKE = """
import os
class Run:
    url, summary = "https://example.org/run", {}
    def log(self, row, step): print("row", step, flush=True)
    def finish(self, exit_code): print("end", exit_code, self.summary, flush=True)
def init(**arguments):
    print(os.environ["WANDB_MODE"], flush=True)
    return Run()
"""
MODES = {  # option, WANDB_MODE: mode
    ("auto", ""): "online",
    ("auto", "offline"): "offline",
    ("online", "disabled"): "online",
    ("auto", "disabled"): None,
    ("disabled", "online"): None,
}


@pytest.mark.slow
@pytest.mark.parametrize("option", MODES)
def test_the_mode(
    option: tuple[str, str], tmp_path: Path, stub: Callable, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    stub(FAKE)
    monkeypatch.setenv("WANDB_MODE", option[1])
    run = begin(tmp_path, [], option[0])
    run.log(row(1))
    run.finish(3, {"best": 1})
    lines = [MODES[option], "Weights & Biases: https://example.org/run", "row 1", "end 3 {'best': 1}"]
    assert capfd.readouterr().out.splitlines() == (lines if MODES[option] else [])


@pytest.mark.slow
def test_a_wandb_that_cannot_be_used_costs_one_line(tmp_path: Path, stub: Callable, capfd: Any) -> None:
    stub("raise ImportError")
    said: list[str] = []
    begin(tmp_path, said).finish(0, {})
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "wandb").write_text("no folder")
    run = begin(tmp_path / "none", said)
    run.log(row(1))
    run.finish(0, {})
    assert len(capfd.readouterr().out.splitlines()) == len(said) == 1
