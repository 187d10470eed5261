"""How fast this machine trains: images/s of the textbook loop, of main.py and of main_binary.py, and where time goes.

    python3 benchmarks/train_throughput.py            the table and train_throughput.png; four to eight minutes
    python3 benchmarks/train_throughput.py --quick    a minute: no compiler, few steps, rough figures

All of it in one process, a few steps of each in turn, over and over: what else the machine does then hits all alike.
Ours is timed through `Trainer.train_epoch` and the scripts' own `make_train_step`, so nothing of a real run is left
out but scoring and saving.
"""

from __future__ import annotations

import io
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from engine.training.loop import Trainer  # noqa: E402
from engine.training.run import Run  # noqa: E402
from engine.training.tracking import FlipRateMeter  # noqa: E402
from models import (  # noqa: E402
    BC,
    build,
    weight_layers,
)

PARTS = ("data", "binary", "forward", "backward", "optimizer")
PICTURE = "train_throughput.png"
WARM_UP = 6  # steps before the clock starts, in each turn: the batches that the DataLoader's workers have ready
CPU = torch.device("cpu")


class Contender:
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
        """Train for so many steps; to call `_begin` before each of them, with its number."""
        raise NotImplementedError

    def _begin(self, step: int) -> None:
        if step == WARM_UP:
            self._started = time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time added to `part` of the step."""

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
        """Per cent of the time; "other" is what no part claims: loss, accuracy, schedule, loop."""
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


class Textbook(Contender):
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


class Ours(Contender):
    """main.py or main_binary.py: their options, their step, the trainer's loop around it."""

    def __init__(
        self, script: Any, split: cifar10.Split, options: list[str], *, compiled: bool, precision: str
    ) -> None:
        binary = script is binary_script
        super().__init__(
            f"{'BinaryConnect' if binary else 'float'}, {precision}, {'compiled' if compiled else 'eager'}"
        )
        args = script.make_parser().parse_args([*options, "--compile" if compiled else "--no-compile"])
        run = Run(args, CPU, Path("."), "latent" if binary else "float", None, None, precision=precision)
        run.backward = self.timed("backward", run.backward)
        run.step = self.timed("optimizer", run.step)
        torch.manual_seed(args.seed)
        self.batches = self._forever(cifar10.TrainLoader(split, args.batch_size, seed=args.seed), args.batch_size)
        make = self._binary_step if binary else self._float_step
        model, optimizers, step, watch = make(run, len(split))
        for optimizer in optimizers:
            optimizer.zero_grad = self.timed("optimizer", optimizer.zero_grad)
        self.steps_per_epoch, self.labels = 1000, split.labels  # what the trainer asks of a loader
        self.trainer = Trainer(run, model, optimizers, self, step, None, "test", watch, {})

    def _float_step(self, run: Run, images: int) -> tuple[Any, ...]:
        model = run.place(build(run.args.arch))
        args = run.args
        optimizer = torch.optim.SGD(
            model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
        )
        network = self.timed("forward", run.wrap(model, images))
        return model, [optimizer], float_script.make_train_step(run, network, optimizer, args.label_smoothing), None

    def _binary_step(self, run: Run, images: int) -> tuple[Any, ...]:
        args = run.args
        bc = run.place(BC(build(args.arch)))
        bc.clip()
        optimizers = binary_script.make_optimizers(args, bc)
        network = self.timed("forward", run.wrap(bc, images))
        for name in ("binarization", "restore", "clip"):
            setattr(bc, name, self.timed("binary", getattr(bc, name)))

        def criterion(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)

        step = binary_script.make_train_step(run, bc, network, optimizers, criterion, args.logit_scale)
        return bc.model, optimizers, step, FlipRateMeter(bc)

    def _forever(self, loader: cifar10.TrainLoader, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches only, one epoch after the other."""
        for epoch in itertools.count():
            yield from (batch for batch in loader.epoch(epoch) if len(batch[1]) == batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The trainer's loader is this object itself: an epoch as long as the turn."""
        get = self.timed("data", lambda: next(self.batches))
        for step in range(self.steps):
            self._begin(step)
            yield get()

    def _train(self, steps: int) -> None:
        self.steps = steps
        self.trainer.steps_done = 0
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


def print_speeds(contenders: list[Contender], limits: dict[str, float]) -> None:
    """limits: images/s at the speed of the matrix product, by precision."""
    base = contenders[0].speed
    print(f"\n{'':<34}{'images/s':>9}{'lowest':>8}{'highest':>8}{'ratio':>7}{'of limit':>9}")
    for contender in contenders:
        limit = limits["bfloat16" if "bfloat16" in contender.name else "float32"]
        print(
            f"{contender.name:<34}{contender.speed:>9,.0f}{min(contender.speeds):>8,.0f}{max(contender.speeds):>8,.0f}"
            f"{contender.speed / base:>7.2f}{100 * contender.speed / limit:>8.1f}%"
        )


def print_shares(contenders: list[Contender]) -> None:
    print(f"\n{'per cent of the step':<34}" + "".join(f"{part:>{len(part) + 1}}" for part in (*PARTS, "other")))
    for contender in contenders:
        cells = (f"{contender.share(part):>{len(part) + 1}.1f}" for part in (*PARTS, "other"))
        print(f"{contender.name:<34}" + "".join(cells))


def print_ratios(contenders: list[Contender]) -> None:
    """BinaryConnect over full precision, in the same precision and mode, turn by turn."""
    by_name = {contender.name: contender for contender in contenders}
    print()
    for name, binary in by_name.items():
        if name.startswith("BinaryConnect"):
            full = by_name[name.replace("BinaryConnect", "float")]
            ratio = statistics.median(b / f for b, f in zip(binary.speeds, full.speeds, strict=True))
            print(f"{name} / full precision: {ratio:.3f}")


def save_chart(path: Path, contenders: list[Contender], limits: dict[str, float]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 0.42 * len(contenders) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [contender.name for contender in contenders]
    colors = ["gray" if c is contenders[0] else "C1" if "Binary" in c.name else "C0" for c in contenders]
    bars = axes.barh(names, [contender.speed for contender in contenders], color=colors)
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
    group.add_argument("--rounds", type=cli.integer(1), default=5, help="turns that each contender gets")
    group.add_argument("--steps", type=cli.integer(1), default=10, help="timed steps in a turn")
    group.add_argument("--quick", action="store_true", help="2 turns of 2 steps, not compiled")
    return parser


def choose_precisions() -> list[str]:
    """float32, and bfloat16 where the CPU is known to compute with it: emulated, a step takes many times as long."""
    return ["float32", "bfloat16"] if runtime.cpu_has_bfloat16_units() else ["float32"]


def make_contenders(args: Any, split: cifar10.Split, precisions: list[str]) -> list[Contender]:
    options = ["--batch-size", str(args.batch_size)]
    contenders: list[Contender] = [Textbook(split, args.batch_size, args.workers)]
    modes = (False,) if args.quick else (False, True)
    for precision, compiled in itertools.product(precisions, modes):
        for script in (float_script, binary_script):
            contenders.append(Ours(script, split, options, compiled=compiled, precision=precision))
    return contenders


def main() -> None:
    args = make_parser().parse_args()
    if args.quick:
        args.rounds, args.steps = 2, 2
    runtime.silence_compiler()
    runtime.keep_freed_memory()
    cli.select_device("cpu", args.threads)
    folder = cli.prepare_output_dir(args.output_dir)
    split = cifar10.load(args.data_dir).train
    if len(split) < args.batch_size:
        raise cli.UserError(f"--batch-size {args.batch_size}: there are {len(split)} training images only")
    print(f"machine: {runtime.describe(CPU)}, torch {torch.__version__}; batches of {args.batch_size}")
    precisions = choose_precisions()
    if "bfloat16" not in precisions:
        print("bfloat16 left out: neither AMX nor AVX-512 BF16 found, it may be emulated")
    products = [MatrixProduct(precision, 512 if args.quick else 2048) for precision in precisions]
    contenders = make_contenders(args, split, precisions)
    with tqdm(total=(args.rounds + 1) * len(contenders), disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(args.rounds + 1):
            for contender in contenders:
                bar.set_postfix_str(contender.name)
                contender.turn(args.steps, args.batch_size)
                bar.update()
            for product in products:
                product.turn()
            if number == 0:  # compiled and warm: the figures begin
                for contender in contenders:
                    contender.speeds.clear()
                    contender.seconds.clear()
    flops = training_flops(build("resnet20"))
    limits = {product.precision: 1e9 * product.speed / flops for product in products}
    print(f"\n{flops / 1e6:.1f} million floating-point operations to train on one image")
    for product in products:
        images = limits[product.precision]
        print(f"matrix product, {product.precision}: {product.speed:,.0f} GFLOP/s, {images:,.0f} images/s")
    print_speeds(contenders, limits)
    print_ratios(contenders)
    print_shares(contenders)
    save_chart(folder / PICTURE, contenders, limits)
    print(f"\nSaved {folder / PICTURE}")


if __name__ == "__main__":
    cli.run(main)
