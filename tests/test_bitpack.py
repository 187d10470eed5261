"""One bit per weight: the codec, and packed dictionary <-> network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NEW_NETWORKS, SmallVGG, binary_network, register_new_networks
from torch import Tensor, nn

from engine import checkpoints
from models import ARCHITECTURES, BC, build, weight_layers
from models.binaryconnect import binarize_model
from models.bitpack import (
    conv_norm_pairs,
    fold_normalization,
    information_bytes,
    pack_bits,
    pack_model,
    scale_and_shift,
    unpack_bits,
    unpack_model,
)


@pytest.fixture(autouse=True)
def _new_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    register_new_networks(monkeypatch)


@torch.no_grad()
def assert_same_logits(model: nn.Module, *others: nn.Module) -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = model(images)
    assert expected.std(0).min() > 0  # the logits depend on the image
    for other in others:
        assert (other(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- the codec -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.randoms(use_true_random=False))
def test_signs_survive_packing_whatever_their_shape(shape, random):
    count = math.prod(shape)
    signs = torch.tensor([random.choice([-1.0, 1.0]) for _ in range(count)]).reshape(shape)
    packed = pack_bits(signs)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((count + 7) // 8,)
    assert torch.equal(unpack_bits(packed, count).view(shape), signs)


def test_bit_order_is_the_documented_one() -> None:
    w = torch.tensor([1, -1, -1, -1, -1, -1, -1, -1, -1, 1.0])  # weight 0: bit 0 of byte 0; weight 9: bit 1 of byte 1
    assert pack_bits(w).tolist() == [1, 2]


@pytest.mark.parametrize("bad", [0.0, 0.5, -0.999, math.nan, math.inf])
def test_only_signs_are_packed(bad: float) -> None:
    with pytest.raises(ValueError):
        pack_bits(torch.tensor([1.0, bad, -1.0]))


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),  # too short for 10 signs
        torch.zeros(3, dtype=torch.uint8),  # too long
        torch.zeros(2, dtype=torch.int32),
        torch.zeros((2, 1), dtype=torch.uint8),
        torch.tensor([0, 4], dtype=torch.uint8),  # the bit of an eleventh sign
    ],
)
def test_unpacking_refuses_what_packing_cannot_have_made(packed: Tensor) -> None:
    with pytest.raises(ValueError):
        unpack_bits(packed, 10)


# -- networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_batchnorm", [False, True])
@pytest.mark.parametrize("arch", ["resnet20", *NEW_NETWORKS])
def test_the_unpacked_network_has_the_same_signs_and_logits(arch: str, keep_batchnorm: bool) -> None:
    model = binary_network(arch)
    state = copy.deepcopy(model.state_dict())
    packed = pack_model(model, arch, keep_batchnorm=keep_batchnorm)
    unfolded, folded = unpack_model(packed, fold=False), unpack_model(packed)
    for (name, layer), (_, other) in zip(weight_layers(model), weight_layers(unfolded), strict=True):
        assert torch.equal(layer.weight, other.weight), name
    assert_same_logits(model, unfolded, folded, fold_normalization(copy.deepcopy(model)))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"packing changed {key}"
        if keep_batchnorm and not key.endswith("num_batches_tracked"):
            assert torch.equal(unfolded.state_dict()[key], value), key


@pytest.mark.parametrize("arch", NEW_NETWORKS)
def test_a_new_network_trains_binarizes_and_packs(arch: str) -> None:
    torch.manual_seed(0)
    bc = BC(build(arch))
    optimizer = torch.optim.Adam(bc.parameters(), 0.03)
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        bc.binarization()
        loss = F.cross_entropy(bc(images) / 8, labels)
        loss.backward()
        bc.restore()
        optimizer.step()
        bc.clip()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    bc.eval()
    binarized = copy.deepcopy(bc.model)
    binarize_model(binarized)
    with bc.binarized():
        assert_same_logits(bc.model, binarized, unpack_model(pack_model(bc.model, arch)))


def test_batchnorm_is_folded_into_the_convolution_that_it_follows() -> None:
    resnet = conv_norm_pairs(build("resnet20"))
    assert len(resnet) == 19
    assert all(norm == conv.replace("conv", "bn") for conv, norm in resnet.items())
    assert conv_norm_pairs(SmallVGG()) == {f"features.{i}": f"features.{i + 1}" for i in (0, 4, 8)}
    preactivation = {f"blocks.{i}.conv1": f"blocks.{i}.bn2" for i in (0, 1)}
    assert conv_norm_pairs(build("preactivation")) == preactivation
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fold_normalization(build("resnet20")).modules())


class Pieces(nn.Module):
    """A convolution and a BatchNorm after it, with something in `form` that makes folding wrong, or unusual."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        statistics = form != "no statistics"
        self.norm = nn.BatchNorm2d(3, affine=form != "no affine", track_running_stats=statistics)
        if form == "two names":
            self.both = nn.Sequential(self.conv, self.norm)
        self.linear = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "untraceable" and x.sum() > 1e9:
            return x
        if self.form == "two names":
            return self.linear(F.relu(self.both(x)).mean((2, 3)))
        y = self.conv(x)
        if self.form == "conv used twice":
            y = self.norm(y) + y
        elif self.form == "conv called twice":
            y = self.conv(self.norm(y))
        elif self.form == "norm called twice":
            y = self.norm(self.other(self.norm(y)))
        elif self.form == "weight used elsewhere":
            y = self.norm(y) + self.conv.weight.sum()
        else:
            y = self.norm(y)
        return self.linear(F.relu(y).mean((2, 3)))


