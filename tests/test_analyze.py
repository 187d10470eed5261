"""analyze_binary_weights.py: its numbers against weights whose numbers are known, its verdicts word by word."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from networks import NEW_NETWORKS, binary_network, random_network, register_new_networks, save_checkpoint
from runs import caller

import analyze_binary_weights as analyze
from analyze_binary_weights import WeightStats
from engine import checkpoints
from engine.binarized import find_scale
from engine.cli import UserError
from engine.report import fixed, share
from models import build, weight_layers
from models.bitpack import information_bytes, pack_model

TOTAL = 268_336


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """call("x.pth"): main() in this process, in tmp_path, without its picture; what it printed, at most 80 wide."""
    monkeypatch.setattr(analyze, "draw", lambda *_, **__: None)
    call = caller(tmp_path, monkeypatch, capsys)

    def run(*arguments: object) -> str:
        printed = call("analyze_binary_weights", *arguments)
        assert max(map(len, printed.splitlines())) <= 80
        return printed

    return run


def test_statistics_of_weights_that_are_known() -> None:
    w = torch.tensor([[-1.0, -1.0, 1.0, 0.0], [-0.0, 0.5, 2.0, -3.5]])
    stats = WeightStats("x", w)
    assert (stats.shape, stats.count, stats.min, stats.max, stats.mean) == ("2x4", 8, -3.5, 2.0, -0.25)
    assert stats.std == pytest.approx(w.numpy().std())
    assert (stats.minus_one, stats.plus_one, stats.between, stats.in_range) == (2, 1, 3, 6)
    assert stats.distance == pytest.approx((0 + 0 + 0 + 1 + 1 + 0.5 + 1 + 2.5) / 8)
    assert stats.bytes == 32
    assert WeightStats("b", torch.ones(9)).bytes == 2


def test_a_value_next_to_one_is_not_one() -> None:
    below, above = torch.nextafter(torch.tensor(1.0), torch.tensor([0.0, 2.0]))
    stats = WeightStats("x", torch.stack([below, above, torch.tensor(-1.0)]))
    assert (stats.plus_one, stats.between, stats.in_range, stats.binary) == (0, 1, 2, False)


def test_the_report_on_latent_weights(tmp_path: Path, run_script: Callable) -> None:
    """Every weight is 0.5 but the last one of each layer, 0.25, and eight of conv1; BatchNorm does not count."""
    model = build("resnet20")
    for _, layer in weight_layers(model):
        torch.nn.init.constant_(layer.weight, 0.5)
        layer.weight.data.view(-1)[-1] = 0.25
    model.bn1.weight.data.fill_(77.0)
    model.conv1.weight.data.view(-1)[:8] = torch.tensor([-1, -1, -1, 1, 1, 0.0, -0.0, -0.25])
    checkpoints.save(tmp_path / "best_model.pth", checkpoints.make("resnet20", "latent", model.state_dict()))
    printed = run_script("analyze_binary_weights.py", "--output-dir", "new", cwd=tmp_path).stdout
    assert (
        "⚠ Weights are CLIPPED to [-1, 1] but NOT fully binarized\n"
        "  100.00% of weights are between -1 and +1\n"
        "  Saturated, exactly -1 or +1: 5 (<0.01%)\n"
    ) in printed
    assert "prove" not in printed
    number = r"(-?[\d.,]+%?)"
    rows = {
        name: re.findall(rf"^{name}\s+(?:[\dx]+x\d+)?\s*" + r"\s+".join([number] * 6) + "$", printed, re.M)
        for name in ("conv1", "layer3.0.conv1", "linear", "all 20 layers")
    }
    assert rows["conv1"][0][:3] == ("432", "-1.0000", "1.0000")
    assert rows["conv1"][1][:5] == ("100.00%", "3", "2", "427", fixed((423 * 0.5 + 0.75 + 2 + 0.75) / 432))
    assert rows["layer3.0.conv1"][0] == ("18,432", "0.2500", "0.5000", "0.5000", "0.0018", "32")
    assert rows["linear"][1] == ("100.00%", "0", "0", "640", "0.5004", "2,560")
    assert rows["all 20 layers"][0][0] == "268,336"
    assert rows["all 20 layers"][1] == ("100.00%", "3", "2", "268,331", "0.5000", "1,073,344")
    assert re.search(r"^weights alone +1,073,344 +33,542 +32\.00x$", printed, re.M)
    assert re.search(r"in float32 +1,084,392 +44,590 +24\.32x$", printed, re.M)
    assert re.search(r"BatchNorm folded +1,078,888 +39,086 +27\.60x$", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 80
    (saved,) = (tmp_path / "new").iterdir()
    assert saved.name.endswith("_histograms.png")
    assert saved.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_binary_weights_and_the_one_bit_file_agree(tmp_path: Path, call: Callable) -> None:
    model = binary_network()
    plus = sum(int((layer.weight > 0).sum()) for _, layer in weight_layers(model))
    expected = (
        "✓ Weights appear to be BINARIZED (all values are at or very close to -1 or +1)\n"
        f"  Exactly -1: {TOTAL - plus:,} ({100 - 100 * plus / TOTAL:.2f}%)\n"
        f"  Exactly +1: {plus:,} ({100 * plus / TOTAL:.2f}%)\n"
        "  In between: 0 (0.00%)\n"
    )
    save_checkpoint(tmp_path / "binary.pth", "binary")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for keep in (False, True):
        packed = checkpoints.make("resnet20", checkpoints.BINARY_1BIT, None)
        checkpoints.save(tmp_path / f"1bit-{keep}.pth", packed | pack_model(model, "resnet20", keep_batchnorm=keep))
    printed = {path.name: call(path.name) for path in tmp_path.glob("*.pth")}
    assert len(printed) == 4
    for name, text in printed.items():
        assert expected in text
        assert text.count("BatchNorm folded") == (name != "1bit-False.pth")
    assert len({text[text.index("layer  ") : text.index("size of")] for text in printed.values()}) == 1


CLIPPED = ["⚠ Weights are CLIPPED to [-1, 1] but NOT fully binarized"]
UNKNOWN = "does not prove BinaryConnect: 99.98 % of a published float ResNet-20 lies in [-1, 1]."
INSIDE = torch.tensor([-1.0, 1.0, 0.25, -0.0])
OUTSIDE = torch.cat([torch.full((99_999,), 0.5), torch.tensor([1.0001])])


@pytest.mark.parametrize(
    ("w", "kind", "expected"),
    [
        (INSIDE, "latent", [*CLIPPED, "100.00% of weights are between -1 and +1", "-1 or +1: 2 (50.00%)"]),
        (INSIDE, "unknown", [*CLIPPED, "-1 or +1: 2 (50.00%)", UNKNOWN]),
        (INSIDE, "float", ["✗ Weights are full precision (float)", "-1 or +1: 2 (50.00%)"]),
        (torch.tensor([1.0, -1.0]), "latent", ["✓ Weights appear to be BINARIZED"]),
        *(
            (OUTSIDE, kind, ["✗ Weights are neither clipped", ">99.99% of weights", "Outside: 1 (<0.01%), min 0.5"])
            for kind in ("latent", "float", "unknown")
        ),
    ],
)
def test_the_verdict_depends_on_range_and_kind(w: torch.Tensor, kind: str, expected: list[str]) -> None:
    """Of a file whose one layer has these weights."""
    stats = WeightStats("all", w)
    text = " ".join(" ".join(analyze.verdict([stats], stats, kind)).split())
    assert all(words in text for words in expected)
    assert ("CLIPPED" in text) == (expected[0] in CLIPPED)
    assert ("prove" in text) == (UNKNOWN in expected)


def changed(w: torch.Tensor, channel: int, where: int | slice, value: float) -> torch.Tensor:
    w = w.clone()
    w[channel, where] = value
    return w


SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]).repeat(6, 2)  # (6, 16)
PER_CHANNEL = torch.arange(1.0, 7.0)[:, None] / 7 * SIGNS
ZEROS = torch.ones(6, 16).scatter(1, torch.arange(6)[:, None], 0.0)  # one in each channel
STEP = torch.where(torch.arange(16) % 2 == 0, 1.0, 1 + 2**-10)  # 1 and the next number of float16
LAYER, CHANNEL = "layer", "output channel"
SCALES = {  # name: weights, (ternary, per, smallest a, largest a, zeros)
    "one a": (0.37 * SIGNS, (False, LAYER, 0.37, 0.37, 0)),
    "exactly -1 and +1": (SIGNS, (False, LAYER, 1, 1, 0)),
    "an a per channel": (PER_CHANNEL, (False, CHANNEL, 1 / 7, 6 / 7, 0)),
    "all plus": (torch.full((6, 16), 0.2), (False, LAYER, 0.2, 0.2, 0)),
    "a channel of zeros": (changed(0.5 * SIGNS, 3, slice(None), 0), (False, CHANNEL, 0, 0.5, 16)),
    "rounded to float16": (PER_CHANNEL.half().float(), (False, CHANNEL, 1 / 7, 6 / 7, 0)),
    "one step of float16 apart": (0.5 * SIGNS * STEP, (False, LAYER, 0.5, 0.5, 0)),
    "two steps of float16 apart": (0.5 * SIGNS * STEP**2, None),
    "one weight of another size": (changed(0.5 * SIGNS, 0, 0, 0.4), None),
    "tiny": (1e-30 * SIGNS, (False, LAYER, 1e-30, 1e-30, 0)),
    "ternary": (0.3 * SIGNS * ZEROS, (True, LAYER, 0.3, 0.3, 6)),
    "ternary per channel": (PER_CHANNEL * ZEROS, (True, CHANNEL, 1 / 7, 6 / 7, 6)),
    "ternary with a channel of zeros": (
        changed(PER_CHANNEL * ZEROS, 0, slice(None), 0),
        (True, CHANNEL, 2 / 7, 6 / 7, 21),
    ),
    "zeros only": (torch.zeros(6, 16), (True, LAYER, 0, 0, 96)),
    "one weight a channel": (PER_CHANNEL[:, :1], None),
    "real numbers": (torch.linspace(-1, 1, 96).view(6, 16), None),
}


@pytest.mark.parametrize(("w", "expected"), SCALES.values(), ids=SCALES)
def test_a_scale_is_found(w: torch.Tensor, expected: tuple | None) -> None:
    found = find_scale(w)
    if expected is None:
        assert found is None
    else:
        assert (found.ternary, found.per, found.zeros) == (expected[0], expected[1], expected[4])
        assert (found.low, found.high) == pytest.approx(expected[2:4], rel=2**-10, abs=0)


def scaled_file(path: Path, per_channel: bool = False, zeros: float = 0, real: tuple[str, ...] = ()) -> Path:
    """A file of others: weights a * sign(w), a the mean of |w|, a share of `zeros`; layers in `real` unchanged."""
    model = random_network()
    with torch.no_grad():
        for name, layer in weight_layers(model):
            w = layer.weight
            a = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1)) if per_channel else w.abs().mean()
            if name not in real:
                w.copy_(torch.where(torch.rand_like(w) < zeros, 0.0, a * w.sign()))
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_that_are_binary_up_to_a_scale(tmp_path: Path, call: Callable, per_channel: bool) -> None:
    path = scaled_file(tmp_path / "x.pth", per_channel)
    printed, words = call("x.pth"), "output channel" if per_channel else "layer"
    layers = weight_layers(checkpoints.load(path).model())
    scales = [a for _, layer in layers for a in layer.weight.abs().flatten(1)[:, 0].tolist()]
    assert f"Weights are BINARY UP TO A SCALE (-a and +a in each {words})\n" in printed
    assert f"a from {min(scales):.4g} to {max(scales):.4g}\n" in printed
    assert len(re.findall(rf"^layer\S+ +-a and \+a in each {words} +0\.\d+ +0\.\d+ +0\.00%$", printed, re.M)) == 18
    size = TOTAL // 8 + 4 * (698 if per_channel else 20)
    assert re.search(rf"^all 20 layers +100\.00% .* {size:,}$", printed, re.M)


@pytest.mark.parametrize("per_channel", [False, True])
def test_ternary_weights(tmp_path: Path, call: Callable, per_channel: bool) -> None:
    scaled_file(tmp_path / "x.pth", per_channel, zeros=0.36)
    printed = call("x.pth")
    zeros = float(re.search(r"Weights are TERNARY \(-a, 0, \+a\), ([\d.]+)% zeros\n", printed)[1])
    assert zeros == pytest.approx(36, abs=0.5)
    assert f"one in each {'output channel' if per_channel else 'layer'}" in printed


def test_a_zero_that_torch_sign_left_is_ternary(tmp_path: Path, call: Callable) -> None:
    model = binary_network()
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = 0
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert "Weights are TERNARY (-a, 0, +a), <0.01% zeros\n" in call("x.pth")


def test_a_mixed_file_is_described_layer_by_layer(tmp_path: Path, call: Callable) -> None:
    scaled_file(tmp_path / "x.pth", True, real=("conv1", "linear"))
    printed = call("x.pth")
    assert "Weights are MIXED" in printed
    assert "18 of 20 layers: -a and +a in each output channel\n" in printed
    assert "2 of 20 layers: real numbers\n" in printed
    assert re.search(r"^conv1 +real numbers", printed, re.M)
    assert re.search(r"^layer3\.2\.conv2 +-a and \+a in each output channel", printed, re.M)


def test_one_bit_is_no_size_for_latent_weights_of_another_quantizer(tmp_path: Path, call: Callable) -> None:
    weights = {name: value.clip(-1, 1) for name, value in random_network().state_dict().items()}
    for quantizer in ("ternary", "stochastic_sign"):
        checkpoints.save(tmp_path / "x.pth", checkpoints.make("resnet20", "latent", weights, quantizer=quantizer))
        assert ("1-bit weights" in call("x.pth")) == (quantizer == "stochastic_sign")


@pytest.mark.parametrize("arch", NEW_NETWORKS)
def test_networks_that_are_no_resnets(
    arch: str, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_new_networks(monkeypatch)
    model = checkpoints.load(save_checkpoint(tmp_path / "x.pth", "latent", arch=arch)).model()
    printed, layers = call("x.pth"), weight_layers(model)
    count = sum(layer.weight.numel() for _, layer in layers)
    assert re.search(rf"^all {len(layers)} layers +{count:,} ", printed, re.M)
    assert re.search(rf" {information_bytes(model):,} +[\d.]+x$", printed, re.M)
    assert all(re.search(rf"^{re.escape(name)} ", printed, re.M) for name, _ in layers)


def test_a_share_is_0_or_100_only_where_it_is_exact() -> None:
    shown = [share(part, 10**6) for part in (0, 1, 123_456, 10**6 - 1, 10**6)]
    assert shown == ["0.00%", "<0.01%", "12.35%", ">99.99%", "100.00%"]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -999.99, 1e-9, -1e-38, 123456.0, 3e38, -3e38])
def test_numbers_keep_to_their_column(value: float) -> None:
    assert len(fixed(value)) <= 8
    assert float(fixed(value)) == pytest.approx(value, rel=0.05, abs=1e-45)
    assert not fixed(-0.0).startswith("-")


def test_the_largest_network_and_wild_values_fit_the_screen(tmp_path: Path, call: Callable) -> None:
    model = random_network("resnet110")
    model.conv1.weight.data.mul_(3e38)
    model.linear.weight.data.mul_(1e-30)
    checkpoints.save(tmp_path / "x.pth", checkpoints.make("resnet110", "float", model.state_dict()))
    assert sum(line.startswith("layer3.17.conv2 64x64x3x3") for line in call("x.pth").splitlines()) == 1


@pytest.mark.parametrize("clipped", [True, False])
def test_the_picture_takes_any_weights(tmp_path: Path, clipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the label beside the histogram is on the page: its ticks are longest where a bar is near 17.5 %."""
    left, save = [], Figure.savefig

    def look(figure: Figure, *args: object, **more: object) -> None:
        left.append(figure.axes[0].yaxis.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).x0)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", look)
    steps = torch.cat([torch.linspace(-0.99, 0.99, 800), torch.full((180,), -1.0)])
    weights = {"a": steps, "b": torch.zeros(4), "c": torch.tensor([1.0, -1.0])}
    if not clipped:
        weights["d"] = torch.tensor([3e38, -1.0, 0.0])
    analyze.draw(tmp_path / "x.png", "title", weights, clipped=clipped)
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert left[0] >= 0


