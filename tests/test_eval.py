"""eval.py: what it prints, what it draws, what it refuses."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import binary_network, random_network, save_checkpoint
from runs import caller

import cifar10
import eval_binarized
from engine import checkpoints, cli, onnx_export
from engine import evaluate as evaluate_module
from engine.cli import UserError
from engine.evaluate import Scores
from engine.training import distributed
from models.bitpack import pack_model

evaluating = importlib.import_module("eval")
ACCURACY = re.compile(r"^Test Accuracy: (\d+\.\d\d)%$", re.MULTILINE)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """call("x.pth", "--limit-test", 5): main() in this process; what it printed."""
    return functools.partial(caller(tmp_path, monkeypatch, capsys), "eval")


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the data fails the test."""
    monkeypatch.setattr(cifar10, "load", lambda *_, **__: pytest.fail("the data was asked for"))


def test_the_whole_report_on_latent_weights(tmp_path: Path, small_data: Path, run_script: Callable) -> None:
    save_checkpoint(tmp_path / "best_model.pth", "latent")
    done = run_script("eval.py", "--data-dir", small_data, "--plot", "new/folder/page.png", cwd=tmp_path)
    printed = done.stdout

    split = cifar10.load(small_data, train=False).test
    with torch.no_grad():
        logits = random_network()(cifar10.normalize(split.images))
    right = logits.argmax(1) == split.labels
    assert ACCURACY.findall(printed) == [f"{100 * right.double().mean():.2f}"]
    loss = re.search(r"^Test loss: (\S+) nats per image \(logits times logit_scale, 0\.125\)$", printed, re.M)
    assert float(loss[1]) == pytest.approx(F.cross_entropy(logits / 8, split.labels).item(), abs=2e-4)
    for label, name in enumerate(cifar10.CLASSES):
        correct = int(right[split.labels == label].sum())
        assert re.search(rf"^{name} +10 +{correct} +{10 * correct}\.00%", printed, re.M), name

    assert "⚠ These are latent weights." in printed
    assert "eval_binarized.py" in printed
    assert "  recorded accuracy 12.50% on held-out images, binarized\n" in printed
    assert re.search(r"^Speed: [\d,]+ images/s$", printed, re.M)
    assert max(len(line) for line in printed.splitlines() if str(small_data) not in line) <= 80
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["page.png"]


@pytest.mark.parametrize(("kind", "kept"), [("latent", True), ("float", False)])
def test_binarized_weights_keep_only_what_was_recorded_of_them(tmp_path: Path, kind: str, kept: bool) -> None:
    loaded = checkpoints.load(save_checkpoint(tmp_path / "x.pth", kind))
    scores = Scores(2.5, torch.eye(10, dtype=torch.int64), torch.eye(10), seconds=1.0)
    metrics = eval_binarized.binarized_checkpoint(loaded, binary_network(), scores)["metrics"]
    measured = {"test_accuracy": 100.0, "test_loss": 2.5, "test_images": 10}
    assert metrics == measured | ({"val_accuracy": 12.5} if kept else {})


@pytest.mark.parametrize("writer", [True, False])
def test_of_two_processes_one_shows_the_scoring_of_all_images(monkeypatch: pytest.MonkeyPatch, writer: bool) -> None:
    """The writer has 13 of 25 images, all of class 0 and classified so; the other process is played."""
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, total: int, disable: bool, **_: object) -> None:
            super().__init__(self)
            self.n, self.total, self.disable = 0, total, disable
            bars.append(self)

        def update(self, images: int) -> None:
            self.n += images

    monkeypatch.setattr(evaluate_module, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, value in {
        "world_size": lambda: 2,
        "is_writer": lambda: writer,
        "copy_buffers_from_writer": lambda _: None,
        "sum_over_ranks": lambda mine: mine * 25 // 13,
    }.items():
        monkeypatch.setattr(distributed, name, value)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data.copy_(torch.arange(10, 0, -1.0))
    batches = [(torch.zeros(n, 3), torch.zeros(n, dtype=torch.int64)) for n in (7, 6)]
    assert evaluate_module.evaluate(model, batches, 25, progress="scoring").correct == 25
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(25, 25, not writer)]