@pytest.mark.parametrize(
    ("form", "pairs"),
    [
        *(("", 1), ("no affine", 1), ("two names", 1), ("conv used twice", 0), ("conv called twice", 0)),
        *(("norm called twice", 0), ("weight used elsewhere", 0), ("no statistics", 0), ("untraceable", 0)),
    ],
)
def test_where_folding_would_be_wrong_batchnorm_is_kept(
    form: str, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "pieces", lambda: Pieces(form))
    torch.manual_seed(0)
    model = build("pieces")
    binarize_model(model)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, 3, 32, 32) + 1)  # running statistics
    assert len(conv_norm_pairs(model.eval())) == pairs
    packed = pack_model(model, "pieces")
    assert_same_logits(model, unpack_model(packed), unpack_model(packed, fold=False))


def test_shipped_files_load_with_the_same_bits() -> None:
    """The 1-bit file, packed anew from what it was made of, is the same."""
    shipped = checkpoints.load(ROOT / "pretrained" / "resnet20_binary_1bit.pth")
    model = checkpoints.load(ROOT / "pretrained" / "resnet20_binary_latent.pth").model()
    binarize_model(model)
    packed = pack_model(model, "resnet20")
    for key in ("signs", "floats"):
        assert torch.equal(packed[key], shipped.raw[key]), key
    first, last = scale_and_shift(model.bn1)[0], model.linear.bias
    assert torch.equal(packed["floats"][:16], first)
    assert torch.equal(packed["floats"][-10:], last)


def test_a_network_with_a_weight_that_is_no_sign_is_not_packed() -> None:
    model = binary_network()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 2, 1, 0] = 0.25
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight"):
        pack_model(model, "resnet20")


@pytest.mark.parametrize(
    ("arch", "float32", "float16"),
    [("resnet20", 39_086, 36_314), ("resnet56", 122_414, 114_266)],
)
def test_a_network_packs_to_its_information(arch: str, float32: int, float16: int) -> None:
    model = build(arch)
    binarize_model(model)
    packed = pack_model(model, arch)
    assert packed["signs"].numel() + 4 * packed["floats"].numel() == information_bytes(model) == float32
    assert information_bytes(model, float_bytes=2) == float16


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(arch="resnet32"),
        lambda p: p.update(arch="resnet21"),
        lambda p: p.update(floats=p["floats"][:-1]),
        lambda p: p.update(floats=p["floats"].double()),
        lambda p: p["floats"][7].fill_(math.nan),
        lambda p: p.update(batchnorm="kept" if p["batchnorm"] == "folded" else "folded"),
        # bn1 where it is kept: 16 weights, 16 biases, 16 means, then the variances
        lambda p: p["floats"][3 * 16 + 5].fill_(-1.0 if p["batchnorm"] == "kept" else math.inf),
    ],
    ids=["another arch", "unknown arch", "short", "float64", "NaN", "batchnorm", "variance"],
)
def test_unpacking_refuses_what_does_not_fit(change: Callable, keep: bool) -> None:
    packed = pack_model(binary_network(), "resnet20", keep_batchnorm=keep)
    change(packed)
    with pytest.raises(ValueError):
        unpack_model(packed)


def test_scale_and_shift_are_those_of_batchnorm() -> None:
    norm, x = binary_network().bn1, torch.randn(4, 16, 8, 8) * 10
    for bias in (torch.zeros(16), torch.randn(16)):
        scale, shift = (values[:, None, None] for values in scale_and_shift(norm, bias))
        torch.testing.assert_close(x * scale + shift, norm(x + bias[:, None, None]), rtol=1e-5, atol=1e-5)
    assert scale[0] < 0
    assert scale[1] == 0
