"""Files that people have: each is made here as others make it, and must give exactly what the bare state_dict gives,
or say in one line what it is."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import enum
import os
import pickle
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_corpus import CANARY, SHELL, Call, archive, call, name, pickled, put, refusal, same, torch_bytes
from networks import binary_network, random_network
from torch import Tensor, nn

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.report import headline

pytestmark = pytest.mark.slow  # all of them together

NETWORK = random_network()
STATE = NETWORK.state_dict()
ZEROED = {key: torch.zeros_like(value) if "num_batches" in key else value for key, value in STATE.items()}
FORMATS = {"archive": {}, "old format": {"_use_new_zipfile_serialization": False}}


def saved(path: Path, value: Any, **options: Any) -> Path:
    path.write_bytes(torch_bytes(value, **options))
    return path


def opened(path: Path, state: dict[str, Tensor] = STATE, **options: Any) -> Checkpoint:
    """The file, loaded; its weights must be those of `state`, bit for bit."""
    loaded = checkpoints.load(path, **options)
    assert same(loaded.state_dict, state)
    assert loaded.foreign
    assert all("\n" not in note for note in loaded.notes)
    return loaded


# -- what lies beside the weights, and what they are packed in -------------------------------------------------


class AverageMeter:
    """As the scripts of many have it, with state of its own."""

    def __init__(self) -> None:
        self.val, self.history, self.me = 1.5, [1.0, 2.0], self


class AttrDict(dict):
    """A dictionary whose items are attributes too, as in many libraries of options."""

    __getattr__ = dict.get


class Phase(enum.Enum):
    TRAIN = "train"


def wrapped() -> nn.Module:
    """A network as the attribute of another module, with things beside it that are no modules."""
    module = nn.Sequential()
    module.encoder = copy.deepcopy(NETWORK)
    module.activation, module.meter, module.loss = torch.relu, AverageMeter(), nn.CrossEntropyLoss()
    return module


def theirs() -> nn.Module:
    """A network of others with the names of ours, but for the classifier's."""
    module = nn.Sequential()
    for key, part in NETWORK.named_children():
        module.add_module("fc" if key == "linear" else key, part)
    module.register_buffer("mask", torch.ones(3), persistent=False)
    return module


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the network and an optimizer that has moments of its weights and has not changed them."""
    network = copy.deepcopy(NETWORK)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return network, optimizer


def tagged(value: Tensor) -> Tensor:
    """With an attribute of its own."""
    value.tag = AverageMeter()
    return value


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def with_fc(state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {key.replace("linear.", "fc."): value for key, value in state.items()}


def slices() -> dict[str, Tensor]:
    """The floating-point tensors as views of one, 30,000 numbers behind its beginning."""
    floats = {key: value for key, value in STATE.items() if value.is_floating_point()}
    memory = torch.cat([torch.zeros(30_000), *(value.reshape(-1) for value in floats.values())])
    parts = memory[30_000:].split([value.numel() for value in floats.values()])
    views = {key: part.view(floats[key].shape) for key, part in zip(floats, parts, strict=True)}
    return {key: views.get(key, value) for key, value in STATE.items()}


BESIDE: dict[str, Callable[[], Any]] = {
    "numbers of numpy": lambda: [np.float64(92.6), np.float32(1), np.int64(1), np.uint8(1), np.bool_(1)],
    "other scalars of numpy": lambda: [np.str_("x"), np.datetime64("2020-01-01"), np.longdouble(1)],
    "arrays of numpy": lambda: [np.ones((2, 3)), np.asfortranarray(np.ones((2, 3), ">f4")), np.array(1)],
    "arrays of no numbers": lambda: [
        np.array([AverageMeter(), AverageMeter()]),
        np.array(["a"]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, "i4,f4"),
    ],
    "options": lambda: argparse.Namespace(lr=0.1, data=Path("data"), gpus=[0, 1]),
    "dates and paths": lambda: [datetime.datetime(2020, 1, 1), Path("x"), datetime.timedelta(1)],
    "meters": lambda: {"top1": AverageMeter(), "phase": Phase.TRAIN},
    "dictionaries of all kinds": lambda: [
        defaultdict(list, a=[1]),
        AttrDict(a=1),
        collections.Counter("ab"),
        OrderedDict(a=OrderedDict()),
        {Phase.TRAIN: 1, AverageMeter: 2, (0, "a"): 3, 1.5: 4, None: 5},  # classes are keys in files of Lightning
    ],
    "lists of all kinds": lambda: [deque([1, 2], 5), {1, "a", (1, 2)}, frozenset({1}), (1, (2, [3])), range(3)],
    "plain values": lambda: [None, True, 1j, b"abc", bytearray(b"abc"), 2**100, -1, 1e300, "ü", ...],
    "values of torch": lambda: [torch.Size([1, 2]), torch.float16, torch.device("cuda:0"), torch.strided],
    "functions and classes": lambda: [torch.relu, os.getcwd, nn.Conv2d, AverageMeter],
    "generators' states": lambda: [
        random.Random(0).getstate(),
        np.random.RandomState(0).get_state(),
        np.random.default_rng(0).bit_generator.state,
        np.random.default_rng(0),
        torch.get_rng_state(),
    ],
    "an optimizer's state": lambda: stepped()[1].state_dict(),
    "a whole optimizer": lambda: stepped()[1],
    "a whole schedule": lambda: torch.optim.lr_scheduler.MultiStepLR(stepped()[1], [100, 150]),
    "tensors of other types": lambda: [
        torch.zeros(3, dtype=torch.uint16),
        torch.zeros(3, dtype=torch.float8_e4m3fn),
        torch.zeros(3, dtype=torch.complex32),
        torch.zeros(0),
        torch.zeros(2, 2, device="meta"),
    ],
    "sparse and quantized tensors": lambda: [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    ],
    "storages": lambda: [torch.ones(3).untyped_storage(), torch.FloatStorage([1.0, 2.0])],
    "a module of another kind": lambda: nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)),
    "a loss with weights": lambda: nn.CrossEntropyLoss(weight=torch.ones(10)),
    "code": lambda: Call(os.system, SHELL),
    "an exception": lambda: ValueError("x"),
}
AROUND: dict[str, Callable[[], Any]] = {
    "nothing": lambda: STATE,
    "net, as kuangliu": lambda: {"net": prefixed("module."), "acc": 92.5, "epoch": 199},
    "state_dict, as akamaster": lambda: {"state_dict": prefixed("module."), "best_prec1": 91.7},
    "another key": lambda: {"bc": STATE, "epoch": 3},
    "a key in a key": lambda: {"run": {"best": {"weights": STATE}}, "epoch": 3},
    "a tuple": lambda: (3, STATE),
    "a tensor beside": lambda: {"model_state": STATE, "acc": torch.tensor(92.5)},
    "values among the weights": lambda: {**STATE, "epoch": 3, "acc": 92.5},
    "a dictionary with attributes": lambda: AttrDict(state=AttrDict(STATE), epoch=3),
    "options around": lambda: argparse.Namespace(weights=STATE, epoch=3),
    "any prefix": lambda: prefixed("backbone.net."),
    "a number as prefix": lambda: prefixed("0."),
    "wrappers around any prefix": lambda: {"state_dict": prefixed("_orig_mod.module.student.")},
    "prefixes of two kinds": lambda: {("module." if "bn" in key else "") + key: v for key, v in STATE.items()},
    "fc": with_fc,
    "fc behind a prefix": lambda: {"state_dict": prefixed("module.", with_fc())},
    "counters of thop": lambda: STATE | {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)},
    "the average of weights": lambda: torch.optim.swa_utils.AveragedModel(NETWORK).state_dict(),
    "no counters of BatchNorm": lambda: {k: v for k, v in ZEROED.items() if "num_batches" not in k},
    "parameters": lambda: NETWORK.state_dict(keep_vars=True),
    "tensors with attributes": lambda: {key: tagged(value.clone()) for key, value in STATE.items()},
    "parameters with attributes": lambda: {
        key: tagged(nn.Parameter(value.clone(), value.is_floating_point())) for key, value in STATE.items()
    },
    "arrays of numpy": lambda: {key: value.numpy() for key, value in STATE.items()},
    "channels last": lambda: copy.deepcopy(NETWORK).to(memory_format=torch.channels_last).state_dict(),
    "slices of one memory": slices,
    "a whole module": lambda: NETWORK,
    "a whole module under a key": lambda: {"net": NETWORK, "acc": 92.5},
    "a whole module of others": theirs,
    "a whole module in an attribute": wrapped,
    "a whole module in two wrappers": lambda: nn.DataParallel(nn.Sequential(NETWORK)),
    "a module and its optimizer": lambda: dict(zip(("net", "optimizer"), stepped(), strict=True)),
    "Lightning": lambda: {
        "state_dict": prefixed("model."),
        "hyper_parameters": AttrDict(lr=0.1, path=Path("x")),
        "callbacks": {AverageMeter: {"best": torch.tensor(1.0)}},
        "optimizer_states": [stepped()[1].state_dict()],
    },
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_weights_does_not_matter(tmp_path, monkeypatch, beside, form):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pth", {"state_dict": STATE, "beside": BESIDE[beside]()}, **FORMATS[form])
    loaded = opened(path)
    assert loaded.weights_key == "state_dict"
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("around", AROUND)
def test_weights_are_found_wherever_they_lie(tmp_path, around, form):
    path = saved(tmp_path / "a.pth", AROUND[around](), **FORMATS[form])
    loaded = opened(path, ZEROED if around == "no counters of BatchNorm" else STATE)
    assert loaded.kind == "unknown"


@pytest.mark.parametrize("protocol", range(1, 6))  # torch.save with protocol 0 makes what torch.load cannot read
@pytest.mark.parametrize("around", ["nothing", "a whole module", "net, as kuangliu", "arrays of numpy"])
def test_every_protocol_of_pickle_and_pickles_without_torch(tmp_path, around, protocol):
    value = AROUND[around]()
    beside = {"value": value, "acc": np.float64(92.5), "options": argparse.Namespace(a=1)}
    for form in FORMATS.values():
        opened(saved(tmp_path / "a.pth", beside, pickle_protocol=protocol, **form))
    (tmp_path / "b.pth").write_bytes(pickle.dumps(beside, protocol))
    opened(tmp_path / "b.pth")


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_numbers_of_numpy_keep_their_values(tmp_path, form, protocol):
    scalars = [np.float64(92.6), np.float32(-0.1), np.float16(0.5), np.int64(-(2**63)), np.uint64(2**64 - 1)]
    scalars += [np.bool_(True), np.complex128(1 - 2j), np.dtype(">f8").type(2.5)]
    arrays = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))]
    arrays += [
        np.array([1.5, -2], ">f4"),
        np.array([True, False]),
        np.zeros((0, 3), np.uint8),
        np.array(7, np.uint32),
    ]
    path = saved(tmp_path / "a.pth", [scalars, arrays], pickle_protocol=protocol, **FORMATS[form])
    plain, tensors = checkpoints.examine(path)[0].value
    assert plain == [value.item() for value in scalars]
    assert [type(value) for value in plain] == [type(value.item()) for value in scalars]
    for found, array in zip(tensors, arrays, strict=True):
        assert isinstance(found, Tensor)
        assert np.array_equal(found.numpy(), array)
        assert found.numpy().dtype == array.dtype.newbyteorder("=")


def test_what_python_2_and_torch_0_3_wrote_on_a_gpu(tmp_path):
    """OrderedDict([[key, tensor], ...]), each tensor in a storage of CUDA."""
    pairs, parts = [], {}
    for key, value in STATE.items():
        if value.is_floating_point():
            kind = name("torch.cuda", "FloatStorage")
            storage = put(("storage", kind, key, "cuda:0", value.numel())) + b"Q"
            tensor = call("torch._utils", "_rebuild_tensor", storage, 0, tuple(value.shape), value.stride())
            pairs.append([key, tensor])
            parts[f"data/{key}"] = value.numpy().tobytes()
    content = archive({"data.pkl": pickled(call("collections", "OrderedDict", pairs)), **parts})
    (tmp_path / "a.pth").write_bytes(content)
    opened(tmp_path / "a.pth", ZEROED)


# -- what is said ----------------------------------------------------------------------------------------------


def test_notes_say_what_was_done(tmp_path):
    beside = {"bc": prefixed("module.net.", with_fc()), "options": argparse.Namespace(a=1), "epoch": 7}
    loaded = opened(saved(tmp_path / "a.pth", beside))
    notes = " ".join(loaded.notes)
    assert all(f"  {note}" in headline(loaded) for note in loaded.notes)
    assert all(word in notes for word in ("'bc'", "'module.net.'", "116", "'fc'", "'linear'", "argparse.Namespace"))
    assert "nothing was run" in notes
    assert (loaded.weights_key, loaded.epoch) == ("bc", 7)
    assert opened(saved(tmp_path / "b.pth", STATE)).notes == []


def test_where_two_fit_the_option_chooses(tmp_path):
    other = random_network(seed=1).state_dict()
    path = saved(tmp_path / "a.pth", {"state_dict": STATE, "state_dict_ema": prefixed("module.", other), "net": {}})
    message = refusal(path)
    assert all(word in message for word in ("'state_dict'", "'state_dict_ema'", "--weights-key"))
    opened(path, weights_key="state_dict")
    opened(path, other, weights_key="state_dict_ema")
    message = refusal(path, weights_key="weights")
    assert all(word in message for word in ("--weights-key weights", "'state_dict'", "'state_dict_ema'"))
    nested = saved(tmp_path / "b.pth", {"runs": [{"w": STATE}, {"w": other}]})
    opened(nested, other, weights_key="runs.1.w")


OPTION_B = with_fc() | {"layer2.0.downsample.0.weight": torch.zeros(32, 16, 1, 1)}
LARGE = torch.full((10,), 1e300, dtype=torch.float64)
COMPLEX = torch.zeros(10, dtype=torch.complex64)
SAID: dict[str, tuple[Any, list[str]]] = {
    "option B": (OPTION_B, ["option B", "layer2.0.downsample.0.weight"]),
    "option B under a key": ({"net": prefixed("module.", OPTION_B)}, ["option B", "'net'"]),
    "another name of them": (
        {key.replace("downsample", "shortcut"): value for key, value in OPTION_B.items()},
        ["option B", "layer2.0.shortcut.0.weight"],
    ),
    "100 classes": (STATE | {"linear.weight": torch.zeros(100, 64)}, ["100 classes", "CIFAR-10"]),
    "100 classes, fc": (with_fc() | {"fc.weight": torch.zeros(100, 64)}, ["100 classes"]),
    "code alone": ({"a": Call(os.system, SHELL)}, ["no tensors", "posix.system"]),
    "code itself": (Call(eval, f"open({CANARY!r}, 'w')"), ["no tensors", "builtins.eval"]),
    "nothing": ({}, ["no tensors"]),
    "a tensor": (torch.zeros(3), ["no tensors under names"]),
    "a network of another kind": (nn.Sequential(nn.Linear(2, 2)), ["0.weight", "ResNet-20"]),
    "a normalization before the network": (prefixed("1.") | {"0.mean": torch.zeros(3)}, ["unexpected '0.mean'"]),
    "a key too many": (STATE | {"layer4.0.conv1.weight": torch.zeros(1)}, ["unexpected 'layer4.0.conv1.weight'"]),
    "a key too few": ({k: v for k, v in STATE.items() if k != "layer2.1.bn1.bias"}, ["missing 'layer2.1.bn1.bias'"]),
    "another shape": (STATE | {"linear.weight": torch.zeros(10, 32)}, ["linear.weight", "(10, 32)", "(10, 64)"]),
    "whole numbers": (STATE | {"linear.bias": torch.zeros(10).long()}, ["linear.bias", "int64"]),
    "complex numbers": (STATE | {"linear.bias": COMPLEX}, ["linear.bias", "complex64"]),
    "a broken counter": (STATE | {"bn1.num_batches_tracked": torch.tensor(0.5)}, ["bn1.num_batches_tracked"]),
    "NaN": (STATE | {"linear.bias": torch.full((10,), float("nan"))}, ["linear.bias", "NaN"]),
    "too large for float32": (STATE | {"linear.bias": LARGE}, ["linear.bias", "infinite"]),
    "a negative variance": (STATE | {"bn1.running_var": -torch.ones(16)}, ["bn1.running_var", "negative"]),
    "two keys that become one": (STATE | {"module.linear.bias": torch.zeros(10)}, ["'linear.bias'", "prefixes"]),
    "a number as a key": (STATE | {5: torch.zeros(1)}, ["unexpected '5'"]),
    "a number in place of a tensor": (STATE | {"linear.bias": 5}, ["missing 'linear.bias'"]),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", SAID)
def test_what_does_not_fit_is_said_in_one_line(tmp_path, monkeypatch, what, form):
    monkeypatch.chdir(tmp_path)
    value, words = SAID[what]
    message = refusal(saved(tmp_path / "a.pth", value, **FORMATS[form]))
    assert all(word in message for word in words), message
    assert not (tmp_path / CANARY).exists()


def test_a_name_that_ends_in_code_is_no_torchscript(tmp_path):
    """Given a path, torch.save names the archive's folder after the file."""
    torch.save(STATE, tmp_path / "decode.pth")
    opened(tmp_path / "decode.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32(tmp_path, dtype):
    state = {name: v.to(dtype) if v.is_floating_point() else v for name, v in STATE.items()}
    opened(saved(tmp_path / "a.pth", state), {n: v.float() if v.is_floating_point() else v for n, v in state.items()})


@pytest.mark.parametrize("arch", ["resnet32", "resnet44", "resnet56", "resnet110"])
def test_the_depth_is_read_from_the_keys(tmp_path, arch):
    state = random_network(arch).state_dict()
    assert opened(saved(tmp_path / "a.pth", state), state).arch == arch


def test_a_few_tensors_may_share_their_memory(tmp_path):
    shared = torch.zeros(100_000)
    read, _ = checkpoints.examine(saved(tmp_path / "a.pth", {f"{i}": shared for i in range(3)}))
    assert len(read.value) == 3


def test_binary_weights_of_others_are_recognized(tmp_path):
    loaded = opened(saved(tmp_path / "a.pth", {"net": binary_network()}), binary_network().state_dict())
    assert loaded.kind == "binary"