def test_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions have products of 10 bits, TensorFloat-32, unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cli.select_device("cpu")
    assert torch.backends.cudnn.allow_tf32 is False


def test_every_kind_of_file_is_scored_and_the_limit_is_told(tmp_path: Path, small_data: Path, call: Callable) -> None:
    save_checkpoint(tmp_path / "binary.pth", "binary")
    packed = checkpoints.make("resnet20", checkpoints.BINARY_1BIT, None) | pack_model(binary_network(), "resnet20")
    checkpoints.save(tmp_path / "1bit.pth", packed | {"accuracy": 34.5, "test_images": 100})
    wrapped = {f"module.model.{key}": value for key, value in binary_network().state_dict().items()}
    torch.save({"net": wrapped, "acc": 1, "epoch": 7}, tmp_path / "foreign.pth")
    limit = ("--data-dir", small_data, "--limit-test", 5, "--batch-size", 3)
    printed = {name: call(tmp_path / name, *limit) for name in ("binary.pth", "1bit.pth", "foreign.pth")}
    accuracies = [ACCURACY.findall(text) for text in printed.values()]
    assert len(accuracies[0]) == 1
    assert accuracies[0] == accuracies[1] == accuracies[2]
    for text in printed.values():
        assert "Scored on: 5 test images, not all of them (--limit-test)" in text
        assert "latent" not in text
        assert re.search(r"^\w+ +0 +0 +-$", text, re.M)  # a class without images
    assert "module.model." in printed["foreign.pth"]
    assert "recorded accuracy 34.50% on 100 test images\n" in printed["1bit.pth"]
    assert "logit_scale" not in printed["1bit.pth"]
    assert "epoch 7" in printed["foreign.pth"]


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GIVEN = ("--mean", *IMAGENET["mean"], "--std", *IMAGENET["std"])


def printed_loss(text: str) -> float:
    return float(re.search(r"^Test loss: (\S+) nats", text, re.M)[1])


def test_a_file_of_others_tells_its_normalization(tmp_path: Path, small_data: Path, call: Callable) -> None:
    model = random_network()
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    split = cifar10.load(small_data, train=False).test
    for given, used in (((), {}), (GIVEN, IMAGENET)):
        printed = call(tmp_path / "foreign.pth", "--data-dir", small_data, *given)
        with torch.no_grad():
            logits = model(cifar10.normalize(split.images, **used))
        assert printed_loss(printed) == pytest.approx(F.cross_entropy(logits, split.labels).item(), abs=2e-4)
        (line,) = re.findall(r"^Normalization.*$", printed, re.M)
        assert ("0.485 0.456 0.406" if given else "0.4914 0.4822 0.4465") in line
        assert ("--mean" in line) == (not given)
    save_checkpoint(tmp_path / "ours.pth", "float")
    assert "Normalization" not in call(tmp_path / "ours.pth", "--data-dir", small_data)


def test_the_key_of_the_weights_can_be_given(tmp_path: Path, small_data: Path, call: Callable) -> None:
    both = {"state_dict": random_network(seed=1).state_dict(), "average": random_network().state_dict()}
    torch.save(both, tmp_path / "both.pth")
    torch.save(both["average"], tmp_path / "one.pth")
    found = call(tmp_path / "both.pth", "--weights-key", "average", "--data-dir", small_data)
    assert printed_loss(found) == printed_loss(call(tmp_path / "one.pth", "--data-dir", small_data))


