"""BinaryConnect: what must hold whatever is called in whatever order, and the paper's algorithm step by step."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import main_binary
from engine.training.run import Run
from models import BC, build
from models.binaryconnect import binarize_model, is_binary
from models.bitpack import pack_model, unpack_model
from models.quantizers import SIGN_QUANTIZERS, Quantizer, deterministic_sign, signs, stochastic_sign

# Zeros of both signs, denormals, the neighbors of 0 and of 1, infinities.
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.2e-38, -1.2e-38, 1.0, -1.0, 0.99999994, -0.99999994]
SPECIAL += [1.0000001, -1.0000001, 3e38, -3e38, math.inf, -math.inf, 0.5, -0.5]
values = st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False)), min_size=1, max_size=24)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def ternary(w: Tensor) -> Tensor:
    """A third quantizer: -1, 0, +1 with a threshold of 0.3."""
    return torch.where(w.abs() < 0.3, 0.0, w.sign()).to(w.dtype)


def bits(tensors: list[Tensor]) -> list[tuple[torch.dtype, bytes]]:
    """What tensors hold, bit for bit: 0.0 and -0.0 differ."""
    return [(t.dtype, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors]


def by_hand(w: Tensor) -> list[float]:
    return [1.0 if value >= 0 else -1.0 for value in w.detach().double().reshape(-1).tolist()]


@torch.no_grad()
def fill(model: nn.Module, numbers: list[float]) -> nn.Module:
    """Give every parameter of `model` the numbers, over and over, each starting at another one."""
    for start, parameter in enumerate(model.parameters()):
        index = (torch.arange(parameter.numel()) + start) % len(numbers)
        parameter.copy_(torch.tensor(numbers)[index].view_as(parameter))
    return model


def small_model() -> nn.Module:
    """Every kind of layer, nested; the weights are 36 + 12 + 6 + 6 numbers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.PReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2, bias=False),
        nn.LayerNorm(2),
        nn.Linear(2, 3),
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def others(model: nn.Module) -> list[Tensor]:
    """Everything a model holds but the weights of Conv2d and Linear."""
    weights = {id(w) for w in weights_of(model)}
    return [t for t in [*model.parameters(), *model.buffers()] if id(t) not in weights]


# -- quantizers ------------------------------------------------------------------------------------------------