def test_the_tick_labels_of_a_small_panel_do_not_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first range touched in a ResNet-56 once, those of the next two are the longest."""
    gaps, save = [], Figure.savefig

    def look(figure: Figure, *args: object, **more: object) -> None:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for axes in figure.axes[1:]:
            low, high = axes.get_xlim()
            shown = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
            boxes = [label.get_window_extent(renderer) for label in shown]
            gaps.append(min(right.x0 - left.x1 for left, right in pairwise(boxes)))
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", look)
    weights = {str(reach): torch.linspace(-reach, reach, 99) for reach in (0.0781, 0.00139, 0.000139, 1.0)}
    analyze.draw(tmp_path / "x.png", "title", weights, clipped=False)
    assert len(gaps) == len(weights)
    assert min(gaps) > 1  # pixels


def test_bad_input_is_named(tmp_path: Path, call: Callable) -> None:
    save_checkpoint(tmp_path / "good.pth", "latent")
    model = random_network()
    model.layer2[1].conv1.weight.data[0, 0, 0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    for arguments, named in (
        (["nan.pth"], r"nan\.pth: layer2\.1\.conv1\.weight"),
        (["missing.pth"], "missing"),
        (["good.pth", "--output-dir", "good.pth"], "--output-dir"),
        (["good.pth", "--depth", 20], "--depth"),
    ):
        with pytest.raises(UserError, match=named):
            call(*arguments)


@pytest.mark.parametrize("script", ["analyze_binary_weights.py", "eval.py"])
def test_an_error_is_one_line_and_exit_status_2(script: str, tmp_path: Path, run_script: Callable) -> None:
    done = run_script(script, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: best_model\.pth: .*\n", done.stderr)
