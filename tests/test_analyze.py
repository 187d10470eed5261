"""analyze_binary_weights.py: its numbers against weights whose numbers are known, its verdicts word by word."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from networks import binary_network, random_network, save_checkpoint

import analyze_binary_weights as analyze
from analyze_binary_weights import WeightStats, verdict
from engine import checkpoints
from engine.cli import UserError
from engine.report import fixed, share
from models import ResNetS, build
from models.bitpack import pack_model
from models.resnet_s import weight_layers

TOTAL = 268_336


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """call("x.pth"): main() in this process, without its picture; what it printed."""
    monkeypatch.setattr(analyze, "draw", lambda *_, **__: None)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["analyze_binary_weights.py", *map(str, arguments)])
        analyze.main()
        return capsys.readouterr().out

    return run


def known_network(value: float = 0.5) -> ResNetS:
    """Every weight is `value` but eight of conv1; BatchNorms, which do not count, far outside of [-1, 1]."""
    model = build("resnet20")
    for _, layer in weight_layers(model):
        torch.nn.init.constant_(layer.weight, value)
    model.bn1.weight.data.fill_(77.0)
    model.conv1.weight.data.view(-1)[:8] = torch.tensor([-1, -1, -1, 1, 1, 0.0, -0.0, -0.25])
    return model


def save(path: Path, model: ResNetS, kind: str) -> Path:
    checkpoints.save(path, checkpoints.make("resnet20", kind, model.state_dict()))
    return path


def test_statistics_of_weights_that_are_known() -> None:
    w = torch.tensor([[-1.0, -1.0, 1.0, 0.0], [-0.0, 0.5, 2.0, -3.5]])
    stats = WeightStats.of("x", "2x4", w)
    assert (stats.count, stats.min, stats.max, stats.mean) == (8, -3.5, 2.0, -0.25)
    assert stats.std == pytest.approx((sum((v + 0.25) ** 2 for v in w.view(-1).tolist()) / 8) ** 0.5)
    assert (stats.minus_one, stats.plus_one, stats.between, stats.in_range) == (2, 1, 3, 6)
    assert stats.distance == pytest.approx((0 + 0 + 0 + 1 + 1 + 0.5 + 1 + 2.5) / 8)
    assert (stats.bits, stats.bytes) == (32, 32)
    assert (WeightStats.of("b", "9", torch.ones(9)).bits, WeightStats.of("b", "9", torch.ones(9)).bytes) == (1, 2)


def test_a_value_next_to_one_is_not_one() -> None:
    below, above = torch.nextafter(torch.tensor(1.0), torch.tensor([0.0, 2.0]))
    stats = WeightStats.of("x", "3", torch.stack([below, above, torch.tensor(-1.0)]))
    assert (stats.plus_one, stats.between, stats.in_range, stats.binary) == (0, 1, 2, False)


def test_the_report_on_latent_weights(tmp_path: Path, run_script: Callable) -> None:
    save(tmp_path / "best_model.pth", known_network(), "latent")
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
    assert rows["conv1"][1][:5] == ("100.00%", "3", "2", "427", fixed((424 * 0.5 + 2 + 0.75) / 432))
    assert rows["layer3.0.conv1"][0] == ("18,432", "0.5000", "0.5000", "0.5000", "0.0000", "32")
    assert rows["linear"][1] == ("100.00%", "0", "0", "640", "0.5000", "2,560")
    assert rows["all 20 layers"][0][0] == "268,336"
    assert rows["all 20 layers"][1] == ("100.00%", "3", "2", "268,331", "0.5000", "1,073,344")
    assert re.search(r"^weights alone +1,073,344 +33,542 +32\.00x$", printed, re.M)
    assert re.search(r"in float32 +1,084,392 +44,590 +24\.32x$", printed, re.M)
    assert re.search(r"BatchNorm folded +1,078,888 +39,086 +27\.60x$", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 80
    (saved,) = (tmp_path / "new").iterdir()
    assert saved.name.endswith("_histograms.png")
    picture = saved.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")


def test_binary_weights_and_the_one_bit_file_agree(tmp_path: Path, call: Callable) -> None:
    model = binary_network()
    plus = sum(int((layer.weight > 0).sum()) for _, layer in weight_layers(model))
    expected = (
        "✓ Weights appear to be BINARIZED (all values are at or very close to -1 or +1)\n"
        f"  Exactly -1: {TOTAL - plus:,} ({100 - 100 * plus / TOTAL:.2f}%)\n"
        f"  Exactly +1: {plus:,} ({100 * plus / TOTAL:.2f}%)\n"
        "  In between: 0 (0.00%)\n"
    )
    save(tmp_path / "binary.pth", model, "binary")
    for keep in (False, True):
        packed = checkpoints.make("resnet20", checkpoints.BINARY_1BIT, None) | pack_model(
            model, "resnet20", keep_batchnorm=keep
        )
        checkpoints.save(tmp_path / f"1bit-{keep}.pth", packed)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    printed = [call(path, "--output-dir", tmp_path) for path in sorted(tmp_path.glob("*.pth"))]
    assert len(printed) == 4
    for text in printed:
        assert expected in text
        assert "Saturated" not in text
        assert text.count("BatchNorm folded") == ("1bit-False" not in text)
    tables = {text[text.index("layer  ") : text.index("size of")] for text in printed}
    assert len(tables) == 1


def test_the_verdict_depends_on_range_and_kind() -> None:
    inside = WeightStats.of("all", "", torch.tensor([-1.0, 1.0, 0.25, -0.0]))
    clipped = "⚠ Weights are CLIPPED to [-1, 1] but NOT fully binarized"
    in_range = "  100.00% of weights are between -1 and +1"
    saturated = "  Saturated, exactly -1 or +1: 2 (50.00%)"
    assert verdict(inside, "latent") == [clipped, in_range, saturated]
    unknown = verdict(inside, "unknown")
    assert unknown[:3] == [clipped, in_range, saturated]
    assert "does not prove BinaryConnect: 99.98 % of a published" in " ".join(" ".join(unknown[3:]).split())
    as_float = verdict(inside, "float")
    assert "CLIPPED" not in "".join(as_float)
    assert as_float[0].startswith("✗ Weights are full precision")
    assert as_float[1].startswith(in_range)


@pytest.mark.parametrize("kind", ["latent", "float", "unknown"])
def test_one_weight_outside_is_neither(kind: str) -> None:
    stats = WeightStats.of("all", "", torch.cat([torch.full((99_999,), 0.5), torch.tensor([1.0001])]))
    lines = verdict(stats, kind)
    assert lines[0] == "✗ Weights are neither clipped to [-1, 1] nor binarized"
    assert lines[1] == "  >99.99% of weights are between -1 and +1"
    assert lines[2] == "  Outside: 1 (<0.01%), min 0.5, max 1.0001"
    assert ("but those are clipped" in lines[-1]) == (kind == "latent")


def test_latent_weights_that_are_all_saturated_are_binary() -> None:
    assert verdict(WeightStats.of("all", "", torch.tensor([1.0, -1.0])), "latent")[0].startswith("✓")


def test_a_share_is_0_or_100_only_where_it_is_exact() -> None:
    assert [share(part, 10**6) for part in (0, 1, 123_456, 10**6 - 1, 10**6)] == [
        "0.00%",
        "<0.01%",
        "12.35%",
        ">99.99%",
        "100.00%",
    ]


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
    printed = call(tmp_path / "x.pth", "--output-dir", tmp_path)
    lines = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("layer3.17.conv2 64x64x3x3") for line in lines) == 1


@pytest.mark.parametrize("clipped", [True, False])
def test_the_picture_takes_any_weights(tmp_path: Path, clipped: bool) -> None:
    weights = {"a": torch.zeros(4), "b": torch.tensor([1.0, -1.0]), "c": torch.tensor([3e38, -1.0, 0.0])}
    if clipped:
        weights["c"] = weights["c"].clamp(-1, 1)
    layers = [replace(WeightStats.of(name, "n", w), count=w.numel()) for name, w in weights.items()]
    analyze.draw(tmp_path / "x.png", "title", layers, weights, clipped=clipped)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_label_beside_the_histogram_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ticks have most characters where the highest bar has a fifth of the weights: 17.5."""
    left = []

    def look(figure: Figure, *args: object, **more: object) -> None:
        left.append(figure.axes[0].yaxis.get_tightbbox(figure.canvas.get_renderer()).x0)
        save(figure, *args, **more)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", look)
    w = torch.cat([torch.linspace(-0.99, 0.99, 800), torch.full((180,), -1.0)])
    analyze.draw(tmp_path / "x.png", "title", [WeightStats.of("a", "980", w)] * 5, {"a": w}, clipped=True)
    assert left[0] >= 0


def test_bad_input_is_named(tmp_path: Path, call: Callable) -> None:
    good = save_checkpoint(tmp_path / "good.pth", "latent")
    model = random_network()
    model.layer2[1].conv1.weight.data[0, 0, 0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"nan\.pth: layer2\.1\.conv1\.weight holds NaN"):
        call(tmp_path / "nan.pth", "--output-dir", tmp_path)
    for name in ("other.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            call(tmp_path / name, "--output-dir", tmp_path)
    with pytest.raises(UserError, match="--output-dir"):
        call(good, "--output-dir", good)
    with pytest.raises(UserError, match="--depth"):
        call(good, "--depth", 20)


def test_an_error_is_one_line_and_exit_status_2(tmp_path: Path, run_script: Callable) -> None:
    done = run_script("analyze_binary_weights.py", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: best_model\.pth: no such file; .*\n", done.stderr)