@quick
@given(values, st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_the_sign_is_plus_one_from_zero_on(numbers, dtype):
    w = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    found = deterministic_sign(w)
    assert found.dtype == dtype
    assert found.tolist() == by_hand(w)


@pytest.mark.parametrize("sign", SIGN_QUANTIZERS.values())
def test_nan_stays_nan(sign):
    assert sign(torch.tensor([1.0, math.nan])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("value", [math.nan, 0.0, 0.5, math.inf, -1.0000001])
def test_only_minus_one_and_plus_one_are_binary(value):
    assert is_binary(torch.tensor([1.0, -1.0]))
    assert not is_binary(torch.tensor([1.0, -1.0, value]))


@pytest.mark.parametrize("value", [-math.inf, -1.0, -0.9, -0.5, -0.0, 0.3, 0.8, 1.0, 1.5])
def test_stochastic_signs_follow_the_hard_sigmoid(value):
    """Certain from -1 and +1 on; drawn anew each time, and the same again from the same seed."""
    torch.manual_seed(0)
    count, probability = 40_000, min(max((value + 1) / 2, 0), 1)
    w = torch.full((count,), value)
    drawn, again = stochastic_sign(w), stochastic_sign(w)
    assert is_binary(drawn)
    assert torch.equal(drawn, again) == (probability in (0, 1))
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(int((drawn > 0).sum()) - count * probability) <= 4.5 * deviation
    torch.manual_seed(0)
    assert torch.equal(stochastic_sign(w), drawn)


def test_a_quantizer_of_ones_own_trains_and_is_scored_with_itself():
    torch.manual_seed(0)
    bc = BC(fill(small_model(), [0.9, -0.2, 0.1, -0.6, 0.4]), quantizer=ternary)
    assert bc.quantizer_name == "ternary"
    step, labels = make_step(bc, "adam", latent_lr=0.05), torch.arange(16) % 3
    images, before = torch.randn(16, 2, 3, 3), bits(bc.quantized_weights())
    losses = [step(images, labels)[0].item() for _ in range(30)]
    assert losses[-1] < losses[0]
    latent = [w.detach().clone() for w in bc.targets()]
    quantized = bits([ternary(w) for w in latent])
    assert quantized != before
    assert bits(bc.quantized_weights()) == quantized
    with bc.binarized():
        assert bits(bc.targets()) == bits(bc.quantized_weights()) == quantized
    assert bits(bc.targets()) == bits(latent)


def test_stochastic_signs_are_scored_with_the_deterministic_ones():
    bc = BC(fill(small_model(), SPECIAL), quantizer=stochastic_sign)
    assert bc.quantizer_name == "stochastic_sign"
    expected = [by_hand(w) for w in bc.targets()]
    assert [w.reshape(-1).tolist() for w in bc.quantized_weights()] == expected
    with bc.binarized():
        assert [w.reshape(-1).tolist() for w in bc.targets()] == expected


# -- the wrapper -----------------------------------------------------------------------------------------------


def test_the_first_convolution_and_the_classifier_are_binarized_too():
    bc = BC(build("resnet20"))
    assert len(bc.target_names) == 20
    assert {"conv1.weight", "linear.weight"} <= set(bc.target_names)
    assert sum(w.numel() for w in bc.targets()) == 268_336


@quick
@given(values, st.sampled_from(["adam", "sgd"]), st.sampled_from(list(SIGN_QUANTIZERS.values())))
def test_after_a_step_and_clip_the_latent_weights_are_within_one(numbers, optimizer, quantizer):
    bc = BC(fill(small_model(), [n for n in numbers if abs(n) <= 1] or [0.25]), quantizer=quantizer)
    step = make_step(bc, optimizer, latent_lr=10.0)
    torch.manual_seed(0)
    for _ in range(2):
        step(torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 2, 0]))
        assert all((w.abs() <= 1).all() for w in bc.targets())


@pytest.mark.parametrize("quantizer", [*SIGN_QUANTIZERS.values(), ternary])
def test_nan_is_an_error_and_the_model_untouched(quantizer):
    model = fill(small_model(), [0.25, -0.5])
    bc = BC(model, quantizer=quantizer)
    name = bc.target_names[1]
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = math.nan
    before = bits(list(model.state_dict().values()))
    with pytest.raises(ValueError, match=name):
        bc.binarization()
    with pytest.raises(ValueError, match=name), bc.binarized():
        pytest.fail("NaN has no sign")
    with pytest.raises(ValueError, match=name):
        binarize_model(model)
    assert not bc.is_binarized
    bc.restore()
    assert bits(list(model.state_dict().values())) == before


def test_a_quantizer_that_fails_leaves_the_latent_weights():
    def failing(w: Tensor) -> Tensor:
        if w.numel() == 12:  # the second of four layers
            raise MemoryError
        return torch.ones_like(w)

    bc = BC(fill(small_model(), [0.25, -0.5]), quantizer=failing)
    before = bits(bc.targets())
    with pytest.raises(MemoryError):
        bc.binarization()
    bc.restore()
    assert bits(bc.targets()) == before


