"""The README keeps its word: its commands exist, with these options, and its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from script_server import ScriptServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {
        match[0]
        for block in BLOCKS
        for line in block.replace("\\\n", " ").splitlines()
        for match in re.finditer(r"python3 [\w/]+\.py[^&|#;\n]*", line.removeprefix("$ "))
    }
)


def script_and_options(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)[1:]
    return words[0], [word.split("=")[0] for word in words[1:] if word.startswith("--")]


def test_readme_has_the_commands_of_every_script() -> None:
    named = {script_and_options(command)[0] for command in COMMANDS}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts <= named


@pytest.mark.parametrize("script", sorted({script_and_options(command)[0] for command in COMMANDS}))
def test_options_in_the_readme_are_in_the_help(script: str, scripts: ScriptServer, tmp_path: Path) -> None:
    used = {o for command in COMMANDS for s, options in [script_and_options(command)] if s == script for o in options}
    text = scripts.run(script, "--help", cwd=tmp_path).output
    missing = [option for option in used if not re.search(rf"{re.escape(option)}\b", text)]
    assert not missing


def test_files_linked_in_the_readme_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_tests_named_in_the_readme_exist() -> None:
    """The section "What you can rely on" backs its sentences with names of tests."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", README))
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert named
    assert [name for name in sorted(named - files) if f"def {name}(" not in sources] == []


def test_requirements_are_the_six() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"[<>=~!]", line)[0].strip() for line in lines if line and not line.startswith("#")}
    assert names == {"torch", "torchvision", "tqdm", "matplotlib", "wandb", "numpy"}
