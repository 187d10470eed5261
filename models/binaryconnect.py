"""BinaryConnect: train a network whose weights are -1 or +1 in every forward and backward pass.

Courbariaux, Bengio and David, "BinaryConnect: Training Deep Neural Networks with binary weights during
propagations", 2015 (arXiv:1511.00363), algorithm 1. A training step is

    bc.binarization()            w_b = sign(w); the latent weights w are saved
    loss(bc(images)).backward()  forward and backward with w_b: the gradient is dC/dw_b
    bc.restore()                 w is back, so the gradient is applied to w (straight-through estimator)
    optimizer.step()
    bc.clip()                    w is clipped to [-1, 1]

models/quantizers.py has sign(w), and how to put another function in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.quantizers import Quantizer, deterministic_sign, signs, stochastic_sign


def weight_layers(model: nn.Module) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Every Conv2d and Linear of a model with its name, in the order in which the model registers them.

    These are the layers whose weights are binarized.
    """
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def is_binary(w: Tensor) -> bool:
    """Whether every element of w is exactly -1 or +1."""
    return bool((w.abs() == 1).all())


def count_binary_weights(model: nn.Module) -> int:
    """The number of weights of all Conv2d and Linear. Raises ValueError naming a layer where one is not -1 or +1."""
    for name, layer in weight_layers(model):
        if not is_binary(layer.weight):
            raise ValueError(f"{name}.weight holds values other than -1 and +1")
    return sum(layer.weight.numel() for _, layer in weight_layers(model))


class BC(nn.Module):
    """BinaryConnect around `model`: the weights of every Conv2d and Linear are quantized, nothing else is.

    Outside of `binarization()` ... `restore()` the model's own parameters hold the latent weights, so an optimizer
    made from `model.parameters()` works on them. A state_dict holds what the model holds at the moment.

    `bc.model` may be replaced; from then on the new network is binarized (and needs an optimizer of its own).
    Raises RuntimeError for a replacement while the model holds binary weights.

    quantizer: makes the weights of the forward pass from the latent ones; see models/quantizers.py.
    Raises ValueError for a model without Conv2d or Linear.
    """

    is_binarized = False

    def __init__(self, model: nn.Module, *, quantizer: Quantizer = deterministic_sign) -> None:
        super().__init__()
        self.model = model
        self.quantizer = quantizer
        self._saved: list[Tensor] = []  # the latent weights, while the model holds binary ones

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model" and self.is_binarized:
            raise RuntimeError("bc.model holds binary weights; call bc.restore() before replacing it")
        if name == "model" and not weight_layers(value):
            raise ValueError("the model has no Conv2d or Linear whose weights could be binary")
        super().__setattr__(name, value)

    @property
    def quantizer_name(self) -> str:
        """The quantizer's `__name__`, as checkpoints record it."""
        return getattr(self.quantizer, "__name__", type(self.quantizer).__name__)

    @property
    def scoring_quantizer(self) -> Quantizer:
        """The quantizer of the finished network: the deterministic sign for stochastic signs, else the same one."""
        return deterministic_sign if self.quantizer is stochastic_sign else self.quantizer

    @property
    def target_names(self) -> list[str]:
        """The names within `model` of the `targets()`."""
        return [f"{name}.weight" if name else "weight" for name, _ in weight_layers(self.model)]

    def targets(self) -> list[nn.Parameter]:
        """The weights that are binarized, of the layers that the model has now."""
        return [layer.weight for _, layer in weight_layers(self.model)]

    def latent_weights(self) -> list[Tensor]:
        """The latent weights, detached, also while the model holds the binary ones. Not copies: do not write."""
        weights = [weight.detach() for weight in self.targets()]
        if self.is_binarized:
            return [saved.to(weight) for saved, weight in zip(self._saved, weights, strict=True)]
        return weights

    @torch.no_grad()
    def quantized_weights(self) -> Sequence[Tensor]:
        """What `scoring_quantizer` makes of the latent weights; changes nothing. For the share that has flipped."""
        return _quantize(self.scoring_quantizer, self.latent_weights())

    @torch.no_grad()
    def save_params(self) -> None:
        """Save a copy of the latent weights. Does nothing while the model holds binary weights: a copy of those
        would overwrite the latent ones."""
        if self.is_binarized:
            return
        weights = self.targets()
        if [_layout(t) for t in self._saved] != [_layout(t) for t in weights]:
            self._saved = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(self._saved, weights)  # one kernel launch for all layers, here and below

    @torch.no_grad()
    def binarization(self, quantizer: Quantizer | None = None) -> None:
        """Save the latent weights and put the quantized ones in their place. A second call changes nothing.

        quantizer: another one than that of the wrapper, for this time.
        Raises ValueError, with the model untouched, where a latent weight is NaN and the weights are on the CPU.
        On an accelerator the check would stall the device at each step; there NaN goes through to the loss.
        """
        if self.is_binarized:
            return
        self.save_params()
        weights = self.targets()
        if weights[0].device.type == "cpu":
            _refuse_nan(self.model)
        quantized = _quantize(quantizer or self.quantizer, weights)
        self.is_binarized = True
        torch._foreach_copy_(weights, quantized)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the latent weights back, bit for bit. Without a `binarization()` before it, it changes nothing."""
        if self.is_binarized:
            torch._foreach_copy_(self.targets(), self._saved)
            self.is_binarized = False

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the latent weights to [-1, 1]: beyond, they would no longer change the sign or its gradient."""
        weights = self._saved if self.is_binarized else self.targets()
        torch._foreach_clamp_min_(weights, -1.0)
        torch._foreach_clamp_max_(weights, 1.0)

    @contextmanager
    def binarized(self) -> Iterator[BC]:
        """`with bc.binarized():` the weights of `scoring_quantizer` inside, the latent ones afterwards, also after
        an exception. Nested inside another binarization it leaves that one as it is."""
        outermost = not self.is_binarized
        self.binarization(self.scoring_quantizer)
        try:
            yield self
        finally:
            if outermost:
                self.restore()

    def forward(self, x: Tensor) -> Tensor:
        """The model on x, with whichever weights it holds now."""
        return self.model(x)


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.device


def _quantize(quantizer: Quantizer, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The quantized weights of each layer; for the deterministic sign all layers at once."""
    return signs(weights) if quantizer is deterministic_sign else [quantizer(weight) for weight in weights]


def _refuse_nan(model: nn.Module) -> None:
    for name, layer in weight_layers(model):
        # The sum is NaN where a weight is, and faster; infinite weights of both signs make it NaN as well.
        if layer.weight.sum().isnan() and layer.weight.isnan().any():
            raise ValueError(f"{name}.weight: a weight is NaN and has no sign")


@torch.no_grad()
def binarize_model(model: nn.Module) -> None:
    """Replace every Conv2d and Linear weight by its sign, for good.

    Raises ValueError naming the layer, with the model untouched, where a weight is NaN.
    """
    _refuse_nan(model)
    for _, layer in weight_layers(model):
        layer.weight.copy_(deterministic_sign(layer.weight))