def test_another_network_in_the_place_of_the_first_is_binarized():
    bc, other = BC(small_model()), fill(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)), SPECIAL)
    bc.binarization()
    bc.restore()
    bc.model = other
    before = bits(weights_of(other))
    assert bc.target_names == ["0.weight", "2.weight"]
    with bc.binarized():
        assert all(is_binary(w) for w in weights_of(other))
    assert bits(bc.targets()) == bits(weights_of(other)) == before
    bc.clip()
    assert all((w.abs() <= 1).all() for w in weights_of(other))
    other[2] = nn.Linear(4, 7)  # another classifier inside
    with bc.binarized():
        assert is_binary(other[2].weight)
        with pytest.raises(RuntimeError, match="restore"):
            bc.model = small_model()
    for nothing in (lambda: setattr(bc, "model", nn.ReLU()), lambda: BC(nn.BatchNorm2d(3))):
        with pytest.raises(ValueError, match="Conv2d or Linear"):
            nothing()
    assert bc.model is other


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("whole", [True, False], ids=["wrapper", "inner model"])
def test_latent_weights_follow_a_change_of_dtype(convert, whole):
    bc = BC(fill(small_model(), SPECIAL[:14]))
    converted = [getattr(w.detach().clone(), convert)() for w in bc.targets()]
    for _ in range(2):  # converted while binary, then binarized again
        with bc.binarized():
            getattr(bc if whole else bc.model, convert)()
            assert all(is_binary(w) for w in bc.targets())
            assert bits(bc.latent_weights()) == bits(converted)
        assert bits(bc.targets()) == bits(converted)


def test_a_step_takes_few_operations_and_all_where_the_weights_are():
    """On a GPU each is a kernel launch or two. The meta device stands for any other than the CPU."""
    operations = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func)
            return func(*args, **(kwargs or {}))

    bc = BC(build("resnet20").to("meta"))
    for _ in range(2):
        operations.clear()
        with Record():
            bc.binarization()
            bc.restore()
            bc.clip()
    assert len(operations) <= 12
    bc.binarization()
    assert {t.device.type for t in [*bc.targets(), *bc.latent_weights()]} == {"meta"}


def test_weights_that_are_replaced_or_shared_are_binarized_and_restored():
    """load_state_dict(assign=True) and the like put new parameters in place of those the wrapper was made with."""
    bc, other = BC(small_model()), fill(small_model(), SPECIAL)
    bc.model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    sharing = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    sharing[2].weight = sharing[0].weight
    for wrapper in (bc, BC(fill(sharing, SPECIAL))):
        before = bits(wrapper.targets())
        with wrapper.binarized():
            assert all(is_binary(w) for w in weights_of(wrapper.model))
        assert bits(wrapper.targets()) == before
    assert bits(bc.targets()) == bits(weights_of(other))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager", dynamic=False)


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda module: compiled(nn.DataParallel(module))])
@pytest.mark.parametrize("inside", [False, True], ids=["around BC", "inside BC"])
def test_wrappers_see_binary_weights_inside_and_latent_ones_outside(wrap, inside):
    model = fill(small_model(), [0.3, -0.2, 0.0, 0.7, -0.9]).eval()
    reference, x = copy.deepcopy(model), torch.randn(2, 2, 4, 4)
    bc = BC(wrap(model) if inside else model)
    network = bc if inside else wrap(bc)
    latent = reference(x)
    binarize_model(reference)
    for _ in range(2):  # a compiled network must not have kept the weights it was compiled with
        torch.testing.assert_close(network(x), latent)
        with bc.binarized():
            torch.testing.assert_close(network(x), reference(x))
    assert not torch.allclose(latent, reference(x))


