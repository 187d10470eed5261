"""A run that was stopped goes on as if it never had been: bit for bit, with its own options, and nowhere else."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_files
import pytest
import torch
from networks import save_checkpoint
from runs import differences, essence, one_line, resume_options, run_here, small_options
from script_server import ScriptServer
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, NAdam

import main
import main_binary
from engine import checkpoints, runtime
from engine.checkpoints import BEST, FINAL, LAST
from engine.cli import Interrupted, UserError
from engine.training.run import Run
from engine.training.state import in_own_memory

# -- exact -------------------------------------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_bit_identical(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path
) -> None:
    """And another seed gives another network."""
    scripts.run("main_binary.py", *small_options(small_data), "--output-dir", tmp_path / "same", cwd=tmp_path)
    assert differences(essence(tmp_path / "same"), essence(binary_run)) == []
    other = small_options(small_data, epochs=1)
    scripts.run("main_binary.py", *other, "--seed", 1, "--output-dir", tmp_path / "other", cwd=tmp_path)
    assert differences(essence(tmp_path / "other")[FINAL]["state_dict"], essence(binary_run)[FINAL]["state_dict"])


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("main_binary.py", ["--stochastic", "--val-size", 10]),
        ("main_binary.py", ["--optimizer", "sgd", "--latent-lr", 3, "--precision", "float32"]),
        ("main_binary.py", ["--optimizer", "adam", "--teacher", "teacher.pth"]),
        ("main.py", ["--val-size", 20, "--weight-decay", 0.01, "--teacher", "teacher.pth"]),
    ],
    ids=["muon, stochastic", "sgd, float32", "adam, teacher", "float, teacher"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path, script: str, more: list[object]
) -> None:
    """Stopped within the second epoch, and while it is scored."""
    shutil.copy(float_run / BEST, tmp_path / "teacher.pth")
    options = [*small_options(small_data), *more]
    scripts.run(script, *options, "--output-dir", "whole", cwd=tmp_path)
    for at, status in ((("step", 6, "SIGINT"), 130), (("scoring", 1, "SIGTERM"), 143)):
        scripts.run(script, *options, "--output-dir", "parts", cwd=tmp_path, at=at, expect=status)
        options = resume_options(small_data)
    scripts.run(script, *options, "--output-dir", "parts", cwd=tmp_path)
    assert differences(essence(tmp_path / "parts"), essence(tmp_path / "whole")) == []
    assert [row["epoch"] for row in essence(tmp_path / "parts")["metrics.csv"]] == ["1", "2", "3"]


def stop_at_step(number: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    """Run something until its `number`-th training step, which is interrupted."""
    backward, left = torch.Tensor.backward, [number]

    def counted(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted(2)
        backward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", counted)
        with pytest.raises(Interrupted):
            run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "optimizer"),
    [
        (main_binary, lambda groups, **_: AdamW(groups, fused=True)),
        (main_binary, lambda groups, **_: Adagrad(groups)),  # has state before its first step
        (main_binary, lambda groups, **_: NAdam(groups)),
        (main_binary, lambda groups, **_: Adafactor(groups)),  # whose state has other shapes than the weights
        (main_binary, lambda groups, **_: SGD(groups)),  # has no state
        (main, lambda weights, **_: AdamW(weights, amsgrad=True)),
    ],
    ids=["AdamW", "Adagrad", "NAdam", "Adafactor", "plain SGD", "AdamW of main.py"],
)
def test_any_optimizer_resumes_bit_for_bit(
    script: Any, optimizer: Callable[..., Any], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is put in the place of the one that the script names."""
    if script is main_binary:
        monkeypatch.setitem(main_binary.LATENT_OPTIMIZERS, "adam", (optimizer, 0.01, {}))
    else:
        monkeypatch.setattr(torch.optim, "SGD", optimizer)
    options = small_options(small_data, epochs=2) + (["--optimizer", "adam"] if script is main_binary else [])
    run_here(script, tmp_path / "whole", monkeypatch, *options)
    stop_at_step(6, monkeypatch, lambda: run_here(script, tmp_path / "parts", monkeypatch, *options))
    run_here(script, tmp_path / "parts", monkeypatch, *resume_options(small_data))
    assert differences(essence(tmp_path / "parts"), essence(tmp_path / "whole")) == []


