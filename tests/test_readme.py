"""README and docs/ keep their word: their commands exist, with these options, their files and tests are there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from script_server import ScriptServer

DOCUMENTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = DOCUMENTS[ROOT / "README.md"]
SHOWN = README + (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = [
    *re.findall(r"```(?:bash|sh|console)\n(.*?)```", SHOWN, re.DOTALL),
    *re.findall(r"`(python3 [^`]+)`", README),
]
COMMANDS = sorted(
    {
        match[0]
        for block in BLOCKS
        for line in block.replace("\\\n", " ").splitlines()
        for match in re.finditer(r"python3 \w+\.py[^&|#;\n]*", line.removeprefix("$ "))
    }
)


def script_and_options(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)[1:]
    return words[0], [word.split("=")[0] for word in words[1:] if word.startswith("--")]


def test_readme_has_the_commands_of_every_script() -> None:
    named = {script_and_options(command)[0] for command in COMMANDS}
    scripts = {path.name for path in ROOT.glob("*.py")} - {"hubconf.py"}  # torch.hub reads it, nobody runs it
    assert scripts <= named


@pytest.mark.parametrize("script", sorted({script_and_options(command)[0] for command in COMMANDS}))
def test_options_in_the_readme_are_in_the_help(script: str, scripts: ScriptServer, tmp_path: Path) -> None:
    used = {o for command in COMMANDS for s, options in [script_and_options(command)] if s == script for o in options}
    text = scripts.run(script, "--help", cwd=tmp_path).output
    missing = [option for option in used if not re.search(rf"{re.escape(option)}\b", text)]
    assert not missing


def test_linked_files_exist() -> None:
    for path, text in DOCUMENTS.items():
        targets = [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in target]
        assert [target for target in targets if not (path.parent / target).exists()] == [], path


def test_every_document_is_linked_in_the_readme() -> None:
    assert [path.name for path in DOCUMENTS if path.parent.name == "docs" and f"docs/{path.name}" not in README] == []


def test_tests_named_in_the_documents_exist() -> None:
    """docs/guarantees.md backs its sentences with names of tests."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    texts = [text for path, text in DOCUMENTS.items() if path.name != "formats.md"]  # it has keys of such names
    named = {name for text in texts for name in re.findall(r"`(test_[a-z0-9_]+)`", text)}
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert named
    assert [name for name in sorted(named - files) if f"def {name}(" not in sources] == []


def test_requirements_are_the_six() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"[<>=~!]", line)[0].strip() for line in lines if line and not line.startswith("#")}
    assert names == {"torch", "torchvision", "tqdm", "matplotlib", "wandb", "numpy"}


def fits(shown: list[str], printed: list[str]) -> str:
    """Where the output in a document is not what was printed, or nothing. `[...` there stands for any lines.

    Numbers may differ by 1 in 2,000, one image of the test set in most figures, and those with an exponent by any
    amount: rounding depends on the machine.
    """
    skipping = False
    for line in shown:
        if line.startswith("[..."):
            skipping = True
            continue
        while skipping and printed and not same_line(line, printed[0]):
            printed = printed[1:]
        if not printed or not same_line(line, printed[0]):
            return f"the document has {line!r}, printed is {printed[:1]}"
        printed, skipping = printed[1:], False
    return "" if skipping or not printed else f"not in the document: {printed}"


def same_line(shown: str, printed: str) -> bool:
    number = r"\d[\d,]*\.?\d*(?:e[-+]\d+)?"
    if re.sub(number, "0", shown).split() != re.sub(number, "0", printed).split():
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(
        "e" in a or float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=5e-4, abs=1e-3)
        for a, b in pairs
    )


def test_other_output_is_noticed() -> None:
    shown = ["Test Accuracy: 90.00%", "[... more ...]", "✓ Saved: 41,253 bytes"]
    assert fits(shown, ["Test Accuracy: 90.01%", "a", "b", "✓ Saved: 41,253 bytes"]) == ""
    assert "90.0" in fits(shown, ["Test Accuracy: 89.90%", "a", "✓ Saved: 41,253 bytes"])
    assert "41,253" in fits(shown, ["Test Accuracy: 90.00%", "a", "✗ Saved: 41,253 bytes"])
    assert "not in the document" in fits(shown, ["Test Accuracy: 90.00%", "✓ Saved: 41,253 bytes", "and more"])


@pytest.mark.real_data
def test_the_commands_print_what_the_documents_show(real_data: Path, scripts: ScriptServer, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")
    steps = []
    for block in re.findall(r"```console\n(.*?)```", SHOWN, re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = step.rstrip().splitlines()
            steps.append((command, shown))
    assert len(steps) > 3
    for command, shown in steps:
        script, *options = shlex.split(command)[1:]
        printed = scripts.run(script, *options, cwd=tmp_path, env={"CIFAR10_DIR": str(real_data)}).output
        assert fits(shown, printed.rstrip().splitlines()) == "", command
