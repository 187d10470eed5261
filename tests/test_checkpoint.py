"""Checkpoints of ours: what is saved is what is loaded, nothing silently wrong, nothing run."""

from __future__ import annotations

import ast
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_corpus
import pytest
import torch
from hostile_corpus import refusal, same
from networks import binary_network, random_network
from torch import Tensor

from engine import checkpoints, cli
from engine.cli import UserError
from models import weight_layers
from models.bitpack import pack_model

ABOUT = {"epoch": 7, "metrics": {"test_accuracy": 12.5}, "config": {"seed": 3, "resume": None}, "logit_scale": 0.125}
STATE = random_network().state_dict()
BINARY = binary_network()


def make(kind: str, **options: Any) -> dict[str, Any]:
    if kind == checkpoints.BINARY_1BIT:
        packed = pack_model(BINARY, "resnet20", **options)
        return checkpoints.make(packed.pop("arch"), packed.pop("kind"), None, **packed, **ABOUT)
    return checkpoints.make("resnet20", kind, BINARY.state_dict() if kind == "binary" else STATE, **ABOUT)


def saved(path: Path, kind: str = "latent") -> Path:
    checkpoints.save(path, make(kind))
    return path


# -- what is saved is what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "latent", "binary"])
def test_each_kind_comes_back_as_it_was_saved(tmp_path, kind):
    loaded = checkpoints.load(saved(tmp_path / "a.pth", kind))
    assert (loaded.kind, loaded.arch, loaded.epoch, loaded.foreign, loaded.notes) == (kind, "resnet20", 7, False, [])
    assert (loaded.metrics, loaded.config, loaded.logit_scale) == (ABOUT["metrics"], ABOUT["config"], 0.125)
    assert same(loaded.state_dict, BINARY.state_dict() if kind == "binary" else STATE)
    assert same(loaded.model().state_dict(), loaded.state_dict)
    assert not loaded.model().training


