"""eval_binarized.py, save_binary_model.py and load_binarized_example.py, run as processes one after the other."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import NEW_NETWORKS, binary_network, random_network, register_new_networks, save_checkpoint, sha256
from runs import caller
from script_server import ScriptServer

import cifar10
import save_binary_model
from engine import checkpoints
from engine.checkpoints import BEST, BINARIZED, PACKED
from engine.cli import UserError
from models import weight_layers
from models.quantizers import deterministic_sign

SCRIPTS = ("eval_binarized.py", "save_binary_model.py", "load_binarized_example.py")
ACCURACY = re.compile(r"^Test Accuracy: (\d+\.\d\d)%$", re.MULTILINE)


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory, small_data: Path, run_script: Callable) -> dict[str, object]:
    """The three scripts on a latent checkpoint: the folder, and what each of them printed.

    The folder's name has a space and a letter that is not ASCII, Python runs without assertions, and the last
    command writes for a terminal that knows ASCII only.
    """
    folder = tmp_path_factory.mktemp("workflow") / "zwei Wörter"
    folder.mkdir()
    save_checkpoint(folder / BEST, "latent")
    printed = {"folder": folder}
    optimized = {"PYTHONOPTIMIZE": "1"}
    for script in SCRIPTS:
        printed[script] = run_script(script, "--data-dir", small_data, cwd=folder, env=optimized).stdout
    plain = optimized | {"PYTHONIOENCODING": "ascii"}
    printed["packed example"] = run_script(SCRIPTS[2], PACKED, "--data-dir", small_data, cwd=folder, env=plain).stdout
    return printed


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    return caller(tmp_path, monkeypatch, capsys)


def test_the_binarized_file_holds_the_signs_and_what_the_source_said(workflow: dict) -> None:
    source, path = checkpoints.load(workflow["folder"] / BEST), workflow["folder"] / BINARIZED
    made, printed = checkpoints.load(path), workflow["eval_binarized.py"]
    assert "✓ All convolution/linear weights are binary {-1, +1}\n" in printed
    assert f"✓ Saved binarized model: {path.stat().st_size / 1e6:.2f} MB\n" in printed
    names = {f"{name}.weight" for name, _ in weight_layers(source.model())}
    for key, value in source.state_dict.items():
        assert torch.equal(made.state_dict[key], deterministic_sign(value) if key in names else value), key
    assert made.kind == "binary"
    assert made.source_sha256 == sha256(workflow["folder"] / BEST)
    assert (made.epoch, made.config, made.logit_scale) == (source.epoch, source.config, source.logit_scale)
    assert made.metrics["val_accuracy"] == 12.5
    assert f"{made.metrics['test_accuracy']:.2f}" == ACCURACY.findall(printed)[0]
    assert made.metrics["test_images"] == 100


def test_packing_proves_itself_and_measures_the_files(workflow: dict) -> None:
    printed, folder = workflow["save_binary_model.py"], workflow["folder"]
    assert "all 268,336 signs are identical" in printed
    assert "Same predictions on 100 of 100 images" in printed
    for name in (BEST, BINARIZED, PACKED):
        assert re.search(rf"\({name}\) +{(folder / name).stat().st_size:,} ", printed), name
    assert re.search(r"information limit.* 39,086 ", printed)
    assert re.search(r"one bit each +33,542 +32\.0x", printed)
    assert max(map(len, printed.partition("\n\n")[2].splitlines())) <= 80
    assert (folder / PACKED).stat().st_size <= 42_000
    packed = checkpoints.load(folder / PACKED).raw
    assert set(packed) == {
        *("format_version", "arch", "kind", "batchnorm", "signs", "floats"),
        *("accuracy", "test_images", "logit_scale", "source_sha256", "checksum"),
    }
    assert packed["source_sha256"] == sha256(folder / BEST)


def test_all_scripts_report_the_same_accuracy(workflow: dict) -> None:
    """Packing does it twice: for the binarized network, and for the one unpacked from the file."""
    found = [figure for name in (*SCRIPTS, "packed example") for figure in ACCURACY.findall(workflow[name])]
    assert len(found) == 5
    assert len(set(found)) == 1


def test_a_terminal_that_knows_ascii_only_gets_words_for_check_marks(workflow: dict) -> None:
    for example, expected in ((SCRIPTS[2], f"✓ {BINARIZED}"), ("packed example", f"[ok] {PACKED}")):
        assert f"{expected}: all 268,336 weights are -1 or +1" in workflow[example]
        assert workflow[example].count("classified as") == 5
    assert workflow["packed example"].isascii()


@pytest.mark.parametrize(
    ("script", "name", "option"),
    [
        ("eval_binarized.py", BINARIZED, "--output-dir"),
        ("save_binary_model.py", PACKED, "--output-dir"),
        ("save_binary_model.py", "m.onnx", "--onnx"),
        ("eval.py", "m.png", "--plot"),
    ],
)
def test_what_is_read_is_never_overwritten(
    script: str, name: str, option: str, workflow: dict, tmp_path: Path, scripts: ScriptServer
) -> None:
    shutil.copy(workflow["folder"] / BEST, tmp_path / name)
    before = sha256(tmp_path / name)
    target = tmp_path if option == "--output-dir" else tmp_path / name
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link.pth").symlink_to(tmp_path / name)
    child = scripts.run(script, "here/link.pth", option, target, cwd=tmp_path, expect=2)
    assert "here/link.pth" in child.errors
    assert len(child.errors.splitlines()) == 1
    assert sha256(tmp_path / name) == before


STRANGE = "a$\\frac$ \u6a21\u578b \udcff.pth"  # a formula that is none, letters that no font has, no UTF-8


@pytest.mark.parametrize(
    ("script", "options"),
    [("analyze_binary_weights.py", []), ("eval.py", ["--plot", "page.png", "--limit-test", 20])],
)
def test_names_that_are_hard_to_draw(
    script: str, options: list[object], workflow: dict, tmp_path: Path, small_data: Path, scripts: ScriptServer
) -> None:
    shutil.copy(workflow["folder"] / BEST, tmp_path / STRANGE)
    env = {"CIFAR10_DIR": str(small_data)}
    child = scripts.run(script, STRANGE, *options, cwd=tmp_path, env=env)
    assert child.errors == ""
    assert list(tmp_path.glob("*.png"))


def test_a_file_of_another_source_is_moved_aside(
    workflow: dict, tmp_path: Path, small_data: Path, run_script: Callable
) -> None:
    for name in (BINARIZED, PACKED):
        shutil.copy(workflow["folder"] / name, tmp_path / name)
    before = {name: sha256(tmp_path / name) for name in (BINARIZED, PACKED)}
    save_checkpoint(tmp_path / "other.pth", "latent", seed=1)
    binarize = ("eval_binarized.py", "other.pth", "--data-dir", small_data)
    assert "moved to previous-1" in run_script(*binarize, cwd=tmp_path).stdout
    assert "moved to previous-2" in run_script("save_binary_model.py", *binarize[1:], cwd=tmp_path).stdout
    assert sha256(tmp_path / "previous-1" / BINARIZED) == before[BINARIZED]
    assert sha256(tmp_path / "previous-2" / PACKED) == before[PACKED]
    assert checkpoints.load(tmp_path / PACKED).source_sha256 == sha256(tmp_path / "other.pth")
    run_script(*binarize, cwd=tmp_path)  # of the same source: replaced
    assert not (tmp_path / "previous-3").exists()


def test_packing_the_binarized_file_gives_the_same_bits(
    workflow: dict, tmp_path: Path, small_data: Path, run_script: Callable
) -> None:
    source = workflow["folder"] / BINARIZED
    arguments = (source, "--data-dir", small_data, "--limit-test", 20, "--keep-batchnorm", "--output-dir", "new/one")
    printed = run_script("save_binary_model.py", *arguments, cwd=tmp_path).stdout
    assert "20 test images, not all of them" in printed
    kept = checkpoints.load(tmp_path / "new/one" / PACKED)
    folded = checkpoints.load(workflow["folder"] / PACKED)
    assert torch.equal(kept.raw["signs"], folded.raw["signs"])
    assert kept.raw["batchnorm"] == "kept"
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in kept.model(fold=False).modules())


@pytest.mark.parametrize("script", ["eval_binarized", "save_binary_model"])
def test_the_warning_says_what_is_lost(script: str, tmp_path: Path, small_data: Path, call: Callable) -> None:
    name = BINARIZED if script == "eval_binarized" else PACKED
    options = ("--data-dir", small_data, "--limit-test", 10)
    printed = call(script, save_checkpoint(tmp_path / BEST, "float", arch="resnet32"), *options)
    assert printed.count("⚠") == 1
    assert checkpoints.load(tmp_path / name).arch == "resnet32"
    for scale, words in (
        (torch.tensor([0.5, 0.0, 0.5]).view(3, 1, 1), "ternary: zeros become +1 and the scale is lost"),
        (torch.full((3, 1, 1), 0.5), "binary up to a scale: the scale is lost"),
    ):
        model = binary_network()
        model.conv1.weight.data.mul_(scale)
        torch.save(model.state_dict(), tmp_path / "x.pth")
        (line,) = (line for line in call(script, "x.pth", *options).splitlines() if line.startswith("⚠"))
        assert f"in 1 of 20 layers are {words}; the signs alone are another network" in line
        made = checkpoints.load(tmp_path / name).model(fold=False)
        assert torch.equal(made.conv1.weight, deterministic_sign(model.conv1.weight))


@pytest.mark.parametrize("script", ["eval_binarized", "save_binary_model", "load_binarized_example"])
def test_latent_weights_of_another_quantizer_are_refused(
    script: str, tmp_path: Path, small_data: Path, call: Callable
) -> None:
    for quantizer in ("ternary", "stochastic_sign"):
        made = checkpoints.make("resnet20", "latent", random_network().state_dict(), quantizer=quantizer)
        checkpoints.save(tmp_path / f"{quantizer}.pth", made)
    with pytest.raises(UserError, match=r"ternary\.pth: .*'ternary'"):
        call(script, "ternary.pth", "--data-dir", "no-data")
    assert len(list(tmp_path.iterdir())) == 2
    if script != "load_binarized_example":  # which binarizes nothing
        call(script, "stochastic_sign.pth", "--data-dir", small_data, "--limit-test", 10)


@pytest.mark.parametrize(
    "script", ["analyze_binary_weights", "eval", "eval_binarized", "load_binarized_example", "save_binary_model"]
)
def test_every_script_takes_the_key_of_the_weights(script: str, tmp_path: Path, call: Callable) -> None:
    torch.save({"net": binary_network().state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="absent"):
        call(script, tmp_path / "x.pth", "--weights-key", "absent")


def test_another_normalization_goes_with_the_network(tmp_path: Path, small_data: Path, call: Callable) -> None:
    """Of a file of others into what is made from it, the ONNX file's graph included."""
    torch.save(random_network().state_dict(), tmp_path / "x.pth")
    other = ("--mean", 0.1, 0.2, 0.3, "--std", 0.9, 0.2, 0.5, "--data-dir", small_data)
    call("eval_binarized", "x.pth", *other)
    printed = call("save_binary_model", "x.pth", "--onnx", "x.onnx", *other)
    assert printed.count("Same predictions on 100 of 100 images") == 2
    images = cifar10.load(small_data, train=False).test
    with torch.no_grad():
        logits = binary_network()(cifar10.normalize(images.images, mean=(0.1, 0.2, 0.3), std=(0.9, 0.2, 0.5)))
    loss = torch.nn.functional.cross_entropy(logits, images.labels).item()
    assert checkpoints.load(tmp_path / BINARIZED).metrics["test_loss"] == pytest.approx(loss, abs=2e-4)
    for name in (BINARIZED, PACKED, "x.onnx"):
        printed = call("eval", tmp_path / name, "--data-dir", small_data)
        assert float(re.search(r"^Test loss: (\S+)", printed, re.M)[1]) == pytest.approx(loss, abs=2e-4), name
        assert ("Normalization: mean 0.1 0.2 0.3, std 0.9 0.2 0.5\n" in printed) == (name != "x.onnx")
        example = call("load_binarized_example", name, "--data-dir", small_data)
        assert ACCURACY.findall(example) == ACCURACY.findall(printed)
        assert example.count("classified as") == 5