def test_an_optimizer_that_could_not_resume_is_refused_before_training(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(main_binary.LATENT_OPTIMIZERS, "adam", (lambda groups: LBFGS(groups), 0.01, {}))
    with pytest.raises(UserError, match="LBFGS"):
        run_here(main_binary, tmp_path, monkeypatch, *small_options(small_data), "--optimizer", "adam")
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


@pytest.mark.parametrize("how", ["as saved", "in one place", "the other way round"])
def test_moments_lie_in_memory_as_their_weights_do(how: str) -> None:
    """Fused optimizers go through both side by side: another order would be other numbers, one place a crash."""
    model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.rand(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for moments in saved["state"].values():
        if how == "in one place":
            moments["exp_avg"] = moments["exp_avg_sq"] = torch.ones(1).expand(moments["exp_avg"].shape)
        elif how == "the other way round" and moments["exp_avg"].ndim > 1:
            moments["exp_avg"] = moments["exp_avg"].mT.contiguous().mT
    made = in_own_memory(saved, optimizer)
    places = set()
    for index, parameter in enumerate(model.parameters()):
        for key, value in made["state"][index].items():
            assert torch.equal(value, saved["state"][index][key])
            assert key == "step" or value.stride() == parameter.stride()
            places.add(value.data_ptr())
    assert len(places) == 6
    assert not places & {v.data_ptr() for moments in saved["state"].values() for v in moments.values()}


def test_the_generator_of_an_apple_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.arange(44, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    saved = runtime.generator_states(torch.device("mps"))
    assert saved.keys() == {"cpu", "mps"}
    runtime.restore_generators(saved)
    assert states == [saved["mps"]] * 2
    assert runtime.generator_states(torch.device("cpu")).keys() == {"cpu"}


# -- what is said ------------------------------------------------------------------------------------------------


def test_the_command_to_go_on_names_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--data-dir", ".", "--output-dir", "a b", "--device", "cpu", "--wandb=offline", "--epochs", "7"]
    monkeypatch.setattr(sys, "argv", ["main.py", *given])
    args = main.make_parser().parse_args()
    run = Run(args, torch.device("cpu"), args.output_dir, "float", None, None)
    places = '--output-dir "a b" --data-dir . --device cpu --wandb offline'
    assert run.resume_command() == f"python3 main.py --resume {places}"
    for script in ("../my scripts/main.py", "bc(1)/main.py"):
        monkeypatch.setattr(sys, "argv", [script, *given])
        assert run.resume_command() == f'python3 "{script}" --resume {places}'


def test_another_number_of_threads_is_said(scripts: ScriptServer, small_data: Path, tmp_path: Path) -> None:
    options, at = [*small_options(small_data), "--threads", 1], ("step", 6, "SIGINT")
    stopped = scripts.run("main.py", *options, cwd=tmp_path, at=at, expect=130)
    assert " --threads 1" in stopped.errors
    again = resume_options(small_data)
    same = scripts.run("main.py", *again, "--threads", 1, cwd=tmp_path, at=at, expect=130)
    assert "same bits" not in same.output
    other = scripts.run("main.py", *again, "--threads", 2, cwd=tmp_path)
    assert len(re.findall("^.*--threads 1.* 2: not the same bits.*$", other.output, re.MULTILINE)) == 1


def test_a_finished_run_says_so_and_writes_what_is_missing(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, binary_run: Path
) -> None:
    """Options that say the same again are welcome, also the precision that `auto` became."""
    shutil.copytree(binary_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / BEST).unlink()
    (tmp_path / FINAL).write_bytes((tmp_path / FINAL).read_bytes()[:-1000])
    (tmp_path / "metrics.csv").unlink()
    precision = checkpoints.load(tmp_path / LAST).config["precision"]
    options = [*small_options(small_data), "--resume", "--precision", precision]
    child = scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert "this run is finished" in child.output
    assert not re.search(r"^epoch ", child.output, re.MULTILINE)
    assert child.output.count("Test Accuracy: ") == 2
    assert differences(essence(tmp_path), essence(binary_run)) == []
    assert not list(tmp_path.glob("previous-*"))


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--epochs", 5], ("--epochs 5", "--epochs 3")),
        (["--lr", 0.2], ("--lr 0.2", "--lr 0.1")),
        (["--arch", "resnet32"], ("--arch resnet32", "--arch resnet20")),
        (["--limit-train", 20], ("--limit-train 20", "--limit-train 30")),
        (["--stochastic"], ("--stochastic", "no --stochastic")),
        (["--teacher", "x.pth"], ("--teacher x.pth", "no --teacher")),
        (["--batch-size", 16, "--epochs", 3], ("--batch-size 16", "--batch-size 8")),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_an_option_that_contradicts_the_checkpoint(
    tmp_path: Path,
    binary_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[object],
    expected: tuple[str, str],
) -> None:
    """Both values are named, and the file."""
    with pytest.raises(UserError) as refused:
        run_here(main_binary, tmp_path, monkeypatch, "--resume", binary_run / LAST, *given)
    assert re.search(rf"{expected[0]} .*{LAST}.* {expected[1]}\b", str(refused.value))


def test_a_run_is_resumed_by_its_own_script_from_its_own_checkpoint(
    tmp_path: Path, float_run: Path, binary_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script, file, named in (
        (main, binary_run / LAST, "main_binary.py"),
        (main_binary, float_run / LAST, "main.py"),
        (main, float_run / BEST, LAST),
        (main, "", "start without --resume"),
    ):
        with pytest.raises(UserError, match=named):
            run_here(script, tmp_path / named, monkeypatch, "--resume", file)
    assert not (tmp_path / "start without --resume").exists()


def test_resuming_a_checkpoint_of_another_folder(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path, binary_run: Path
) -> None:
    """It goes on here; what an earlier run has left here is moved aside, not taken for its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = [*small_options(small_data), "--output-dir", first]
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=("step", 7, "SIGINT"), expect=130)
    shutil.copytree(float_run, second)
    options = [*resume_options(small_data), "--output-dir", second]
    options[0:1] = ["--resume", first / LAST]
    stopped = scripts.run("main_binary.py", *options, cwd=tmp_path, at=("mkdir", 2, "SIGINT"), expect=130)
    assert "nothing was saved" in stopped.errors
    assert "Go on with" not in stopped.errors  # the checkpoint that lies there is another run's
    scripts.run("main_binary.py", *options, cwd=tmp_path)
    assert differences(essence(second), essence(binary_run)) == []
    assert differences(essence(second / "previous-1"), essence(float_run)) == []


def test_resuming_on_other_data(tmp_path: Path, binary_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.write_binary(tmp_path / "other" / "cifar-10-batches-bin", seed=5)
    options = ["--resume", binary_run / LAST, "--data-dir", tmp_path / "other", "--wandb", "disabled"]
    with pytest.raises(UserError, match=f"{LAST}: .*--data-dir"):
        run_here(main_binary, tmp_path, monkeypatch, *options)


def test_the_teacher_is_known_by_its_content(
    scripts: ScriptServer, small_data: Path, tmp_path: Path, float_run: Path
) -> None:
    """Also when it lay among the files that the new run has moved aside, and when it has moved since."""
    shutil.copytree(float_run, tmp_path, dirs_exist_ok=True)
    options, at = [*small_options(small_data), "--teacher", BEST], ("step", 6, "SIGINT")
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=at, expect=130)
    options = resume_options(small_data)
    scripts.run("main_binary.py", *options, cwd=tmp_path, at=at, expect=130)
    (tmp_path / "previous-1").rename(tmp_path / "kept")
    gone = scripts.run("main_binary.py", *options, cwd=tmp_path, expect=2)
    assert f"previous-1/{BEST}" in one_line(gone.errors)
    other = scripts.run("main_binary.py", *options, "--teacher", f"kept/{FINAL}", cwd=tmp_path, expect=2)
    assert f"--teacher kept/{FINAL}" in one_line(other.errors)
    scripts.run("main_binary.py", *options, "--teacher", f"kept/{BEST}", cwd=tmp_path)


def _moments(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    def damage(state: dict[str, Any]) -> None:
        moments = state["optimizers"][0]["state"][0]
        moments["momentum_buffer"] = change(moments["momentum_buffer"])

    return damage


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fewer optimizers": lambda state: state["optimizers"].pop(),
    "moments of another shape": _moments(lambda moment: moment[:1]),
    "moments that are NaN": _moments(lambda moment: moment * torch.nan),
    "a weight without moments": lambda state: state["optimizers"][0]["state"].pop(3),
    "another rate": lambda state: state["optimizers"][0]["param_groups"][0].update(lr=1e20),
    "weights in another order": lambda state: state["optimizers"][0]["param_groups"][0]["params"].reverse(),
    "a number too large for a float": lambda state: state["optimizers"][0]["param_groups"][0].update(lr=10**400),
    "an epoch beyond the run": lambda state: state.update(epoch=99),
    "a best of no epoch": lambda state: state["best"].update(epoch=7),
    "negative variances": lambda state: state["best"]["state_dict"]["bn1.running_var"].sub_(99),
    "no generator": lambda state: state.update(generators={}),
    "a generator of rubbish": lambda state: state["generators"]["cpu"].fill_(7),
    "a container of another type": lambda state: state.update(optimizers=None, generators="cpu"),
}


def ternary(w: torch.Tensor) -> torch.Tensor:
    return torch.where(w.abs() < 0.05, 0.0, torch.sign(w))


def test_a_run_of_another_quantizer_goes_on_with_that_one_only(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed with signs, even a finished run would write files that say they are of signs."""
    with monkeypatch.context() as patch:
        patch.setattr(main_binary, "deterministic_sign", ternary)
        run_here(main_binary, tmp_path, patch, *small_options(small_data, epochs=1))
        run_here(main_binary, tmp_path, patch, *resume_options(small_data))
    assert capsys.readouterr().out.count("Next: python3 analyze_binary_weights.py ") == 2
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    with pytest.raises(UserError, match=f"{LAST}: .*'ternary'.*'deterministic_sign'"):
        run_here(main_binary, tmp_path, monkeypatch, *resume_options(small_data))
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_training_state_that_does_not_fit_is_refused(
    damage: str, small_data: Path, tmp_path: Path, binary_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum of the file is right: it says nothing of who made it. More of them are in hostile_corpus.py."""
    content = checkpoints.load(binary_run / LAST).raw
    content.pop("checksum")
    DAMAGE[damage](content["training"])
    checkpoints.save(tmp_path / "it.pth", content)
    options = [*resume_options(small_data)[1:], "--resume", tmp_path / "it.pth"]
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "it.pth"))) as error:
        run_here(main_binary, tmp_path / "out", monkeypatch, *options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]
    if damage == "another rate":
        assert "optimizers.lr" in str(error.value)


def test_a_teacher_of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (main, main_binary):
        for kind in ("latent", "binary"):
            path = save_checkpoint(tmp_path / f"{kind}.pth", kind)
            with pytest.raises(UserError, match=f"--teacher {re.escape(str(path))}"):
                run_here(script, tmp_path / f"{script.__name__} {kind}", monkeypatch, "--teacher", path)
