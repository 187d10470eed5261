"""How fast a binary ResNet classifies in seven variants, measured in one run.

    python3 benchmarks/inference.py                    best_model.pth, about three minutes
    python3 benchmarks/inference.py CKPT --threads 1   another checkpoint, on one core

Prints images per second, the latency of single images, peak memory, file size and accuracy of each variant, and saves
a bar chart, inference.png; green bars read a 1-bit file. The variants take turns within each round, so other load on
the machine affects all of them. Speed is that of the median call. torch and the plain ONNX files get normalized
images; our ONNX files get pixels, which they normalize themselves. Needs requirements-onnx.txt.
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
class Variant:
    """One way to run the network, and its measurements."""

    name: str
    file: Path
    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})  # of each call
    accuracy: float = 0.0
    memory: float | None = None  # MB

    def rate(self, batch: int) -> float:
        """Images per second of the median call over all rounds."""
        return batch / float(np.median(self.seconds[batch]))


def write_files(loaded: Checkpoint, model: ResNetS, data: cifar10.Data, folder: Path) -> list[Variant]:
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
    variants = [Variant(name, folder / file) for name, file in names.items()]
    checkpoints.save(folder / "binarized.pth", checkpoints.make(loaded.arch, "binary", model.state_dict()))
    packed = checkpoints.make(loaded.arch, BINARY_1BIT, None) | pack_model(model, loaded.arch)
    checkpoints.save(folder / "1bit.pth", packed)
    images = data.train.images[:CALIBRATION_IMAGES]
    write_plain_onnx(checkpoints.load(folder / "1bit.pth").model(), images, folder)
    for name, calibration in (("1bit.onnx", None), ("1bit_int8.onnx", images.numpy())):
        (folder / name).write_bytes(onnx_export.export(model, cifar10.MEAN, cifar10.STD, calibration))
    return variants


def write_plain_onnx(model: ResNetS, images: Tensor, folder: Path) -> None:
    """The network as onnxruntime's own tools make it: torch's export, and its static quantization.

    Unsigned activations, signed weights with a scale per channel: of the forms that the quantizer offers, the one
    in which every convolution is an integer one. (Its default, signed activations, leaves 10 of 19 in float.)
    Weights of 7 bits (`reduce_range`): x86 CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights
    overflow (docs/speed.md); -1 and +1 are exact in 7 bits.
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


