"""How fast this machine trains: images/s of the textbook loop, of main.py and of main_binary.py, and where time goes.

    python3 benchmarks/train_throughput.py            the table and train_throughput.png; four to eight minutes
    python3 benchmarks/train_throughput.py --quick    a minute: no compiler, few steps, rough figures

All of it in one process, a few steps of each in turn, over and over: what else the machine does then hits all alike.
Ours are the scripts themselves with `Trainer.train_epoch` in place of `Trainer.fit`: only scoring and saving are left
out. The latent weights have Muon, the default, and in one row Adam: the column "optimizer" shows what that changes.
"""

from __future__ import annotations

import functools
import io
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import cifar10  # noqa: E402 - needs the path
import main as float_script  # noqa: E402
import main_binary as binary_script  # noqa: E402
from engine import cli, runtime  # noqa: E402
from engine.files import atomic_write  # noqa: E402
from engine.training.distillation import make_criterion  # noqa: E402
from engine.training.loop import Trainer  # noqa: E402
from engine.training.run import Run  # noqa: E402
from models import build, weight_layers  # noqa: E402

PARTS = ("data", "binary", "forward", "backward", "optimizer")
PICTURE = "train_throughput.png"
WARM_UP = 6  # steps before the clock starts, in each turn: the batches that the DataLoader's workers have ready
CPU = torch.device("cpu")


class Variant:
    """One way to train. `turn` takes some steps and adds images/s to `speeds` and seconds to the parts of the step.

    The clocks wait for nothing, which is right on a CPU, where a call returns when its work is done.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.speeds: list[float] = []
        self.seconds: Counter[str] = Counter()
        self._started = 0.0  # of this turn; 0 while warming up

    def turn(self, steps: int, batch_size: int) -> None:
        self._started = 0.0
        self._train(WARM_UP + steps)
        seconds = time.perf_counter() - self._started
        self.seconds["all"] += seconds
        self.speeds.append(steps * batch_size / seconds)

    def _train(self, steps: int) -> None:
        """Train for that many steps; calls `_begin` before each of them, with its number."""
        raise NotImplementedError

    def _begin(self, step: int) -> None:
        if step == WARM_UP:
            self._started = time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time added to `part` of the step."""

        @functools.wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if self._started:
                    self.seconds[part] += time.perf_counter() - before

        return timed_call

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    def share(self, part: str) -> float:
        """Percent of the time; "other" is what no part claims: loss, accuracy, schedule, loop."""
        seconds = self.seconds
        return 100 * (2 * seconds["all"] - seconds.total() if part == "other" else seconds[part]) / seconds["all"]


