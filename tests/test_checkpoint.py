"""Checkpoints and the files around them: nothing lost, nothing half-written, nothing silently wrong."""

from __future__ import annotations

import ast
import errno
import io
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_corpus
import pytest
import torch
from networks import binary_network, random_network
from torch import Tensor

from engine import checkpoints, cli, files
from engine.cli import UserError
from engine.files import FolderLock, atomic_write, remove_leftovers
from models import weight_layers
from models.bitpack import pack_model

ABOUT = {"epoch": 7, "metrics": {"test_accuracy": 12.5}, "config": {"seed": 3, "resume": None}, "logit_scale": 0.125}
STATE = random_network().state_dict()
BINARY_STATE = binary_network().state_dict()


def make(kind: str) -> dict[str, Any]:
    if kind == checkpoints.BINARY_1BIT:
        packed = pack_model(binary_network(), "resnet20")
        return checkpoints.make(packed.pop("arch"), packed.pop("kind"), None, **packed, **ABOUT)
    return checkpoints.make("resnet20", kind, BINARY_STATE if kind == "binary" else STATE, **ABOUT)


def saved(path: Path, kind: str = "latent") -> Path:
    checkpoints.save(path, make(kind))
    return path


def torch_saved(path: Path, value: Any, **options: Any) -> Path:
    with open(path, "wb") as file:
        torch.save(value, file, **options)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


def refusal(path: Path) -> str:
    """The message with which `load` refuses a file; it must begin with the file's name."""
    with pytest.raises(UserError) as refused:
        checkpoints.load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- what is saved is what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "latent", "binary"])
def test_each_kind_comes_back_as_it_was_saved(tmp_path, kind):
    path = saved(tmp_path / "a.pth", kind)
    loaded = checkpoints.load(path)
    assert (loaded.kind, loaded.arch, loaded.epoch) == (kind, "resnet20", 7)
    assert (loaded.metrics, loaded.config, loaded.logit_scale) == (ABOUT["metrics"], ABOUT["config"], 0.125)
    assert same(loaded.state_dict, BINARY_STATE if kind == "binary" else STATE)
    assert same(loaded.model().state_dict(), loaded.state_dict)
    assert not loaded.model().training


