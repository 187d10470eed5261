"""What the scripts do on a CUDA device: training speed, exact resume, scores, and the tests marked `cuda`.

    python3 benchmarks/gpu.py              under eight minutes; needs requirements-dev.txt for the tests
    python3 benchmarks/gpu.py > gpu.md     the tables alone; progress and errors stay on the screen

Runs main.py, main_binary.py and the scripts that score, as processes in a temporary folder, and reads what they
write. A training that is still running when its share of the time is over is stopped; the epochs that it has finished
count. Exit status 0 where everything ran and every check held, else 1.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import cifar10  # noqa: E402 - needs the path
from engine import checkpoints, cli, runtime  # noqa: E402
from engine.checkpoints import BEST, FINAL, LAST  # noqa: E402

SECONDS = 460.0  # for everything; what has not run by then is reported as such
SHARE = {"eager": 50.0, "compiled": 70.0}  # seconds of one training whose speed is measured
EPOCHS = 5  # of such a training
FLAG = {"eager": "--no-compile", "compiled": "--compile"}
SCRIPTS = {"full precision": "main.py", "BinaryConnect": "main_binary.py"}
TIMES = ("seconds", "images_per_second")  # columns of metrics.csv in which equal runs differ
IMAGES_OFF = 2  # float32 sums are rounded differently on each machine, which may decide an image or two
LATE = "not run: out of time"


class Bench:
    """Runs commands in a temporary folder until the time is over. On the CPU it is a rehearsal: eager, one file."""

    def __init__(self, device: torch.device, data_dir: Path, test_images: int, folder: Path) -> None:
        self.device, self.folder, self.test_images = device, folder, test_images
        self.rehearsal = device.type == "cpu"
        self.modes = ("eager",) if self.rehearsal else ("eager", "compiled")
        self.data = ("--data-dir", data_dir.resolve())
        self.deadline = time.monotonic() + SECONDS
        self.failed = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start this Python with `command`; what it prints goes to the file "output": a pipe could fill up."""
        print(f"  {self.left():4.0f} s left: {' '.join(map(str, command))}", file=sys.stderr, flush=True)
        with open(self.folder / "output", "wb") as output:
            words = [sys.executable, *map(str, command)]
            return subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def run(self, *command: object, seconds: float = SECONDS) -> tuple[int | None, str]:
        """Exit status, None for a process that was stopped when its time was over, and all that it printed."""
        process = self.start(*command)
        try:
            process.wait(max(0.0, min(seconds, self.left())))
        except subprocess.TimeoutExpired:
            pass
        finally:
            status = process.poll()
            process.kill()
            process.wait()
        return status, (self.folder / "output").read_text(encoding="utf-8", errors="replace")

    def training(self, script: str, mode: str, output_dir: Path, *more: object) -> tuple[object, ...]:
        """The command of a training."""
        where = ("--device", self.device, "--output-dir", output_dir, *self.data)
        return (ROOT / script, *where, FLAG[mode], "--wandb", "disabled", *more)

    def fail(self, what: str) -> str:
        """Record a failure; returns `what`."""
        self.failed = True
        return what

    def broken(self, status: int | None, printed: str) -> str:
        """The failure of a command that was stopped or did not exit 0; everything it printed goes to the screen."""
        print(printed, file=sys.stderr, flush=True)
        last = (printed.strip().splitlines() or ["nothing printed"])[-1]
        return self.fail("out of time" if status is None else f"failed: {last}")


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, one an epoch."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def measure_speed(bench: Bench, script: str, mode: str) -> float | str:
    """Images/s of training: the median of the epochs after the first, which compiles; or what failed."""
    folder = bench.folder / f"speed-{script}-{mode}"
    status, printed = bench.run(*bench.training(script, mode, folder, "--epochs", EPOCHS), seconds=SHARE[mode])
    speeds = [float(row["images_per_second"]) for row in metrics(folder)]
    if status:
        return bench.broken(status, printed)
    if not speeds:
        return bench.fail("out of time in its first epoch")
    return statistics.median(speeds[1:] or speeds)