def test_an_onnx_file_is_scored_as_the_network_it_is_of(tmp_path: Path, small_data: Path, call: Callable) -> None:
    save_checkpoint(tmp_path / "x.pth", "binary")
    content = onnx_export.export(binary_network(), cifar10.MEAN, cifar10.STD)
    (tmp_path / "x.onnx").write_bytes(content)
    printed = [call(tmp_path / name, "--data-dir", small_data) for name in ("x.pth", "x.onnx")]
    tables = {text[text.index("\nclass ") :] + ACCURACY.findall(text)[0] for text in printed}
    assert len(tables) == 1


def test_the_picture_shows_the_first_right_and_wrong_predictions_and_says_what_the_weights_are(
    tmp_path: Path, small_data: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latent weights' own score is not the result: a picture without the printed warning must tell."""
    drawn, titles = [], []
    monkeypatch.setattr(evaluating, "_draw_samples", lambda axes, title, chosen, *_: drawn.append(chosen))
    monkeypatch.setattr(evaluating.report, "draw_title", lambda figure, title: titles.append(title))
    save_checkpoint(tmp_path / "x.pth", "latent")
    call(tmp_path / "x.pth", "--data-dir", small_data, "--plot", tmp_path / "page.PNG")
    assert "latent weights of BinaryConnect, real-valued: " in titles[0]
    assert (tmp_path / "page.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    split = cifar10.load(small_data, train=False).test
    with torch.no_grad():
        hits = random_network()(cifar10.normalize(split.images)).argmax(1) == split.labels
    assert torch.equal(drawn[0], hits)
    assert torch.equal(drawn[1], ~hits)


def test_the_quantizer_of_latent_weights_is_named(tmp_path: Path, small_data: Path, call: Callable) -> None:
    for quantizer, named in (("ternary", True), ("stochastic_sign", False)):
        more = {"quantizer": quantizer, "metrics": {"test_accuracy": 12.5}}
        checkpoints.save(
            tmp_path / "x.pth", checkpoints.make("resnet20", "latent", random_network().state_dict(), **more)
        )
        printed = call("x.pth", "--data-dir", small_data, "--limit-test", 5)
        assert ("latent weights of the quantizer 'ternary'" in printed) == named
        assert ("binar" in printed or "Binar" in printed) != named
        assert "⚠ These are latent weights." in printed


def test_outputs_that_are_nan_are_an_error(tmp_path: Path, small_data: Path, call: Callable) -> None:
    model = random_network()
    for parameter in model.parameters():
        parameter.data.mul_(1e37)  # finite still
    checkpoints.save(tmp_path / "x.pth", checkpoints.make("resnet20", "float", model.state_dict()))
    with pytest.raises(UserError, match=r"x\.pth: the network's outputs are NaN"):
        call(tmp_path / "x.pth", "--data-dir", small_data)


@pytest.mark.usefixtures("no_data")
def test_bad_input_is_refused_before_the_data_is_asked_for(tmp_path: Path, call: Callable) -> None:
    good = save_checkpoint(tmp_path / "good.pth", "float")
    Path("text.pth").write_text("hello")
    Path("truncated.pth").write_bytes(good.read_bytes()[:-5000])
    Path("other.onnx").write_bytes(b"\x08\x08 something else")
    files = ("missing.pth", "text.pth", "truncated.pth", "missing.onnx", "other.onnx")
    plots = ("good.pth", "page.pdf", ".", "text.pth/page.png")
    options = (
        *(("--mean", 123, 116, 103), ("--std", 0, 1, 1), ("--batch-size", -1)),
        *(("--limit-test", 0), ("--device", "x"), ("--color",)),
    )
    for named, *arguments in (
        *((name, name) for name in files),
        *(("--plot", "good.pth", "--plot", plot) for plot in plots),
        *((option[0], "good.pth", *option) for option in options),
        ("--mean", "other.onnx", "--mean", 0, 0, 0),
        ("--weights-key", "other.onnx", "--weights-key", "x"),
    ):
        with pytest.raises(UserError, match=named) as error:
            call(*arguments)
        assert "\n" not in str(error.value), arguments
