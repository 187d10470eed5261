"""How fast one binary ResNet classifies, by seven ways to run it, measured in one run.

    python3 benchmarks/inference.py                    best_model.pth, about three minutes
    python3 benchmarks/inference.py CKPT --threads 1   another checkpoint, on one core

Prints images per second, the latency of single images, peak memory, file size and accuracy of each way, and saves a
bar chart, inference.png. The ways take turns within each round, so that whatever else the machine does meets all of
them; given is the speed of the median call. torch and the plain ONNX files get images that are normalized already,
our ONNX files the pixels, which they normalize themselves. Needs requirements-onnx.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_int8 import TorchInt8Network

import cifar10
from engine import binarized, checkpoints, cli, onnx_export, runtime
from engine.checkpoints import BEST, BINARY_1BIT, Checkpoint
from engine.cli import UserError
from engine.files import atomic_write
from models import ResNetS
from models.bitpack import pack_model

BATCHES = (1, 32, 128, 500)
CALIBRATION_IMAGES = 1000
CHART = "inference.png"
TORCH_INT8 = "torch, oneDNN int8"


@dataclass
class Way:
    """One way to run the network, and what was measured of it."""

    name: str
    file: Path
    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})  # of each call
    accuracy: float = 0.0
    memory: float | None = None  # MB

    def rate(self, batch: int) -> float:
        """Images per second of the median call over all rounds."""
        return batch / float(np.median(self.seconds[batch]))


def write_files(loaded: Checkpoint, model: ResNetS, data: cifar10.Data, folder: Path) -> list[Way]:
    """All files of the network, written to `folder`, from the float32 checkpoint to the 1-bit int8 ONNX file."""
    names = {
        "torch eager, float32": "binarized.pth",
        "torch, BatchNorm folded": "1bit.pth",
        TORCH_INT8: "1bit.pth",
        "ONNX Runtime float32": "plain.onnx",
        "ONNX Runtime int8": "plain_int8.onnx",
        "ours, 1-bit ONNX float32": "1bit.onnx",
        "ours, 1-bit ONNX int8": "1bit_int8.onnx",
    }
    ways = [Way(name, folder / file) for name, file in names.items()]
    checkpoints.save(folder / "binarized.pth", checkpoints.make(loaded.arch, "binary", model.state_dict()))
    packed = checkpoints.make(loaded.arch, BINARY_1BIT, None) | pack_model(model, loaded.arch)
    checkpoints.save(folder / "1bit.pth", packed)
    images = data.train.images[:CALIBRATION_IMAGES]
    write_plain_onnx(checkpoints.load(folder / "1bit.pth").model(), images, folder)
    for name, calibration in (("1bit.onnx", None), ("1bit_int8.onnx", images.numpy())):
        (folder / name).write_bytes(onnx_export.export(model, cifar10.MEAN, cifar10.STD, calibration))
    return ways


def write_plain_onnx(model: ResNetS, images: Tensor, folder: Path) -> None:
    """What onnxruntime's own tools make of the network: torch's export, and its static quantization.

    Unsigned activations, signed weights with a scale per channel: of the forms that the quantizer offers, the one
    whose every convolution becomes an integer one. (Its default, signed activations, leaves 10 of 19 in float.)
    Weights of 7 bits (`reduce_range`): x86 CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights
    overflow (benchmarks/speed.md); -1 and +1 lose nothing by it.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(100))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": cifar10.normalize(batch).contiguous().numpy()}

    logging.getLogger().setLevel(logging.ERROR)
    plain, prepared = str(folder / "plain.onnx"), str(folder / "prepared.onnx")
    example, dynamic = torch.zeros(1, 3, 32, 32), {"images": {0: "N"}, "logits": {0: "N"}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            *(model, (example,), plain),
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes=dynamic,
            opset_version=17,
        )
        quant_pre_process(plain, prepared)
        options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
        quantize_static(prepared, str(folder / "plain_int8.onnx"), Reader(), per_channel=True, **options)


def open_way(way: Way, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of pixels uint8 (N, 32, 32, 3) and the same images normalized that computes the logits.

    images: normalized training images, for the ranges of torch's int8 convolutions.
    """
    if way.file.name.startswith("1bit") and way.file.suffix == ".onnx":
        network = onnx_export.OnnxNetwork(way.file)
        return lambda pixels, _normalized: network(pixels)
    if way.file.suffix == ".onnx":
        session = onnx_export.start_session(way.file.read_bytes())
        return lambda _pixels, normalized: torch.from_numpy(session.run(None, {"images": normalized.numpy()})[0])
    loaded = checkpoints.load(way.file)
    model = loaded.model().to(memory_format=torch.channels_last)
    if way.name == TORCH_INT8:
        model = TorchInt8Network(loaded.model(fold=False), model, images)

    def run(_pixels: Tensor, normalized: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(normalized)

    return run


def open_ways(ways: list[Way], images: Tensor) -> tuple[list[Way], list[Callable]]:
    """The ways that run here, and how. torch's int8 convolutions are in builds for x86 only, and not in every one."""
    opened = []
    for way in ways:
        try:
            run = open_way(way, images)
            run(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), plain(images[:1], way))
            opened.append((way, run))
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            if way.name != TORCH_INT8:
                raise
            print(f"{way.name}: not in this torch ({cli.reason(error)})")
    return [way for way, _ in opened], [run for _, run in opened]