def open_variant(variant: Variant, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of pixels uint8 (N, 32, 32, 3) and the same images normalized that computes the logits.

    images: normalized training images, for the ranges of torch's int8 convolutions.
    """
    if variant.file.name.startswith("1bit") and variant.file.suffix == ".onnx":
        network = onnx_export.OnnxNetwork(variant.file)
        return lambda pixels, _normalized: network(pixels)
    if variant.file.suffix == ".onnx":
        session = onnx_export.start_session(variant.file.read_bytes())
        return lambda _pixels, normalized: torch.from_numpy(session.run(None, {"images": normalized.numpy()})[0])
    loaded = checkpoints.load(variant.file)
    model = loaded.model().to(memory_format=torch.channels_last)
    if variant.name == TORCH_INT8:
        model = TorchInt8Network(loaded.model(fold=False), model, images)

    def run(_pixels: Tensor, normalized: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(normalized)

    return run


def open_variants(variants: list[Variant], images: Tensor) -> tuple[list[Variant], list[Callable]]:
    """The variants that run here, and their functions. Not every build of torch has int8 convolutions."""
    opened = []
    for variant in variants:
        try:
            run = open_variant(variant, images)
            run(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), plain(images[:1], variant))
            opened.append((variant, run))
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            if variant.name != TORCH_INT8:
                raise
            print(f"{variant.name}: not in this torch ({cli.reason(error)})")
    return [variant for variant, _ in opened], [run for _, run in opened]


def peak_memory(variant: Variant, threads: int, pixels: Tensor) -> float | None:
    """Peak MB of loading the variant and running the largest batch, beyond the interpreter and its imports.

    Torch's int8 is calibrated by a float32 pass over `pixels` when it is loaded; its figure includes that.

    To be called in a process of its own. None where the system is not Linux, which alone can reset a peak.
    """
    torch.set_num_threads(threads)
    import onnxruntime  # noqa: F401 - imported in every variant, so that they compare

    images = cifar10.normalize(pixels)
    normalized = plain(images, variant)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use (man 5 proc)
        before = _status_bytes("VmHWM")
        run = open_variant(variant, images)
        for _ in range(2):
            run(pixels, normalized)
        return (_status_bytes("VmHWM") - before) / 1e6
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def plain(normalized: Tensor, variant: Variant) -> Tensor:
    """Normalized images in the memory format of the variant: row-major for ONNX, channels_last for torch."""
    return normalized.contiguous() if variant.file.suffix == ".onnx" else normalized


def time_round(variants: list[Variant], runs: list[Callable], pixels: Tensor, seconds: float, bar: tqdm) -> None:
    """Run each variant for `seconds` (at least two calls) at each batch size."""
    normalized = cifar10.normalize(pixels)
    for batch in BATCHES:
        for variant, run in zip(variants, runs, strict=True):
            inputs = pixels[:batch], plain(normalized[:batch], variant)
            time.sleep(0.05)  # idle threads of the previous variant spin for a while
            run(*inputs)
            calls: list[float] = []
            while sum(calls) < seconds or len(calls) < 2:
                started = time.perf_counter()
                run(*inputs)
                calls.append(time.perf_counter() - started)
            variant.seconds[batch] += calls
            bar.update()


def score(run: Callable, test: cifar10.Split, variant: Variant) -> float:
    """Percentage of the test images that the variant classifies correctly."""
    correct = 0
    for pixels, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
        correct += int((run(pixels, plain(cifar10.normalize(pixels), variant)).argmax(1) == labels).sum())
    return 100 * correct / len(test)


def print_tables(variants: list[Variant]) -> None:
    print(
        f"\n{'images/s at batch':<26}" + "".join(f"{batch:>9}" for batch in BATCHES) + f"{'x at 1':>9}{'x at 32':>9}"
    )
    for variant in variants:
        gains = "".join(f"{variant.rate(batch) / variants[0].rate(batch):>9.2f}" for batch in (1, 32))
        print(f"{variant.name:<26}" + "".join(f"{variant.rate(batch):>9,.0f}" for batch in BATCHES) + gains)
    print(f"\n{'':<26}{'latency of one image, ms':^24}{'memory':>9}{'file':>10}{'test':>9}")
    print(f"{'':<26}{'median':>12}{'95 % below':>12}{'MB':>9}{'kB':>10}{'%':>9}")
    for variant in variants:
        median, high = np.percentile(variant.seconds[1], [50, 95]) * 1e3
        memory = "-" if variant.memory is None else f"{variant.memory:.0f}"
        size = variant.file.stat().st_size / 1e3
        print(f"{variant.name:<26}{median:>12.2f}{high:>12.2f}{memory:>9}{size:>10,.1f}{variant.accuracy:>9.2f}")


def draw_chart(path: Path, variants: list[Variant], title: str) -> None:
    """Save a PNG: for each batch size one bar per variant, images per second; green where a 1-bit file is read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, batch in zip(figure.subplots(2, 2).flat, BATCHES, strict=True):
        rates = [variant.rate(batch) for variant in variants]
        colors = ["tab:green" if variant.file.name.startswith("1bit") else "tab:gray" for variant in variants]
        bars = axes.barh([variant.name for variant in variants], rates, color=colors)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=f"batch {batch}", xlabel="images per second")
        axes.tick_params(labelsize=8)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measure how fast a binary ResNet classifies on the CPU, in seven variants.")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=Path(BEST), metavar="CKPT", help="latent or binarized weights"
    )
    cli.add_data_dir_option(parser)
    parser.add_argument("--limit-test", type=cli.integer(1), metavar="N", help="score the first N test images only")
    parser.add_argument("--threads", type=cli.integer(1), metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=cli.integer(1), default=5, help="rounds in which all variants take turns")
    parser.add_argument("--seconds", type=cli.number(0), default=0.5, help="per variant, batch size and round")
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
    title = f"{loaded.arch} on {runtime.describe(torch.device('cpu'))}"
    print(f"{title}, scored on {data.scored_on}")

    with tempfile.TemporaryDirectory() as folder:
        variants = write_files(loaded, model, data, Path(folder))
        pixels = data.train.images[torch.arange(max(BATCHES)) % len(data.train)]
        variants, runs = open_variants(variants, cifar10.normalize(pixels))
        steps = args.rounds * len(variants) * len(BATCHES) + 2 * len(variants)
        with tqdm(total=steps, unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
            for variant, run in zip(variants, runs, strict=True):
                variant.accuracy = score(run, data.test, variant)
                bar.update()
            for _ in range(args.rounds):
                time_round(variants, runs, pixels, args.seconds, bar)
            for variant in variants:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    variant.memory = pool.apply(peak_memory, (variant, torch.get_num_threads(), pixels))
                bar.update()
        print_tables(variants)
    draw_chart(output / CHART, variants, f"Images per second, {title}")
    print(f"\nSaved the chart: {output / CHART}")


if __name__ == "__main__":
    cli.run(main)