class PictureDataset(torch.utils.data.Dataset):
    """As torchvision's CIFAR10: one image a time, through PIL and a list of transforms."""

    def __init__(self, split: cifar10.Split) -> None:
        from torchvision import transforms

        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(cifar10.SIDE, padding=cifar10.PAD),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(cifar10.MEAN, cifar10.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Textbook(Variant):
    """The loop everyone writes: DataLoader with workers, PIL transforms, NCHW, float32, eager.

    The allocator's setting (see `runtime.keep_freed_memory`) holds for the whole process, so it helps here as well.
    """

    def __init__(self, split: cifar10.Split, batch_size: int, workers: int) -> None:
        super().__init__("textbook loop")
        loader = torch.utils.data.DataLoader(
            PictureDataset(split),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.next = self.timed("data", lambda: next(batches))
        self.model = build("resnet20")
        self.forward = self.timed("forward", self.model)
        self.criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        self.zero_grad = self.timed("optimizer", optimizer.zero_grad)
        self.step = self.timed("optimizer", optimizer.step)
        self.running_loss = 0.0

    def _train(self, steps: int) -> None:
        self.model.train()
        for step in range(steps):
            self._begin(step)
            images, labels = self.next()
            self.zero_grad()
            loss = self.criterion(self.forward(images), labels)
            self.timed("backward", loss.backward)()
            self.step()
            self.running_loss += loss.item()


class Ours(Variant):
    """main.py or main_binary.py with its own options and step, and the trainer's loop around it."""

    def __init__(
        self, script: Any, data: cifar10.Data, options: list[str], *, compiled: bool, precision: str
    ) -> None:
        binary = script is binary_script
        mode = "Adam" if "adam" in options else "compiled" if compiled else "eager"
        super().__init__(f"{'BinaryConnect' if binary else 'float'}, {precision}, {mode}")
        args = script.make_parser().parse_args([*options, "--precision", precision])
        args.compile = compiled
        self.run = Run(args, CPU, Path("."), "latent" if binary else "float", None, None)
        self.run.compile_and_parallelize = self._take_network
        takes = mock.patch.object(Trainer, "fit", lambda trainer: self._take(trainer))
        criterion = mock.patch.object(script, "make_criterion", self._make_criterion)
        with takes, criterion, mock.patch("cifar10.load", return_value=data):
            script.train(self.run)

    def _take_network(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        for name in ("binarization", "restore", "clip"):
            if hasattr(network, name):
                setattr(network, name, self.timed("binary", getattr(network, name)))
        return self.timed("forward", Run.compile_and_parallelize(self.run, network))

    def _make_criterion(self, run: Run, teacher: None) -> Callable[..., Tensor]:
        criterion = make_criterion(run, teacher)

        def timing(*args: Tensor) -> Tensor:
            loss = criterion(*args)
            loss.backward = self.timed("backward", loss.backward)
            return loss

        return timing

    def _take(self, trainer: Trainer) -> None:
        """In place of `Trainer.fit`."""
        self.trainer, self.batches = trainer, self._full_batches(trainer.loader, self.run.args.batch_size)
        self.labels = trainer.loader.labels  # what the trainer asks of a loader: this, and `epoch`
        trainer.loader = self
        for optimizer in trainer.optimizers:
            optimizer.zero_grad = self.timed("optimizer", optimizer.zero_grad)
            optimizer.step = self.timed("optimizer", optimizer.step)

    def _full_batches(self, loader: cifar10.TrainLoader, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch after the other."""
        for epoch in itertools.count():
            yield from (batch for batch in loader.epoch(epoch) if len(batch[1]) == size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The trainer's loader is this object itself: an epoch as long as the turn."""
        get = self.timed("data", lambda: next(self.batches))
        for step in range(self.steps):
            self._begin(step)
            yield get()

    def _train(self, steps: int) -> None:
        self.steps = steps
        self.trainer.train_epoch()


# ------------------------------------------------------------------------------------------------------------
# What the machine could do


def training_flops(model: nn.Module) -> int:
    """Floating-point operations of one image's forward and backward pass in convolutions and classifier.

    Two for each multiply-and-add; backward takes two products as large as the forward one, for the gradients of
    the weights and of the input, which the first layer does not need.
    """
    multiplications: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        multiplications.append(layer.weight[0].numel() * output[0].numel())

    hooks = [layer.register_forward_hook(count) for _, layer in weight_layers(model)]
    with torch.no_grad():
        model(torch.zeros(1, 3, cifar10.SIDE, cifar10.SIDE))
    for hook in hooks:
        hook.remove()
    return 2 * (3 * sum(multiplications) - multiplications[0])


class MatrixProduct:
    """The product of two square matrices in one data type: GFLOP/s."""

    def __init__(self, precision: str, size: int) -> None:
        self.precision = precision
        self.speeds: list[float] = []
        self._factors = [torch.randn(size, size, dtype=runtime.PRECISIONS[precision]) for _ in range(2)]

    def turn(self, times: int = 4) -> None:
        size = len(self._factors[0])
        torch.mm(*self._factors)
        for _ in range(times):
            started = time.perf_counter()
            torch.mm(*self._factors)
            self.speeds.append(2e-9 * size**3 / (time.perf_counter() - started))

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


# ------------------------------------------------------------------------------------------------------------
# The report


def print_speeds(variants: list[Variant], limits: dict[str, float]) -> None:
    """limits: images/s at the speed of the matrix product, by precision."""
    base = variants[0].speed
    print(f"\n{'':<34}{'images/s':>9}{'lowest':>8}{'highest':>8}{'ratio':>7}{'of limit':>9}")
    for variant in variants:
        limit = limits["bfloat16" if "bfloat16" in variant.name else "float32"]
        print(
            f"{variant.name:<34}{variant.speed:>9,.0f}{min(variant.speeds):>8,.0f}{max(variant.speeds):>8,.0f}"
            f"{variant.speed / base:>7.2f}{100 * variant.speed / limit:>8.1f}%"
        )


def print_shares(variants: list[Variant]) -> None:
    print(f"\n{'percent of the step':<34}" + "".join(f"{part:>{len(part) + 1}}" for part in (*PARTS, "other")))
    for variant in variants:
        cells = (f"{variant.share(part):>{len(part) + 1}.1f}" for part in (*PARTS, "other"))
        print(f"{variant.name:<34}" + "".join(cells))


def print_ratios(variants: list[Variant]) -> None:
    """BinaryConnect over full precision, and Muon over Adam, in the same precision and mode, turn by turn."""
    by_name = {variant.name: variant for variant in variants}

    def ratio(one: Variant, other: Variant) -> float:
        return statistics.median(a / b for a, b in zip(one.speeds, other.speeds, strict=True))

    print()
    for name, binary in by_name.items():
        if name.endswith("Adam"):
            muon = by_name[name.replace("Adam", "eager")]
            print(f"{muon.name}, Muon / Adam: {ratio(muon, binary):.3f}")
        elif name.startswith("BinaryConnect"):
            print(f"{name} / full precision: {ratio(binary, by_name[name.replace('BinaryConnect', 'float')]):.3f}")


def save_chart(path: Path, variants: list[Variant], limits: dict[str, float]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 0.42 * len(variants) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [variant.name for variant in variants]
    colors = ["gray" if c is variants[0] else "C1" if "Binary" in c.name else "C0" for c in variants]
    bars = axes.barh(names, [variant.speed for variant in variants], color=colors)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("images/s; matrix product: " + ", ".join(f"{name} {v:,.0f}" for name, v in limits.items()))
    axes.set_title(f"Training ResNet-20 on CIFAR-10, {torch.get_num_threads()} CPU threads")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write(path, picture.getvalue())


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure how fast this machine trains, and where the time goes.")
    group = parser.add_argument_group("measurement")
    cli.add_data_dir_option(group)
    cli.add_output_option(group)
    group.add_argument("--batch-size", type=cli.integer(1), default=128, help="images per batch")
    group.add_argument("--threads", type=cli.integer(1), metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--workers", type=cli.integer(0), default=2, help="of the textbook loop's DataLoader")
    group.add_argument("--rounds", type=cli.integer(1), default=5, help="turns of each variant")
    group.add_argument("--steps", type=cli.integer(1), default=10, help="timed steps in a turn")
    group.add_argument("--quick", action="store_true", help="2 turns of 2 steps, not compiled")
    return parser


def choose_precisions() -> list[str]:
    """float32, and bfloat16 where the CPU is known to compute with it: emulated, a step takes many times as long."""
    return ["float32", "bfloat16"] if runtime.cpu_has_bfloat16_units() else ["float32"]


def make_variants(args: Any, data: cifar10.Data, precisions: list[str]) -> list[Variant]:
    options = ["--batch-size", str(args.batch_size)]
    variants: list[Variant] = [Textbook(data.train, args.batch_size, args.workers)]
    for precision, compiled in itertools.product(precisions, (False,) if args.quick else (False, True)):
        how = {"compiled": compiled, "precision": precision}
        variants.append(Ours(float_script, data, options, **how))
        variants.append(Ours(binary_script, data, options, **how))
        if not compiled:
            variants.append(Ours(binary_script, data, [*options, "--optimizer", "adam"], **how))
    return variants


def main() -> None:
    args = make_parser().parse_args()
    if args.quick:
        args.rounds, args.steps = 2, 2
    runtime.silence_compiler()
    runtime.keep_freed_memory()
    cli.select_device("cpu", args.threads)
    folder = cli.prepare_output_dir(args.output_dir)
    data = cifar10.load(args.data_dir)
    if len(data.train) < args.batch_size:
        raise cli.UserError(f"--batch-size {args.batch_size}: there are {len(data.train)} training images only")
    print(f"machine: {runtime.describe(CPU)}, torch {torch.__version__}; batches of {args.batch_size}")
    precisions = choose_precisions()
    if "bfloat16" not in precisions:
        print("bfloat16 left out: neither AMX nor AVX-512 BF16 found, it may be emulated")
    products = [MatrixProduct(precision, 512 if args.quick else 2048) for precision in precisions]
    variants = make_variants(args, data, precisions)
    with tqdm(total=(args.rounds + 1) * len(variants), disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(args.rounds + 1):
            for variant in variants:
                bar.set_postfix_str(variant.name)
                variant.turn(args.steps, args.batch_size)
                bar.update()
            for product in products:
                product.turn()
            if number == 0:  # compiled and warm: the figures begin
                for variant in variants:
                    variant.speeds.clear()
                    variant.seconds.clear()
    flops = training_flops(build("resnet20"))
    limits = {product.precision: 1e9 * product.speed / flops for product in products}
    print(f"\n{flops / 1e6:.1f} million floating-point operations to train on one image")
    for product in products:
        images = limits[product.precision]
        print(f"matrix product, {product.precision}: {product.speed:,.0f} GFLOP/s, {images:,.0f} images/s")
    print_speeds(variants, limits)
    print_ratios(variants)
    print_shares(variants)
    save_chart(folder / PICTURE, variants, limits)
    print(f"\nSaved {folder / PICTURE}")


if __name__ == "__main__":
    cli.run(main)
