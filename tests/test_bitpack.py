"""One bit per weight: the codec, and packed dictionary <-> network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import binary_network

from models import ARCHITECTURES, build
from models.binaryconnect import binarize_model, is_binary
from models.bitpack import (
    information_bytes,
    pack_bits,
    pack_model,
    scale_and_shift,
    unpack_bits,
    unpack_model,
)
from models.resnet_s import weight_layers


@given(st.lists(st.booleans(), min_size=0, max_size=70))
@settings(deadline=None)
def test_signs_survive_packing(bits: list[bool]) -> None:
    w = torch.tensor([1.0 if bit else -1.0 for bit in bits])
    packed = pack_bits(w)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(packed, len(bits)), w)


def test_bit_order_is_the_documented_one() -> None:
    w = torch.tensor([1, -1, -1, -1, -1, -1, -1, -1, -1, 1.0])  # weight 0: bit 0 of byte 0; weight 9: bit 1 of byte 1
    assert pack_bits(w).tolist() == [1, 2]


@pytest.mark.parametrize("bad", [0.0, 0.5, -0.999, float("nan"), float("inf")])
def test_only_signs_are_packed(bad: float) -> None:
    with pytest.raises(ValueError, match="exactly -1 or"):
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
def test_unpacking_refuses_what_packing_cannot_have_made(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"bytes|beyond"):
        unpack_bits(packed, 10)


@pytest.mark.parametrize("keep_batchnorm", [False, True])
def test_the_unpacked_network_has_the_same_signs_and_logits(keep_batchnorm: bool) -> None:
    model = binary_network()
    packed = pack_model(model, "resnet20", keep_batchnorm=keep_batchnorm)
    unfolded, folded = unpack_model(packed, fold=False), unpack_model(packed)
    for (name, layer), (_, other) in zip(weight_layers(model), weight_layers(unfolded), strict=True):
        assert torch.equal(layer.weight, other.weight), name
        assert is_binary(other.weight), name
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        tolerance = 1e-5 * float(expected.abs().max())
        assert (unfolded(images) - expected).abs().max() <= tolerance
        assert (folded(images) - expected).abs().max() <= tolerance
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_kept_batchnorm_is_bit_for_bit_that_of_the_network() -> None:
    model = binary_network()
    unpacked = unpack_model(pack_model(model, "resnet20", keep_batchnorm=True), fold=False).state_dict()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(unpacked[key], value), key


def test_a_network_with_a_weight_that_is_no_sign_is_not_packed() -> None:
    model = binary_network()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 2, 1, 0] = 0.25
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight"):
        pack_model(model, "resnet20")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_packs_to_its_information(arch: str) -> None:
    model = build(arch)
    binarize_model(model)
    packed = pack_model(model, arch)
    assert packed["signs"].numel() + 4 * packed["floats"].numel() == information_bytes(model)


def test_information_of_resnet20() -> None:
    model = build("resnet20")
    assert information_bytes(model) == 39_086
    assert information_bytes(model, float_bytes=2) == 36_314


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(arch="resnet32"), "signs need"),
        (lambda p: p.update(arch="resnet21"), "unknown architecture"),
        (lambda p: p.update(floats=p["floats"][:-1]), "float32 values"),
        (lambda p: p.update(floats=p["floats"].double()), "float32 values"),
        (lambda p: p["floats"][7].fill_(float("nan")), "not finite"),
        (lambda p: p.update(batchnorm="kept"), "float32 values"),
    ],
)
def test_unpacking_refuses_what_does_not_fit(change: object, message: str) -> None:
    packed = pack_model(binary_network(), "resnet20")
    change(packed)
    with pytest.raises(ValueError, match=message):
        unpack_model(packed)


def test_unpacking_refuses_negative_variances() -> None:
    packed = pack_model(binary_network(), "resnet20", keep_batchnorm=True)
    packed["floats"][3 * 16 + 5] = -1.0  # of bn1: 16 weights, 16 biases, 16 means, then the variances
    with pytest.raises(ValueError, match="variance"):
        unpack_model(packed)


def test_scale_and_shift_are_those_of_batchnorm() -> None:
    norm = binary_network().bn1
    x = torch.randn(4, 16, 8, 8) * 10
    scale, shift = scale_and_shift(norm)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], norm(x), rtol=1e-5, atol=1e-5)
    assert scale[0] < 0
    assert scale[1] == 0
