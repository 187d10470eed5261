"""The command line of the training scripts, the precision they choose, and how cli.run ends a script."""

from __future__ import annotations

import importlib
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import save_checkpoint
from runs import one_line

import main
import main_binary
from engine import cli, runtime
from engine.cli import UserError
from engine.training.loop import Trainer
from engine.training.run import Run
from models import build

CPU = torch.device("cpu")
IMPOSSIBLE = [
    *(["--epochs", 0], ["--epochs", "many"], ["--epochs", 10**12], ["--batch-size", -1], ["--batch-size", 2.5]),
    *(["--limit-train", 1], ["--limit-test", 0], ["--lr", "nan"], ["--lr", -1], ["--lr", "inf"]),
    *(["--weight-decay", -1], ["--label-smoothing", 2], ["--warmup-epochs", -1], ["--seed", -1], ["--seed", 2**80]),
    *(["--val-size", -1], ["--val-size", 50_000], ["--threads", 0], ["--threads", 10**6], ["--device", "nonsense"]),
    *(["--device", "meta"], ["--device", "cuda:99"], ["--arch", "resnet18"], ["--wandb", "maybe"]),
    *(["--precision", "float16"], ["--precision", "int8"], ["--resume", "none.pth"], ["--teacher", "none.pth"]),
    *(["--output-dir", "/proc/none"], ["--nonsense"], ["--epoch", 3], ["surplus"], ["--temperature", 0]),
    *(["--temperature", 1e200], ["--teacher-weight", 1.5], ["--teacher", "latent.pth"], ["--teacher", "empty.pth"]),
]
IMPOSSIBLE_BINARY = [
    *(["--latent-lr", "nan"], ["--logit-scale", 0], ["--optimizer", "lbfgs"], ["--init", "none.pth"]),
    *(["--init", "latent.pth", "--arch", "resnet32"], ["--init", "."], ["--init", "text.pth"]),
]


@pytest.mark.parametrize("script", [main, main_binary])
def test_impossible_options_are_refused_before_any_data_is_fetched(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "latent.pth", "latent")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("weights")
    monkeypatch.setattr("cifar10.load", lambda *_, **__: pytest.fail("the data was asked for"))
    for number, case in enumerate(IMPOSSIBLE + (IMPOSSIBLE_BINARY if script is main_binary else [])):
        own_folder = [] if case[0] == "--output-dir" else ["--output-dir", str(number)]
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, case), *own_folder])
        with pytest.raises(UserError) as refused:
            script.main()
        line = str(refused.value)
        assert str(case[0]) in line or str(case[1]) in line, (case, line)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("module", [main, main_binary])
def test_help_names_every_option_with_its_default(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = module.make_parser()
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    described = " ".join(text[text.index("\noptions:") :].split())
    for action in parser._actions:
        assert f" {action.option_strings[-1]}" in described
        if action.default is not None and not isinstance(action.default, bool | Path) and action.dest != "help":
            own = described[described.index(f" {action.option_strings[0]} ") :].split(" --")[1]
            assert f"(default: {action.default})" in own, action.dest


@pytest.mark.parametrize("name", ["main", "main_binary"])
def test_importing_a_script_does_nothing(name, capsys):
    importlib.reload(sys.modules[name])
    assert capsys.readouterr() == ("", "")


# -- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")],
)
@pytest.mark.parametrize("old", [False, True], ids=["", "torch 2.6"])
def test_precision_of_a_cpu(capabilities, precision, old, monkeypatch):
    """bfloat16 by default where the CPU computes with it, and only there; what is asked for is given anywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if old:  # it has these two functions instead
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        for name, unit in (("_is_avx512_bf16_supported", "avx512_bf16"), ("_is_amx_tile_supported", "amx_bf16")):
            monkeypatch.setattr(torch.cpu, name, lambda unit=unit: unit in capabilities, raising=False)
    assert runtime.choose_precision("auto", CPU) == precision
    assert runtime.choose_precision("float32", CPU) == "float32"
    assert runtime.choose_precision("bfloat16", CPU) == "bfloat16"
    assert runtime.may_be_emulated("bfloat16", CPU) == (precision == "float32")
    assert not runtime.may_be_emulated("float32", CPU)


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bfloat16"), ((7, 5), "float32")])
def test_precision_of_a_gpu(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert runtime.choose_precision("auto", torch.device("cuda")) == precision


def test_emulation_is_said(capsys, monkeypatch):
    args = main.make_parser().parse_args(["--precision", "bfloat16"])
    run, data = Run(args, CPU, Path("."), "float", None, None), SimpleNamespace(train=[0], scored_on="1 test image")
    loader = SimpleNamespace(steps_per_epoch=1)
    trainer = SimpleNamespace(run=run, model=build("resnet20"), data=data, loader=loader, warmup=5)
    for units, notes in ((False, 1), (True, 0)):
        monkeypatch.setattr(runtime, "cpu_has_bfloat16_units", lambda units=units: units)
        Trainer.describe(trainer)
        assert capsys.readouterr().out.count("bfloat16 may be emulated") == notes


# -- how a script ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytes(2**60)], ids=["torch", "python"])
def test_out_of_memory_is_one_line(allocate, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    with pytest.raises(SystemExit) as end:
        cli.run(allocate)
    assert end.value.code == 2
    assert "out of memory" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("ending", "status"), [("raise cli.UserError('wrong')", 2), ("pass", 0)])
def test_a_signal_while_the_interpreter_shuts_down(signum, ending, status, child_environment):
    """As torchrun sends it to the others once one process has failed."""
    code = f"""
import atexit, os
from engine import cli
atexit.register(lambda: os.kill(os.getpid(), {signum:d}))
def main():
    {ending}
cli.run(main)
"""
    root = Path(main.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=child_environment, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"Error: wrong\n" if status else b"")


def test_the_last_line_is_a_command_that_runs(scripts, small_data, tmp_path, float_run, binary_run):
    """As it is typed in the folder that the training was started in."""
    for folder, evaluates in ((float_run, "eval.py"), (binary_run, "eval_binarized.py")):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        last = Path(f"{folder}-output").read_text().splitlines()[-1]
        words = shlex.split(last.removeprefix("Next: "))
        assert (words[0], Path(words[1]).name, words[2]) == ("python3", evaluates, "best_model.pth")
        child = scripts.run(evaluates, *words[2:], "--limit-test", 20, cwd=tmp_path)
        assert "Test Accuracy: " in child.output