def differing(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, times apart: names of tensors, bit for bit, and of metrics."""
    found = []
    for name in (FINAL, BEST):
        mine, its = (torch.load(run / name, weights_only=True)["state_dict"] for run in (one, other))
        found += [f"{name}: {key}" for key in mine if not torch.equal(mine[key], its[key])]
    rows, its_rows = metrics(one), metrics(other)
    if len(rows) != len(its_rows):
        found.append("number of epochs")
    pairs = zip(rows, its_rows, strict=False)
    return found + [
        f"epoch {a['epoch']}: {key}" for a, b in pairs for key in a if a[key] != b[key] and key not in TIMES
    ]


def check_resume(bench: Bench, mode: str) -> str:
    """Whether a run that is killed after its first epoch and resumed equals one that is never stopped."""
    if bench.left() < 1:
        return bench.fail(LATE)
    whole, again, parts = (bench.folder / f"{name}-{mode}" for name in ("whole", "again", "parts"))
    few = ("--epochs", 4, "--limit-train", 5000, "--limit-test", 500, "--stochastic")
    status, printed = bench.run(*bench.training("main_binary.py", mode, whole, *few))
    if status != 0:
        return bench.broken(status, printed)
    killed = bench.start(*bench.training("main_binary.py", mode, parts, *few))
    try:
        while killed.poll() is None and bench.left() > 0 and not (parts / LAST).exists():
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.wait()
    if not (parts / LAST).exists() or (parts / FINAL).exists():
        return bench.fail("not tested: the run was not killed within its second epoch")
    status, printed = bench.run(*bench.training("main_binary.py", mode, parts, "--resume"))
    if status != 0:
        return bench.broken(status, printed)
    if not (different := differing(whole, parts)):
        return "yes"
    print("\n".join(different[:20]), file=sys.stderr)
    status, _ = bench.run(*bench.training("main_binary.py", mode, again, *few))  # is it the resuming?
    known = (
        ""
        if status != 0
        else f"; two runs that nothing stopped {'differ too' if differing(whole, again) else 'do not'}"
    )
    return bench.fail(f"no, {len(different)} tensors or metrics differ{known}")


def accuracy(bench: Bench, path: Path, device: object) -> float | str:
    """The accuracy of a checkpoint in percent as its script prints it, or what failed."""
    latent = checkpoints.load(path).kind == "latent"
    script = ("eval_binarized.py", "--output-dir", bench.folder) if latent else ("eval.py",)
    status, printed = bench.run(ROOT / script[0], path, *script[1:], *bench.data, "--device", device)
    found = re.search(r"^Test Accuracy: ([\d.]+)%$", printed, re.MULTILINE)
    return float(found[1]) if found and status == 0 else bench.broken(status, printed)


def compare_scores(bench: Bench, path: Path) -> str:
    """The accuracies of a shipped network on the device and on the CPU."""
    if bench.left() < 1:
        return bench.fail(LATE)
    here, on_cpu = (accuracy(bench, path, device) for device in (bench.device, "cpu"))
    if isinstance(here, str) or isinstance(on_cpu, str):
        return f"{here} / {on_cpu}"
    text = f"{here:.2f} / {on_cpu:.2f} %"
    images = round(abs(here - on_cpu) * bench.test_images / 100)
    return text if images <= IMAGES_OFF else bench.fail(f"{text}: {images} images apart")


def run_tests(bench: Bench) -> str:
    """The last line of pytest: how many tests passed."""
    if bench.left() < 1:
        return bench.fail(LATE)
    files = [ROOT / "tests" / "test_cuda.py"] if bench.rehearsal else [ROOT / "tests"]  # to collect all takes seconds
    command = ("-m", "pytest", "-m", "cuda", "-n", "0", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT)
    status, printed = bench.run(*command, "-c", ROOT / "pyproject.toml", *files)
    lines = printed.strip().splitlines() or ["nothing"]
    return lines[-1].strip("= ") if status == 0 else bench.broken(status, printed)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else runtime.describe(device)
    return f"{name}, torch {torch.__version__}, {runtime.choose_precision('auto', device)}"


def measure(bench: Bench) -> list[str]:
    """Run everything; the two tables in Markdown, line by line."""
    rows = []
    for mode in bench.modes:
        speeds = [measure_speed(bench, script, mode) for script in SCRIPTS.values()]
        cells = [speed if isinstance(speed, str) else f"{speed:,.0f}" for speed in speeds]
        ratio = "-" if any(isinstance(speed, str) for speed in speeds) else f"{speeds[1] / speeds[0]:.2f}"
        rows.append(f"| {mode} | {' | '.join(cells)} | {ratio} |")
    columns = f"{' | '.join(SCRIPTS)} | BinaryConnect / full precision"
    lines = [f"| {machine(bench.device)}; images/s in training | {columns} |", "|---|---|---|---|", *rows]
    lines += ["", "| check | result |", "|---|---|"]
    for mode in bench.modes:
        lines.append(
            f"| killed and resumed equals never stopped, bit for bit, {mode} | {check_resume(bench, mode)} |"
        )
    networks = sorted((ROOT / "pretrained").glob("*.pth"))
    for path in networks[:1] if bench.rehearsal else networks:
        lines.append(f"| {path.name}, accuracy on {bench.device.type} / cpu | {compare_scores(bench, path)} |")
    lines.append(f"| `python3 -m pytest -m cuda` | {run_tests(bench)} |")
    return lines


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        "Run training, resuming, scoring and the marked tests on a CUDA device; print tables."
    )
    cli.add_data_dir_option(parser)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: the rehearsal that the tests run
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise cli.UserError("benchmarks/gpu.py: torch finds no CUDA device here; run it on a machine that has one")
    device = cli.select_device(args.device)
    data = cifar10.load(args.data_dir)  # downloaded, where it is missing, before the clock starts
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, args.data_dir, len(data.test), Path(folder))
        lines = measure(bench)
    print("\n".join(lines))
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