@pytest.mark.parametrize("keep", [False, True])
def test_a_one_bit_file_comes_back_with_the_same_signs(tmp_path, keep):
    checkpoints.save(tmp_path / "a.pth", make(checkpoints.BINARY_1BIT, keep_batchnorm=keep))
    loaded = checkpoints.load(tmp_path / "a.pth")
    assert (loaded.kind, loaded.arch) == (checkpoints.BINARY_1BIT, "resnet20")
    for (_, ours), (_, theirs) in zip(weight_layers(loaded.model(fold=False)), weight_layers(BINARY), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_the_format_is_plain_torch(tmp_path, kind):
    raw = torch.load(saved(tmp_path / "a.pth", kind), weights_only=True)
    assert raw["format_version"] == 1
    assert raw["kind"] == kind
    assert raw.pop("checksum") == checkpoints.digest(raw)
    if kind != checkpoints.BINARY_1BIT:
        assert list(raw["state_dict"]) == list(STATE)


def test_a_file_does_not_depend_on_its_name_or_memory_format(tmp_path):
    one, other = saved(tmp_path / "a.pth"), tmp_path / "another name.pth"
    network = random_network().to(memory_format=torch.channels_last)
    size = checkpoints.save(other, checkpoints.make("resnet20", "latent", network.state_dict(), **ABOUT))
    assert one.read_bytes() == other.read_bytes()
    assert size == other.stat().st_size


def test_content_in_memory_is_held_to_the_same_rules(tmp_path):
    content = checkpoints.serialize(make("latent"))
    assert same(checkpoints.load(tmp_path / "not there.pth", content).state_dict, STATE)
    with pytest.raises(UserError, match=r"not there\.pth"):
        checkpoints.load(tmp_path / "not there.pth", content[:-100])


# -- a checksum that sees everything ---------------------------------------------------------------------------


def tampered(value: Any) -> Iterator[Any]:
    """A nest with the least that could be different, in every one of its leaves in turn."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (value | {key: changed} for changed in tampered(item))
    elif isinstance(value, Tensor):
        changed = value.clone()
        changed.reshape(-1).view(torch.uint8)[-1] ^= 1
        yield changed
    elif isinstance(value, str):
        yield value[:-1] + chr(ord(value[-1]) ^ 1)
    else:
        yield "None" if value is None else value + 1


@pytest.mark.parametrize("kind", ["binary", checkpoints.BINARY_1BIT])
def test_the_checksum_covers_every_entry(kind):
    """Held against the checksum alone: the archive's own CRC would not see a file that was written anew."""
    digests = [checkpoints.digest(content) for content in [make(kind), *tampered(make(kind))]]
    assert digests[0] not in digests[1:]
    assert len(digests) > (10 if kind == checkpoints.BINARY_1BIT else 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", checkpoints.BINARY_1BIT])
def test_a_flipped_bit_never_gives_other_weights(tmp_path, kind, request):
    path = saved(tmp_path / "a.pth", kind)
    content, whole, found = path.read_bytes(), checkpoints.load(path), 0
    expected, draw = whole.model(fold=False).state_dict(), random.Random(0)
    count = 2000 if request.config.getoption("--full") else 100
    headers = [i for i in range(len(content)) if content[i : i + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    near = [min(draw.choice(headers) + draw.randrange(46), len(content) - 1) for _ in range(count // 3)]
    for place in [*near, *(draw.randrange(len(content)) for _ in range(count)), 0, len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        try:
            loaded = checkpoints.load(path, bytes(damaged))
        except UserError:
            found += 1
            continue
        assert same(loaded.model(fold=False).state_dict(), expected), place
        assert (loaded.arch, loaded.kind, loaded.metrics) == (whole.arch, whole.kind, whole.metrics)
    assert found > count // 10  # dates and the like in the archive's headers may be anything


# -- what is refused, by name ----------------------------------------------------------------------------------

SAID = {  # a message, and the cases that get it
    "tar archive": ["another kind: a tar that looks like a pickle", "another kind: a tar"],
    "TorchScript": [
        "another kind: constants beside a pickle",
        "another kind: code beside a pickle",
        "another kind: TorchScript",
    ],
    "load_binarized_example.py": ["another kind: ONNX"],
    "gzip": ["another kind: gzip"],
    "safetensors": ["another kind: safetensors"],
    "HDF5": ["another kind: Keras, HDF5"],
    "torch.save did not make": ["another kind: Keras, archive", "another kind: an empty zip"],
    "resnet20.pth": ["another kind: a zip around a checkpoint"],
    "numpy": ["another kind: numpy"],
    "web page": ["another kind: HTML", "another kind: HTML after blank lines"],
    "download the raw file": ["another kind: HTML after a mark"],
    "git lfs pull": ["another kind: a Git LFS pointer"],
    "picture": ["another kind: PNG"],
    "text": ["another kind: text", "another kind: JSON"],
    "one name": ["code: in a part of another case", "code: in a second part of that name"],
    "EXT1": ["code: a registered extension"],
    "compressed": ["bomb: compressed"],
    "overlap": ["bomb: overlapping parts"],
    "too many parts": ["bomb: sixty thousand parts"],
    "more memory than it can need": ["bomb: a memo of 2**31"],
    "too many copies": ["bomb: bytes copied", "bomb: arrays copied", "bomb: files in the file copied"],
    "too many keys": ["bomb: sets copied, old format", "bomb: keys that collide"],
    "too many": ["bomb: dictionaries copied"],
    "or itself": ["bomb: a list that holds itself"],
    "too many values": ["bomb: a million values", "bomb: lists fifty deep"],
    "too many copies of one text": ["bomb: a text many times"],
    "no plain value": ["bomb: a tuple 400,000 deep as a key", "bomb: a key that doubles"],
    "too long": ["bomb: thirty million dictionaries, old format"],
    "too long a name": ["bomb: names of a megabyte"],
    "too many digits": ["bomb: a number of six hundred digits"],
    "another size": ["bomb: a storage of 4 TB", "bomb: a storage of 4 TB, old format"],
    "larger than the file": ["bomb: 4 TB from one number"],
    "refused: .*share one place": ["values: many views of one memory"],
    "no proper shape": ["crooked: five thousand dimensions"],
    "beyond its storage": ["crooked: offset 1"],
    "NoStorage": ["crooked: kind NoStorage"],
    "invalid storage": ["crooked: a part of a storage"],
    "byte order": ["crooked: of another byte order"],
    "'net.conv1.weight'": ["values: a prefix that is none of ours"],
    "num_batches": ["values: no counters"],
    "version 2": ["metadata: 'format_version' is '2' (1)"],
    "ternary": ["metadata: 'kind' is 'ternary' (1)"],
    "binary.*conv1.weight": ["metadata: 'kind' is 'binary' (9)"],
    "1-bit": ["metadata: 'kind' is 'binary_1bit' (10)"],
    "do not fit resnet32.*missing": ["metadata: 'arch' is 'resnet32' (0)"],
    "resnet21.*resnet20": ["metadata: 'arch' is 'resnet21' (1)"],
    "logit_scale": ["metadata: 'logit_scale' is 'inf' (4)"],
    "conv1.weight": ["metadata: 'state_dict' is '{}' (3)"],
    "state_dict": ["""metadata: 'state_dict' is "{'a': {'b': 1}}" (5)"""],
    "quantizer": ["metadata: 'quantizer' is '5' (0)"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "name"), [(words, name) for words, names in SAID.items() for name in names])
def test_the_message_says_what_was_refused(tmp_path, words, name):
    """And so each rule is seen to act, not the next one behind it."""
    case = next(case for case in hostile_corpus.corpus() if str(case) == name)
    case.write(tmp_path / "a.pth", hostile_corpus.Base(make("latent")))
    message = refusal(tmp_path / "a.pth")
    assert re.search(words, message)
    assert message.startswith("refused: ") or case.group in ("another kind", "values", "metadata")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("best_model.pth", "main.py"),
        ("best_model_binarized.pth", "eval_binarized.py"),
        ("best_model_binary_1bit.pth", "save_binary_model.py"),
        ("checkpoint_last.pth", "without --resume"),
        ("mine.pth", "path"),
    ],
)
def test_a_missing_file_says_what_makes_it(tmp_path, name, hint):
    assert hint in refusal(tmp_path / name)


def test_attributes_in_the_place_of_methods_are_left_behind(tmp_path):
    """A dictionary from a pickle can have an attribute `items`."""
    content = hostile_corpus.GROUPS["odd"]["attributes in the place of methods"](hostile_corpus.Base(make("latent")))
    (tmp_path / "a.pth").write_bytes(content)
    loaded = checkpoints.load(tmp_path / "a.pth")
    assert same(loaded.state_dict, STATE)
    assert not hasattr(loaded.raw, "__dict__")


def test_nothing_is_unpickled_by_anyone_else():
    """Nobody calls torch.load but hubconf.py, on files of this repository; the reader does not even import pickle."""
    root = Path(cli.__file__).parent.parent
    for path in [*root.glob("*.py"), *root.glob("engine/**/*.py"), *root.glob("models/*.py")]:
        text = path.read_text("utf-8")
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute | ast.alias)]
        names = {ast.unparse(node) for node in nodes}
        if path.name == "hubconf.py":
            assert text.count("torch.load(") == text.count("weights_only=True")
            continue
        assert not names & {"torch.load", "torch.jit.load", "pickle.load", "np.load"}, path
        assert "pickle.loads" not in names or path.parts[-2:] == ("data", "files.py"), path  # of verified batches
        assert "pickle" not in names or "checkpoints" not in path.parts, path


@pytest.mark.slow
def test_reading_takes_time_in_proportion_to_the_file(tmp_path):
    """Sixteen times the tensors: at most forty times the time, so that nothing is quadratic."""
    seconds = []
    for count in (500, 8000):
        torch.save({f"layer.{i}": torch.zeros(10) for i in range(count)}, tmp_path / "a.pth")
        tries = []
        for _ in range(3):
            start = time.process_time()  # of this process: others may be busy
            checkpoints.examine(tmp_path / "a.pth")
            tries.append(time.process_time() - start)
        seconds.append(min(tries))
    assert seconds[1] < 40 * max(seconds[0], 0.01), seconds


def test_messages_are_one_printable_line_of_bounded_length(capsys):
    assert cli.fail("a\x1b[31mb\x07\nc\u202e " + "x" * 100_000 + " end") == 2
    error = capsys.readouterr().err
    assert error.endswith("end\n")
    assert error[:-1].isprintable()
    assert len(error) < 3000
    assert error.startswith("Error: a?[31mb? c? xxx")