def peak_memory(way: Way, threads: int, pixels: Tensor) -> float | None:
    """MB that loading and running the largest batch takes at most, beyond the interpreter and its imports.

    Torch's int8 is calibrated while it is loaded, by a float32 pass over `pixels`; that is part of its figure.

    To be called in a process of its own. None where the system is not Linux, which alone tells and resets a peak.
    """
    torch.set_num_threads(threads)
    import onnxruntime  # noqa: F401 - among the imports of every way, so that they compare

    images = cifar10.normalize(pixels)
    normalized = plain(images, way)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use (man 5 proc)
        before = _status_bytes("VmHWM")
        run = open_way(way, images)
        for _ in range(2):
            run(pixels, normalized)
        return (_status_bytes("VmHWM") - before) / 1e6
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def plain(normalized: Tensor, way: Way) -> Tensor:
    """Normalized images in the memory format that this way wants: row-major for ONNX, channels_last for torch."""
    return normalized.contiguous() if way.file.suffix == ".onnx" else normalized


def time_round(ways: list[Way], runs: list[Callable], pixels: Tensor, seconds: float, bar: tqdm) -> None:
    """Each way for `seconds` (at least two calls) at each batch size."""
    normalized = cifar10.normalize(pixels)
    for batch in BATCHES:
        for way, run in zip(ways, runs, strict=True):
            inputs = pixels[:batch], plain(normalized[:batch], way)
            time.sleep(0.05)  # the threads of the way before it spin a little while before they sleep
            run(*inputs)
            calls: list[float] = []
            while sum(calls) < seconds or len(calls) < 2:
                started = time.perf_counter()
                run(*inputs)
                calls.append(time.perf_counter() - started)
            way.seconds[batch] += calls
            bar.update()


def score(run: Callable, test: cifar10.Split, way: Way) -> float:
    """Per cent of the test images that this way classifies correctly."""
    correct = 0
    for pixels, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
        correct += int((run(pixels, plain(cifar10.normalize(pixels), way)).argmax(1) == labels).sum())
    return 100 * correct / len(test)


def print_tables(ways: list[Way]) -> None:
    print(
        f"\n{'images/s at batch':<26}" + "".join(f"{batch:>9}" for batch in BATCHES) + f"{'x at 1':>9}{'x at 32':>9}"
    )
    for way in ways:
        gains = "".join(f"{way.rate(batch) / ways[0].rate(batch):>9.2f}" for batch in (1, 32))
        print(f"{way.name:<26}" + "".join(f"{way.rate(batch):>9,.0f}" for batch in BATCHES) + gains)
    print(f"\n{'':<26}{'latency of one image, ms':^24}{'memory':>9}{'file':>10}{'test':>9}")
    print(f"{'':<26}{'median':>12}{'95 % below':>12}{'MB':>9}{'kB':>10}{'%':>9}")
    for way in ways:
        median, high = np.percentile(way.seconds[1], [50, 95]) * 1e3
        memory = "-" if way.memory is None else f"{way.memory:.0f}"
        size = way.file.stat().st_size / 1e3
        print(f"{way.name:<26}{median:>12.2f}{high:>12.2f}{memory:>9}{size:>10,.1f}{way.accuracy:>9.2f}")


def draw_chart(path: Path, ways: list[Way], title: str) -> None:
    """Save a PNG: for each batch size a bar a way, images per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, batch in zip(figure.subplots(2, 2).flat, BATCHES, strict=True):
        rates = [way.rate(batch) for way in ways]
        colors = ["tab:green" if way.name.startswith("ours") else "tab:gray" for way in ways]
        bars = axes.barh([way.name for way in ways], rates, color=colors)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=f"batch {batch}", xlabel="images per second")
        axes.tick_params(labelsize=8)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measure how fast a binary ResNet classifies, by seven ways to run it, on the CPU.")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=Path(BEST), metavar="CKPT", help="latent or binarized weights"
    )
    cli.add_data_dir_option(parser)
    parser.add_argument("--limit-test", type=cli.integer(1), metavar="N", help="score the first N test images only")
    parser.add_argument("--threads", type=cli.integer(1), metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=cli.integer(1), default=5, help="rounds in which all ways take turns")
    parser.add_argument("--seconds", type=cli.number(0), default=0.5, help="of each way, batch size and round")
    cli.add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    onnx_export.require("onnx", "onnxruntime")
    cli.select_device("cpu", args.threads)
    output = cli.prepare_output_dir(args.output_dir)
    loaded = checkpoints.load(args.checkpoint)
    if loaded.kind == BINARY_1BIT:
        raise UserError(f"{args.checkpoint}: is a 1-bit file; give the checkpoint it was made from")
    model = binarized.binarized_model(loaded)
    onnx_export.check_exportable(model, args.checkpoint)
    data = cifar10.load(args.data_dir, limit_train=CALIBRATION_IMAGES, limit_test=args.limit_test)
    about = f"{loaded.arch} on {runtime.describe(torch.device('cpu'))}"
    print(f"{about}, scored on {data.scored_on}")

    with tempfile.TemporaryDirectory() as folder:
        ways = write_files(loaded, model, data, Path(folder))
        pixels = data.train.images[torch.arange(max(BATCHES)) % len(data.train)]
        ways, runs = open_ways(ways, cifar10.normalize(pixels))
        steps = args.rounds * len(ways) * len(BATCHES) + 2 * len(ways)
        with tqdm(total=steps, unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
            for way, run in zip(ways, runs, strict=True):
                way.accuracy = score(run, data.test, way)
                bar.update()
            for _ in range(args.rounds):
                time_round(ways, runs, pixels, args.seconds, bar)
            for way in ways:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    way.memory = pool.apply(peak_memory, (way, torch.get_num_threads(), pixels))
                bar.update()
        print_tables(ways)
    draw_chart(output / CHART, ways, f"Images per second, {about}")
    print(f"\nSaved the chart: {output / CHART}")


if __name__ == "__main__":
    cli.run(main)