def test_a_recorded_normalization_of_other_values_is_an_error(tmp_path: Path, call: Callable) -> None:
    model, zero, one = binary_network(), (0, 0, 0), (1, 1, 1)
    for recorded in (7, {"mean": zero}, {"mean": zero, "std": (1, 0, 1)}, {"mean": "abc", "std": one}):
        made = checkpoints.make("resnet20", "binary", model.state_dict(), normalization=recorded)
        checkpoints.save(tmp_path / "x.pth", made)
        with pytest.raises(UserError, match=r"x\.pth: its normalization"):
            call("load_binarized_example", tmp_path / "x.pth", "--data-dir", "no-data")


@pytest.mark.parametrize("arch", NEW_NETWORKS)
def test_networks_that_are_no_resnets(
    arch: str, tmp_path: Path, small_data: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scripts agree on them. The export to ONNX, for ResNets only, is refused before data is sought."""
    register_new_networks(monkeypatch)
    save_checkpoint(tmp_path / BEST, "latent", arch=arch)
    with pytest.raises(UserError, match=BEST):
        call("save_binary_model", "--onnx", "x.onnx", "--data-dir", "no-data")
    assert [path.name for path in tmp_path.iterdir()] == [BEST]
    steps = ["eval_binarized"], ["eval", BINARIZED], ["load_binarized_example"], ["save_binary_model"]
    printed = [call(*step, "--data-dir", small_data) for step in (*steps, ["eval", PACKED])]
    printed.append(call("load_binarized_example", PACKED, "--data-dir", small_data))
    assert len({figure for text in printed for figure in ACCURACY.findall(text)}) == 1


@pytest.mark.parametrize(
    ("script", "name", "advice"),
    [
        ("eval_binarized", BINARIZED, "eval.py"),
        ("eval_binarized", PACKED, "eval.py"),
        ("save_binary_model", PACKED, "packed already"),
        ("load_binarized_example", BEST, "eval_binarized.py"),
        ("load_binarized_example", "missing.pth", "no such file"),
    ],
)
def test_the_wrong_kind_is_refused_before_data_is_sought(
    workflow: dict, script: str, name: str, advice: str, tmp_path: Path, call: Callable
) -> None:
    with pytest.raises(UserError, match=f"{re.escape(name)}: .*{advice}"):
        call(script, workflow["folder"] / name, "--data-dir", "no-data")
    assert list(tmp_path.iterdir()) == []


def test_a_proof_that_fails_leaves_the_old_file(
    workflow: dict, tmp_path: Path, small_data: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(workflow["folder"] / PACKED, tmp_path / PACKED)
    before = sha256(tmp_path / PACKED)
    real = save_binary_model.pack_model

    def flip_one(*arguments: object, **options: object) -> dict:
        packed = real(*arguments, **options)
        packed["signs"][1000] ^= 1
        return packed

    monkeypatch.setattr(save_binary_model, "pack_model", flip_one)
    with pytest.raises(RuntimeError, match="signs differ"):
        call("save_binary_model", workflow["folder"] / BEST, "--data-dir", small_data, "--limit-test", 2)
    assert [path.name for path in tmp_path.iterdir()] == [PACKED]
    assert sha256(tmp_path / PACKED) == before


@pytest.mark.parametrize("difference", [1e-6, 0.5, float("nan")])
def test_logits_agree_to_rounding_or_not(difference: float) -> None:
    expected = torch.randn(8, 10)
    found = expected.clone()
    found[3, 4] += difference
    with contextlib.nullcontext() if difference < 0.1 else pytest.raises(RuntimeError, match="rounding"):
        save_binary_model.prove_same_logits(expected, found)


@pytest.mark.real_data
@pytest.mark.full
def test_the_packed_file_predicts_the_same_on_all_real_test_images(
    workflow: dict, real_data: Path, tmp_path: Path, run_script: Callable
) -> None:
    arguments = (workflow["folder"] / BEST, "--data-dir", real_data, "--output-dir", tmp_path)
    printed = run_script("save_binary_model.py", *arguments, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"}).stdout
    assert "Same predictions on 10,000 of 10,000 images" in printed