# -- any order of calls ----------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called in whatever order: the weights are the latent ones or the quantizer's, and the latent
    ones are bit for bit what only a step, a clip or a load may make of them."""

    @initialize(numbers=values, quantizer=st.sampled_from([deterministic_sign, stochastic_sign, ternary]))
    def start(self, numbers: list[float], quantizer: Quantizer) -> None:
        self.bc = BC(fill(small_model(), numbers), quantizer=quantizer)
        self.latent = [w.detach().clone() for w in self.bc.targets()]
        self.quantized: list[Tensor] | None = None
        self.rest = bits(others(self.bc.model))

    @rule()
    def binarize(self) -> None:
        self.bc.binarization()
        if self.quantized is None:
            self.quantized = [w.detach().clone() for w in self.bc.targets()]
            if self.bc.quantizer is deterministic_sign:
                assert [s.reshape(-1).tolist() for s in self.quantized] == [by_hand(w) for w in self.latent]
            elif self.bc.quantizer is stochastic_sign:
                assert all(is_binary(w) for w in self.quantized)
            else:
                assert bits(self.quantized) == bits([ternary(w) for w in self.latent])

    @rule()
    def restore(self) -> None:
        self.bc.restore()
        self.quantized = None

    @rule()
    def save(self) -> None:
        self.bc.save_params()

    @rule()
    def clip(self) -> None:
        self.bc.clip()
        self.latent = [w.clamp(-1, 1) for w in self.latent]

    @rule(fails=st.booleans())
    def context(self, fails: bool) -> None:
        standing = bits(self.quantized) if self.quantized is not None else None
        with contextlib.suppress(InterruptedError), self.bc.binarized():
            assert bits(self.bc.targets()) == (standing or bits(self.bc.quantized_weights()))
            with self.bc.binarized():
                self.bc.binarization()
            assert self.bc.is_binarized
            if fails:
                raise InterruptedError

    @rule()
    def continue_with_a_copy(self) -> None:
        old, self.bc = self.bc, copy.deepcopy(self.bc)
        with torch.no_grad():  # the copy shares nothing with the old one
            for tensor in [*old.parameters(), *old.buffers(), *old.latent_weights()]:
                tensor.fill_(7)

    @rule()
    def read_the_state(self) -> None:
        state = self.bc.state_dict()  # never holds the saved copies
        assert list(state) == [f"model.{name}" for name in self.bc.model.state_dict()]
        held = self.quantized or self.latent
        assert bits([state[f"model.{name}"] for name in self.bc.target_names]) == bits(held)

    @precondition(lambda self: self.quantized is None)
    @rule()
    def load_into_another(self) -> None:
        state = copy.deepcopy(self.bc.state_dict())
        self.bc = BC(small_model(), quantizer=self.bc.quantizer)
        self.bc.load_state_dict(state)

    @precondition(lambda self: self.quantized is None)
    @rule(by=st.floats(-2, 2, width=32))
    def change_the_latent_weights(self, by: float) -> None:
        with torch.no_grad():
            for w in self.bc.targets():
                w.clamp_(-3, 3).add_(by)
        self.latent = [w.clamp(-3, 3) + torch.tensor(by) for w in self.latent]

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "bc"):
            return
        assert self.bc.is_binarized == (self.quantized is not None)
        assert bits(self.bc.latent_weights()) == bits(self.latent)
        assert bits(weights_of(self.bc.model)) == bits(self.quantized if self.quantized is not None else self.latent)
        assert bits(others(self.bc.model)) == self.rest


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, derandomize=True, database=None
)


# -- one rule for all ------------------------------------------------------------------------------------------


def resnet_with_zeros() -> nn.Module:
    return fill(build("resnet20").eval(), [0.0, -0.0, 0.5, -0.5, 1e-45, -1e-45, 1.0])


def in_training(model: nn.Module) -> list[Tensor]:
    bc = BC(model)
    bc.binarization()
    return bc.targets()


def in_scoring(model: nn.Module) -> list[Tensor]:
    bc = BC(model, quantizer=stochastic_sign)
    with bc.binarized():
        return [w.detach().clone() for w in bc.targets()]


def in_the_flip_rate(model: nn.Module) -> list[Tensor]:
    return list(BC(model).quantized_weights())


def in_packed_files(model: nn.Module) -> list[Tensor]:
    binarize_model(model)
    assert all(is_binary(w) for w in weights_of(model))
    return weights_of(unpack_model(pack_model(model, "resnet20"), fold=False))


@pytest.mark.parametrize("user", [in_training, in_scoring, in_the_flip_rate, in_packed_files])
def test_there_is_one_place_that_decides_the_sign(user, monkeypatch):
    """Zeros have the same sign everywhere; reversed in that one place, the signs are reversed everywhere."""

    def the_other_way_round(weights: list[Tensor]) -> list[Tensor]:
        return [torch.where(w < 0, 1.0, -1.0) for w in weights]

    expected = [by_hand(w) for w in weights_of(resnet_with_zeros())]
    assert [w.reshape(-1).tolist() for w in user(resnet_with_zeros())] == expected
    monkeypatch.setattr(signs, "__code__", the_other_way_round.__code__)
    assert [(-w).reshape(-1).tolist() for w in user(resnet_with_zeros())] == expected


# -- numerics --------------------------------------------------------------------------------------------------


def make_step(bc: BC, optimizer: str, *, label_smoothing: float = 0.0, **options: float) -> Callable:
    """The very step of main_binary.py, in full precision on the CPU."""
    defaults = {"lr": 0.1, "weight_decay": 0.0, "logit_scale": 1.0, "precision": "float32"}
    args = argparse.Namespace(optimizer=optimizer, **(defaults | options))
    run = Run(args, torch.device("cpu"), Path("."), "latent", None, None)

    def criterion(logits: Tensor, _images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return main_binary.make_train_step(run, bc, bc, main_binary.make_optimizers(args, bc), criterion)


class Reference:
    """Algorithm 1 of the BinaryConnect paper in float64 and numpy, written to be read, for the small network

    3x3 convolution - BatchNorm - ReLU - mean over all pixels - linear layer with a bias - cross-entropy.
    """

    def __init__(self, conv: np.ndarray, linear: np.ndarray, bias: np.ndarray, optimizer: str, **options: float):
        self.latent = {"conv": conv, "linear": linear}
        self.others = {"gamma": np.ones(len(conv)), "beta": np.zeros(len(conv)), "bias": bias}
        self.optimizer, self.options = optimizer, options
        self.memory: dict[str, list[np.ndarray]] = {}
        self.steps = 0

    def gradients(self, x: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """dC/dw at the binary weights; x: (N, C, H, W)."""
        conv, linear = (np.where(w >= 0, 1.0, -1.0) for w in self.latent.values())
        gamma, beta, bias = self.others.values()
        n, _, height, width = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        taps = [(i, j, padded[:, :, i : i + height, j : j + width]) for i in range(3) for j in range(3)]
        y = sum(np.einsum("nchw,oc->nohw", tap, conv[:, :, i, j]) for i, j, tap in taps)

        axes, per_channel = (0, 2, 3), (1, -1, 1, 1)
        mean, deviation = y.mean(axes, keepdims=True), np.sqrt(y.var(axes, keepdims=True) + 1e-5)
        normal = (y - mean) / deviation
        z = gamma.reshape(per_channel) * normal + beta.reshape(per_channel)
        pooled = np.maximum(z, 0).mean((2, 3))
        logits = self.options["logit_scale"] * (pooled @ linear.T + bias)

        smoothing, classes = self.options["label_smoothing"], len(bias)
        target = np.full((n, classes), smoothing / classes) + (1 - smoothing) * np.eye(classes)[labels]
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        softmax /= softmax.sum(1, keepdims=True)
        d_out = self.options["logit_scale"] * (softmax - target) / n

        d_z = ((d_out @ linear) / (height * width))[:, :, None, None] * (z > 0)
        d_normal = d_z * gamma.reshape(per_channel)
        d_y = d_normal - d_normal.mean(axes, keepdims=True)
        d_y = (d_y - normal * (d_normal * normal).mean(axes, keepdims=True)) / deviation
        d_conv = np.zeros_like(conv)
        for i, j, tap in taps:
            d_conv[:, :, i, j] = np.einsum("nohw,nchw->oc", d_y, tap)
        return {
            "conv": d_conv,
            "linear": d_out.T @ pooled,
            "gamma": (d_z * normal).sum(axes),
            "beta": d_z.sum(axes),
            "bias": d_out.sum(0),
        }

    def step(self, x: np.ndarray, labels: np.ndarray) -> None:
        self.steps += 1
        gradients = self.gradients(x, labels)
        for name, w in self.latent.items():
            change = getattr(self, self.optimizer)(name, w, gradients[name], self.options["latent_lr"])
            self.latent[name] = np.clip(w + change, -1, 1)
        for name, w in self.others.items():
            change = self.sgd(name, w, gradients[name], self.options["lr"], self.options["weight_decay"])
            self.others[name] = w + change

    def sgd(self, name: str, w: np.ndarray, gradient: np.ndarray, lr: float, decay: float = 0.0) -> np.ndarray:
        gradient = gradient + decay * w
        velocity = 0.9 * self.memory[name][0] + gradient if name in self.memory else gradient
        self.memory[name] = [velocity]
        return -lr * (gradient + 0.9 * velocity)

    def adam(self, name: str, w: np.ndarray, gradient: np.ndarray, lr: float) -> np.ndarray:
        first, second = self.memory.get(name, [np.zeros_like(w), np.zeros_like(w)])
        self.memory[name] = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2]
        first, second = self.memory[name]
        first, second = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
        return -lr * first / (np.sqrt(second) + 1e-8)

    def muon(self, name: str, w: np.ndarray, gradient: np.ndarray, lr: float) -> np.ndarray:
        [average] = self.memory.get(name, [np.zeros_like(w)])
        self.memory[name] = [average := 0.95 * average + 0.05 * gradient]
        left, values, right = np.linalg.svd(
            (0.05 * gradient + 0.95 * average).reshape(len(w), -1), full_matrices=False
        )
        values = values / np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        update = (left * values @ right).reshape(w.shape)
        return -lr * update / np.sqrt(np.mean(update**2))


# No two options have one value, so that none can stand in for another.
# Learning rates of the latent weights, and how far float32 may be off: Muon raises small singular values 485 times.
NUMERICS = {"muon": (0.03, 3e-5), "adam": (0.05, 5e-6), "sgd": (2.0, 5e-6)}


@pytest.mark.parametrize("optimizer", NUMERICS)
def test_twenty_steps_are_those_of_the_paper_in_float64(optimizer):
    latent_lr, tolerance = NUMERICS[optimizer]
    options = {"latent_lr": latent_lr, "lr": 0.1, "weight_decay": 1e-2, "logit_scale": 0.5, "label_smoothing": 0.1}
    random = np.random.default_rng(9)
    torch.manual_seed(9)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    with torch.no_grad():
        for layer in (model[0], model[5]):
            layer.weight.uniform_(-1, 1)
    bc = BC(model)
    step = make_step(bc, optimizer, **options)
    conv, linear, bias = (t.detach().double().numpy().copy() for t in (*bc.targets(), model[5].bias))
    reference = Reference(conv, linear, bias, optimizer, **options)
    nearest, smallest, flips, clipped = 1.0, 1.0, 0, 0
    for _ in range(20):
        x, labels = random.normal(size=(16, 3, 6, 6)).astype(np.float32), random.integers(0, 4, 16)
        before = {name: w >= 0 for name, w in reference.latent.items()}
        gradients = reference.gradients(x.astype(np.float64), labels)
        reference.step(x.astype(np.float64), labels)
        step(torch.from_numpy(x), torch.from_numpy(labels))
        for name, w in reference.latent.items():
            nearest, smallest = min(nearest, np.abs(w).min()), min(smallest, np.abs(gradients[name]).min())
            flips += int((before[name] != (w >= 0)).sum())
            clipped += int((np.abs(w) == 1).sum())
    assert nearest > 4 * tolerance, "choose another seed: rounding could flip a sign"
    if optimizer == "adam":
        assert smallest > 1e-6, "choose another seed: Adam divides by the gradient's size and would enlarge rounding"
    assert flips > 10, "too few signs changed for the test to mean much"
    assert clipped > 10
    ours = [*bc.targets(), model[1].weight, model[1].bias, model[5].bias]
    for one, other in zip(ours, [*reference.latent.values(), *reference.others.values()], strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, rtol=0, atol=tolerance)