@pytest.mark.parametrize("keep", [False, True])
def test_a_one_bit_file_comes_back_with_the_same_signs(tmp_path, keep):
    network = binary_network()
    packed = pack_model(network, "resnet20", keep_batchnorm=keep)
    path = tmp_path / "a.pth"
    checkpoints.save(path, checkpoints.make(packed.pop("arch"), packed.pop("kind"), None, **packed))
    loaded = checkpoints.load(path)
    assert (loaded.kind, loaded.arch) == (checkpoints.BINARY_1BIT, "resnet20")
    for (_, ours), (_, theirs) in zip(weight_layers(loaded.model(fold=False)), weight_layers(network), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_the_format_is_plain_torch(tmp_path, kind):
    path = saved(tmp_path / "a.pth", kind)
    raw = torch.load(path, weights_only=True)
    assert raw["format_version"] == 1
    assert raw["kind"] == kind
    assert raw["checksum"] == checkpoints.digest({key: value for key, value in raw.items() if key != "checksum"})
    if kind != checkpoints.BINARY_1BIT:
        assert list(raw["state_dict"]) == list(STATE)


def test_a_file_does_not_depend_on_its_name_or_memory_format(tmp_path):
    one, other = saved(tmp_path / "a.pth"), tmp_path / "another name.pth"
    network = random_network().to(memory_format=torch.channels_last)
    checkpoints.save(other, checkpoints.make("resnet20", "latent", network.state_dict(), **ABOUT))
    assert one.read_bytes() == other.read_bytes()


def test_the_returned_size_is_that_of_the_file(tmp_path):
    assert checkpoints.save(tmp_path / "a.pth", make("latent")) == (tmp_path / "a.pth").stat().st_size


def test_content_in_memory_is_held_to_the_same_rules(tmp_path):
    content = checkpoints.serialize(make("latent"))
    assert same(checkpoints.load(tmp_path / "not there.pth", content).state_dict, STATE)
    with pytest.raises(UserError, match=r"not there\.pth"):
        checkpoints.load(tmp_path / "not there.pth", content[:-100])


# -- a checksum that sees everything ---------------------------------------------------------------------------


def tampered(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """For every leaf of a nest: where it is, and the least that could be different there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tampered(item, (*path, key))
    elif isinstance(value, Tensor):
        changed = value.clone()
        changed.reshape(-1).view(torch.uint8)[-1] ^= 1
        yield path, changed
    elif isinstance(value, str):
        yield path, value[:-1] + chr(ord(value[-1]) ^ 1)
    elif isinstance(value, int | float):
        yield path, value + 1
    else:
        yield path, "None"


def put(value: dict, path: tuple, item: Any) -> dict:
    return value | {path[0]: item if len(path) == 1 else put(value[path[0]], path[1:], item)}


@pytest.mark.parametrize("kind", ["binary", checkpoints.BINARY_1BIT])
def test_the_checksum_covers_every_entry(kind):
    """Held against the checksum alone: the archive's own CRC would not see a file that was written anew."""
    content = make(kind)
    good = checkpoints.digest(content)
    places = list(tampered(content))
    assert len(places) > (10 if kind == checkpoints.BINARY_1BIT else 100)
    for path, item in places:
        assert checkpoints.digest(put(content, path, item)) != good, path
    assert checkpoints.digest(content) == good


@pytest.mark.parametrize("change", ["metrics", "one weight", "no checksum", "checksum"])
def test_content_that_does_not_match_its_checksum_is_refused(tmp_path, change):
    raw = torch.load(saved(tmp_path / "a.pth", "binary"), weights_only=True)
    if change == "metrics":
        raw["metrics"]["test_accuracy"] = 99.0
    elif change == "one weight":
        raw["state_dict"]["layer1.0.conv1.weight"].view(-1)[5] *= -1
    elif change == "no checksum":
        del raw["checksum"]
    else:
        raw["checksum"] = torch.zeros(3)
    assert "checksum" in refusal(torch_saved(tmp_path / "b.pth", raw))


def flips(content: bytes, count: int) -> Iterator[tuple[int, int]]:
    """(byte, bit): the first and last bytes, the archive's headers, the rest drawn at random."""
    draw = random.Random(0)
    headers = [i for sign in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7") for i in find_all(content, sign)]
    near = {
        min(i + draw.randrange(46), len(content) - 1) for i in draw.sample(headers, min(count // 3, len(headers)))
    }
    anywhere = {draw.randrange(len(content)) for _ in range(count - len(near) - 2)}
    for place in sorted(near | anywhere | {0, len(content) - 1}):
        yield place, draw.randrange(8)


def find_all(content: bytes, sign: bytes) -> Iterator[int]:
    place = content.find(sign)
    while place >= 0:
        yield place
        place = content.find(sign, place + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", checkpoints.BINARY_1BIT])
def test_a_flipped_bit_never_gives_other_weights(tmp_path, kind, request):
    path = saved(tmp_path / "a.pth", kind)
    content = path.read_bytes()
    whole = checkpoints.load(path)
    expected, found = whole.model(fold=False).state_dict(), 0
    count = 4000 if request.config.getoption("--full") else 150
    for place, bit in flips(content, count if kind == checkpoints.BINARY_1BIT else count // 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        try:
            loaded = checkpoints.load(path, bytes(damaged))
        except UserError:
            found += 1
            continue
        assert same(loaded.model(fold=False).state_dict(), expected), (place, bit)
        assert (loaded.arch, loaded.kind, loaded.metrics) == (whole.arch, whole.kind, whole.metrics)
    assert found > count // 10  # dates and the like in the archive's headers may be anything


# -- what others have saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32(tmp_path, dtype):
    state = {name: v.to(dtype) if v.is_floating_point() else v for name, v in STATE.items()}
    loaded = checkpoints.load(torch_saved(tmp_path / "a.pth", state))
    assert same(loaded.state_dict, {n: v.float() if v.is_floating_point() else v for n, v in state.items()})


@pytest.mark.parametrize("arch", ["resnet32", "resnet44", "resnet56", "resnet110"])
def test_the_depth_is_read_from_the_keys(tmp_path, arch):
    loaded = checkpoints.load(torch_saved(tmp_path / "a.pth", random_network(arch).state_dict()))
    assert loaded.arch == arch


def test_tensors_that_share_memory_are_not_taken_without_end(tmp_path):
    """In the file each costs a hundred bytes, for whoever looks at them or converts them as much as the first."""
    shared = torch.zeros(100_000)
    torch.save({f"{i}": shared for i in range(3)}, tmp_path / "few.pth")
    torch.save({f"{i}": shared for i in range(5)}, tmp_path / "many.pth")
    assert len(checkpoints.read(tmp_path / "few.pth")[0]) == 3
    with pytest.raises(UserError, match=r"many\.pth: refused: it holds too many tensors that share one place"):
        checkpoints.read(tmp_path / "many.pth")


def test_tensors_that_share_memory_or_need_gradients(tmp_path):
    whole = torch.randn(10, 2, 64, requires_grad=True)
    state = STATE | {"linear.weight": whole[:, 1]}
    loaded = checkpoints.load(torch_saved(tmp_path / "a.pth", state))
    assert torch.equal(loaded.state_dict["linear.weight"], whole[:, 1])
    assert not loaded.state_dict["linear.weight"].requires_grad


# -- what is refused, by name ----------------------------------------------------------------------------------


def with_value(name: str, value: float) -> dict[str, Tensor]:
    changed = STATE[name].clone()
    changed.view(-1)[0] = value
    return STATE | {name: changed}


without = {name: value for name, value in STATE.items() if name != "layer2.1.bn1.bias"}
FOREIGN = {
    "a key too many": (STATE | {"layer4.0.conv1.weight": torch.zeros(1)}, ["unexpected 'layer4.0.conv1.weight'"]),
    "a key too few": (without, ["missing 'layer2.1.bn1.bias'"]),
    "other names": ({f"features.{i}.weight": torch.zeros(2) for i in range(9)}, ["features.0.weight", "ResNet-20"]),
    "another shape": (STATE | {"linear.weight": torch.zeros(10, 32)}, ["linear.weight", "(10, 32)", "(10, 64)"]),
    "whole numbers": (STATE | {"linear.bias": torch.zeros(10, dtype=torch.int64)}, ["linear.bias", "int64"]),
    "complex numbers": (
        STATE | {"linear.bias": torch.zeros(10, dtype=torch.complex64)},
        ["linear.bias", "complex64"],
    ),
    "a broken counter": (STATE | {"bn1.num_batches_tracked": torch.tensor(0.5)}, ["bn1.num_batches_tracked"]),
    "NaN": (with_value("layer3.2.conv2.weight", float("nan")), ["layer3.2.conv2.weight", "NaN"]),
    "infinity": (with_value("layer3.2.bn2.weight", float("inf")), ["layer3.2.bn2.weight", "infinite"]),
    "too large for float32": (
        STATE | {"linear.bias": torch.full((10,), 1e300, dtype=torch.float64)},
        ["linear.bias"],
    ),
    "a negative variance": (with_value("bn1.running_var", -1.0), ["bn1.running_var", "negative"]),
    "two keys that become one": (STATE | {"module.linear.bias": torch.zeros(10)}, ["'linear.bias'", "prefixes"]),
    "a number as a key": (STATE | {5: torch.zeros(1)}, ["unexpected '5'"]),
    "a number in place of a tensor": (STATE | {"linear.bias": 5}, ["missing 'linear.bias'"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_does_not_fit_is_named(tmp_path, name):
    value, words = FOREIGN[name]
    message = refusal(torch_saved(tmp_path / "a.pth", value))
    assert all(word in message for word in words), message


OURS = {
    "another version": ({"format_version": 2}, ["version 2"]),
    "a version that is no number": ({"format_version": torch.zeros(2)}, ["version"]),
    "an unknown kind": ({"kind": "ternary"}, ["ternary"]),
    "a kind that is no word": ({"kind": torch.zeros(2)}, ["kind"]),
    "another architecture": ({"arch": "resnet56"}, ["do not fit resnet56", "missing"]),
    "an unknown architecture": ({"arch": "vgg11"}, ["vgg11", "resnet20"]),
    "an architecture that is no word": ({"arch": 5}, ["5", "resnet20"]),
    "a prefix": ({"state_dict": {f"model.{key}": value for key, value in STATE.items()}}, ["'model.conv1.weight'"]),
    "no counters": ({"state_dict": {k: v for k, v in STATE.items() if "num_batches" not in k}}, ["num_batches"]),
    "a quantizer that is no word": ({"quantizer": 5}, ["quantizer"]),
    "an empty state_dict": ({"state_dict": {}}, ["conv1.weight"]),
    "a state_dict of numbers": ({"state_dict": {"conv1.weight": 5}}, ["state_dict"]),
    "binary in name only": ({"kind": "binary"}, ["binary", "conv1.weight"]),
    "a scale of zero": ({"logit_scale": 0}, ["logit_scale"]),
    "a scale that is not finite": ({"logit_scale": float("inf")}, ["logit_scale"]),
    "a scale that is no number": ({"logit_scale": "1"}, ["logit_scale"]),
    "packed in name only": ({"kind": checkpoints.BINARY_1BIT}, ["1-bit"]),
}


@pytest.mark.parametrize("name", OURS)
def test_what_contradicts_itself_is_refused_though_its_checksum_is_right(tmp_path, name):
    changes, words = OURS[name]
    path = tmp_path / "a.pth"
    checkpoints.save(path, make("latent") | changes)
    message = refusal(path)
    assert all(word in message for word in words), message


PACKED = {
    "signs too short": {"signs": torch.zeros(33_541, dtype=torch.uint8)},
    "signs too long": {"signs": torch.zeros(33_543, dtype=torch.uint8)},
    "signs of another type": {"signs": torch.zeros(33_542, dtype=torch.int8)},
    "signs in two dimensions": {"signs": torch.zeros(1, 33_542, dtype=torch.uint8)},
    "no signs": {"signs": [1, 2]},
    "floats too short": {"floats": torch.zeros(1385)},
    "floats of another type": {"floats": torch.zeros(1386, dtype=torch.float64)},
    "NaN": {"floats": torch.full((1386,), float("nan"))},
    "another architecture": {"arch": "resnet32"},
    "an unknown architecture": {"arch": "resnet20; rm -rf"},
    "an architecture that is no word": {"arch": ["resnet20"]},
    "another treatment of BatchNorm": {"batchnorm": "kept"},
    "an unknown treatment of BatchNorm": {"batchnorm": torch.zeros(2)},
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_file_that_does_not_fit_its_architecture_is_refused(tmp_path, name):
    path = tmp_path / "a.pth"
    checkpoints.save(path, make(checkpoints.BINARY_1BIT) | PACKED[name])
    assert "1-bit" in refusal(path)


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


RULES = {
    "another kind: a tar": "a tar archive",
    "another kind: a tar that looks like a pickle": "a tar archive",
    "another kind: TorchScript": "TorchScript",
    "code: in a part of another case": "one name",
    "code: in a second part of that name": "one name",
    "code: a registered extension": "EXT1",
    "bomb: compressed": "compressed",
    "bomb: overlapping parts": "overlap",
    "bomb: sixty thousand parts": "too many parts",
    "bomb: a memo of 2**31": "more memory than it can need",
    "bomb: bytes copied": "too many copies",
    "bomb: sets copied, old format": "too many keys",
    "bomb: arrays copied": "too many copies",
    "bomb: a list that holds itself": "or itself",
    "bomb: a million values": "too many values",
    "bomb: lists fifty deep": "too many values",
    "bomb: a tuple 400,000 deep as a key": "no plain value",
    "bomb: thirty million dictionaries, old format": "too long",
    "bomb: a million tensors": "too long",
    "bomb: keys that collide": "too many keys",
    "bomb: a number of six hundred digits": "too many digits",
    "bomb: a storage of 4 TB": "another size",
    "bomb: a storage of 4 TB, old format": "another size",
    "bomb: 4 TB from one number": "larger than the file",
    "bomb: shapes copied": "no proper shape",
    "crooked: a much larger storage than stored": "another size",
    "crooked: five thousand dimensions": "no proper shape",
    "crooked: an offset beyond the end": "beyond its storage",
    "crooked: a storage of no type": "NoStorage",
    "crooked: a view beyond its storage": "beyond its storage",
    "crooked: a storage in a storage": "a storage that is none",
    "crooked: of another byte order": "byte order",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_message_says_what_was_refused(tmp_path, name):
    """And so each rule is seen to act, not the next one behind it."""
    case = next(case for case in hostile_corpus.corpus() if str(case) == name)
    case.write(tmp_path / "a.pth", hostile_corpus.Base.of(make("latent")))
    message = refusal(tmp_path / "a.pth")
    assert "refused" in message or name.startswith("another kind")
    assert RULES[name] in message


@pytest.mark.parametrize(("size", "words"), [(0, "empty"), (10**12, "too many for a checkpoint")])
def test_a_file_of_an_impossible_size_is_refused_unread(tmp_path, size, words):
    with open(tmp_path / "a.pth", "wb") as file:
        file.truncate(size)  # a hole: it takes no room
    assert words in refusal(tmp_path / "a.pth")


def test_attributes_in_the_place_of_methods_are_left_behind(tmp_path):
    """A dictionary from a pickle can have an attribute `items`; those that are handed on have none."""
    case = next(case for case in hostile_corpus.corpus() if case.name == "attributes in the place of methods")
    case.write(tmp_path / "a.pth", hostile_corpus.Base.of(make("latent")))
    loaded = checkpoints.load(tmp_path / "a.pth")
    assert same(loaded.state_dict, STATE)
    assert not hasattr(loaded.raw, "__dict__")


def test_nothing_is_unpickled_by_anyone_else():
    """Nobody calls torch.load but hubconf.py, on files of this repository; the reader does not even import pickle."""
    root = Path(cli.__file__).parent.parent
    for path in [*root.glob("*.py"), *root.glob("engine/**/*.py"), *root.glob("models/*.py")]:
        nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Attribute | ast.alias)]
        names = {ast.unparse(node) for node in nodes}
        if path.name == "hubconf.py":
            assert path.read_text("utf-8").count("torch.load(") == path.read_text("utf-8").count("weights_only=True")
            continue
        assert not names & {"torch.load", "torch.jit.load", "pickle.load", "np.load"}, path
        verified_batches = path.parts[-2:] == ("data", "files.py")
        assert "pickle.loads" not in names or verified_batches, path
        assert "pickle" not in names or "checkpoints" not in path.parts, path


def test_reading_takes_time_in_proportion_to_the_file(tmp_path):
    """Sixteen times the tensors: at most forty times the time, so that nothing is quadratic."""
    seconds = []
    for count in (500, 8000):
        path = torch_saved(tmp_path / "a.pth", {f"layer.{i}": torch.zeros(10) for i in range(count)})
        start = time.perf_counter()
        checkpoints.read(path)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 40 * max(seconds[0], 0.01), seconds


def test_messages_are_one_printable_line_of_bounded_length(capsys):
    assert cli.fail("a\x1b[31mb\x07\nc\u202e " + "x" * 100_000 + " end") == 2
    error = capsys.readouterr().err
    assert error.endswith("end\n")
    assert error[:-1].isprintable()
    assert len(error) < 3000
    assert error.startswith("Error: a?[31mb? c? xxx")


# -- the old file or the new one -------------------------------------------------------------------------------


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process")


def fork(run: Callable[[], object]) -> int:
    """Start a process that does `run` and ends; its number."""
    number = os.fork()
    if number == 0:
        try:
            run()
        finally:
            os._exit(0)
    return number


def exit_status(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr(f"os.{call}", lambda *_: os._exit(9))
    assert exit_status(fork(lambda: atomic_write(path, b"new" * 1000))) == 9
    assert path.read_bytes() == b"old"
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(left) == 1
    assert not left[0].endswith(".pth")
    remove_leftovers(tmp_path, ["a.pth"], sole_writer=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_leftovers_of_a_living_writer_stay(tmp_path):
    for name in ("a.pth.tmp-1", "a.pth.tmp-2", "b.pth.tmp-1", "a.pth"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "a.pth.tmp-1", (0, 0))
    remove_leftovers(tmp_path, ["a.pth"], sole_writer=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.pth.tmp-2", "b.pth.tmp-1"]


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = saved(tmp_path / "a.pth")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(failing, fail)
    with pytest.raises(UserError, match=r"a\.pth") as refused:
        saved(path, "binary")
    monkeypatch.undo()
    assert os.strerror(error) in str(refused.value)
    assert "untouched" in str(refused.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@needs_fork
def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path):
    """A limit on the size of files does what a full disk does: write() fails half-way."""
    import resource
    import signal

    path, errors = tmp_path / "a.pth", tmp_path / "errors"
    path.write_bytes(b"old")

    def write() -> None:
        sys.stderr = errors.open("w")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            cli.run(lambda: saved(path))
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)

    assert exit_status(fork(write)) == 2
    assert errors.read_text().count("\n") == 1
    assert f"{path}: cannot be written" in errors.read_text()
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "errors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_while_the_content_is_written(tmp_path, monkeypatch):
    real = open

    def full(path: Path, mode: str) -> io.BufferedWriter:
        real(path, mode).close()
        return real("/dev/full", "wb")

    monkeypatch.setattr(files, "open", full, raising=False)
    (tmp_path / "a.pth").write_bytes(b"old")
    with pytest.raises(UserError, match="No space left"):
        saved(tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert (tmp_path / "a.pth").read_bytes() == b"old"


def unwritable(tmp_path: Path) -> list[Path]:
    """Folders that cannot be written to, whoever asks: root is not held up by permissions."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    return [
        tmp_path / "file",
        tmp_path / "file" / "below",
        tmp_path / "loop",
        *[Path("/proc/self")] * Path("/proc").exists(),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, number):
    folders = unwritable(tmp_path)
    if number >= len(folders):
        pytest.skip("no /proc here")
    folder = folders[number]
    with pytest.raises(UserError, match="cannot be written"):
        saved(folder / "a.pth")
    with pytest.raises(UserError, match=str(folder)):
        cli.prepare_output_dir(folder)
    with pytest.raises(UserError, match=str(folder)):
        FolderLock(folder)


def test_a_folder_that_vanished_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone/a\.pth.*No such file"):
        saved(tmp_path / "gone" / "a.pth")


def test_a_name_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(UserError, match=r"a\.pth"):
        saved(tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_writer_function_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")

    def write(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.png", write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


# -- one run a folder ------------------------------------------------------------------------------------------


class Holder:
    """A process that holds the lock of a folder until it is told to end or is killed."""

    def __init__(self, folder: Path) -> None:
        (self._ready, ready), (wait, self._end) = os.pipe(), os.pipe()

        def hold() -> None:
            os.close(self._end)  # a copy of it here would keep the pipe from ever ending
            with FolderLock(folder):
                os.write(ready, b"!")
                os.read(wait, 1)

        self.number = fork(hold)
        os.close(ready)
        os.close(wait)
        assert os.read(self._ready, 1) == b"!"

    def end(self, signum: int | None) -> None:
        if signum is not None:
            os.kill(self.number, signum)
        os.close(self._end)  # only now: without a signal this is what lets it end
        assert exit_status(self.number) == -(signum or 0)
        os.close(self._ready)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("ending", [9, 15, None], ids=["SIGKILL", "SIGTERM", "exit"])
def test_the_lock_names_its_process_and_ends_with_it(tmp_path, ending):
    for _ in range(2):
        holder = Holder(tmp_path)
        try:
            with pytest.raises(UserError) as refused:
                FolderLock(tmp_path)
        finally:
            holder.end(ending)
        assert str(tmp_path) in str(refused.value)
        assert f"process {holder.number} " in str(refused.value)
        assert "--output-dir" in str(refused.value)
    with FolderLock(tmp_path):
        pass


def test_a_lock_file_that_is_left_is_no_lock(tmp_path):
    (tmp_path / FolderLock.NAME).write_text("left by a killed process")
    with FolderLock(tmp_path), pytest.raises(UserError, match=str(os.getpid())):
        FolderLock(tmp_path)
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "\nnot json", "\n[]", "\n{}", '\n{"pid": 1}', "\n\xff\xfe"])
def test_a_holder_that_says_nothing_sensible_is_still_a_holder(tmp_path, content):
    with FolderLock(tmp_path):
        (tmp_path / FolderLock.NAME).write_bytes(content.encode("latin1"))
        with pytest.raises(UserError, match="another run"):
            FolderLock(tmp_path)


@pytest.mark.slow
@needs_fork
def test_of_many_that_start_together_one_gets_the_folder(tmp_path):
    def take() -> None:
        os.read(start, 1)
        try:
            with FolderLock(tmp_path):
                os.write(taken, b"+")
                time.sleep(2)
        except UserError:
            os.write(taken, b"-")

    (start, go), (results, taken) = os.pipe(), os.pipe()

    def child() -> None:
        os.close(go)
        take()

    numbers = [fork(child) for _ in range(6)]
    os.close(go)  # the end of the pipe starts all of them at once
    assert [exit_status(number) for number in numbers] == [0] * 6
    assert sorted(os.read(results, 6)) == sorted(b"+-----")
    for end in (start, results, taken):
        os.close(end)
