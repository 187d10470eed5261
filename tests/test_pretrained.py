"""The shipped networks are the ones their table describes, and score what it says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from conftest import ROOT
from script_server import ScriptServer

from engine import checkpoints

FOLDER = ROOT / "pretrained"
TABLE = re.compile(r"^\| `([\w]+\.pth)` \|.* ([\d.]+) % \| `([0-9a-f]{64})` \|$", re.MULTILINE)
SHIPPED = {
    name: (accuracy, sha256) for name, accuracy, sha256 in TABLE.findall((FOLDER / "README.md").read_text("utf-8"))
}
# By the end of its name: what scores a file as it is meant to be used, and how many points it may be off. Sums in
# float32 are rounded differently from machine to machine, which may decide an image or two of 10,000. The binary
# networks are held to their figure.
SCORED_BY = {
    "_float.pth": ("eval.py", 0.02),
    "_latent.pth": ("eval_binarized.py", 0.0),
    "_1bit.pth": ("load_binarized_example.py", 0.0),
}


def test_the_table_names_every_file() -> None:
    assert SHIPPED
    assert set(SHIPPED) == {path.name for path in FOLDER.glob("*.pth")}
    assert all(name.endswith(tuple(SCORED_BY)) for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_file_is_the_one_in_the_table(name: str) -> None:
    content = (FOLDER / name).read_bytes()
    accuracy, sha256 = SHIPPED[name]
    assert hashlib.sha256(content).hexdigest() == sha256
    loaded = checkpoints.load(FOLDER / name)
    assert name.startswith(f"{loaded.arch}_")
    recorded = loaded.metrics.get("test_accuracy", loaded.raw.get("accuracy"))
    assert f"{recorded:.2f}" == accuracy


@pytest.mark.real_data
@pytest.mark.parametrize("name", SHIPPED)
def test_the_file_scores_what_the_table_says(
    name: str, real_data: Path, scripts: ScriptServer, tmp_path: Path
) -> None:
    script, tolerance = next(how for end, how in SCORED_BY.items() if name.endswith(end))
    printed = scripts.run(script, FOLDER / name, "--data-dir", real_data, cwd=tmp_path).output
    scored = float(re.search(r"^Test Accuracy: ([\d.]+)%$", printed, re.MULTILINE)[1])
    assert scored == pytest.approx(float(SHIPPED[name][0]), abs=tolerance + 1e-9)
