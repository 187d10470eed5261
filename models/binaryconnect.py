"""BinaryConnect: train a network whose weights are -1 or +1 in every forward and backward pass.

Courbariaux, Bengio and David, "BinaryConnect: Training Deep Neural Networks with binary weights during
propagations", 2015 (arXiv:1511.00363), algorithm 1. A step of training is

    bc.binarization()            w_b = sign(w); the latent weights w are put by
    loss(bc(images)).backward()  forward and backward with w_b: the gradient is dC/dw_b
    bc.restore()                 w back in place, so that the gradient is applied to w (straight-through estimator)
    optimizer.step()
    bc.clip()                    w clipped to [-1, 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.resnet_s import weight_layers


def binary_sign(w: Tensor) -> Tensor:
    """The binary rule: +1 where w >= 0 (0 and -0.0 included), -1 where w < 0; same shape, dtype and device.

    A NaN stays NaN, never a silent -1, so that it shows in the loss. This is the one place where the sign is
    decided: training, scoring, the flip rate and the making of binary files all call it; packing and analysis
    take -1 and +1 as they find them.
    """
    signs = torch.copysign(w.new_ones(()), w + 0.0)  # -0.0 + 0.0 is 0.0; much faster than comparing
    return torch.where(w.isnan(), w, signs)


def stochastic_sign(w: Tensor) -> Tensor:
    """+1 with probability clip((w + 1) / 2, 0, 1), the "hard sigmoid", else -1 (the paper's equation 2).

    Draws from torch's global generator of w's device. A NaN stays NaN.
    """
    probability = ((w + 1) / 2).clamp(0, 1)
    # rand() lies in [0, 1): it is below 1 always and below 0 never.
    drawn = torch.where(torch.rand_like(w) < probability, 1.0, -1.0).to(w.dtype)
    return torch.where(w.isnan(), w, drawn)


def is_binary(w: Tensor) -> bool:
    """Whether every element of w is exactly -1 or +1."""
    return bool((w.abs() == 1).all())


class BC(nn.Module):
    """BinaryConnect around `model`: its Conv2d and Linear weights, all of them, are the binary ones.

    Biases and BatchNorm stay as they are. The model's own parameters hold the latent weights outside of
    `binarization()` ... `restore()`, so an optimizer made from `model.parameters()` works on them. The copies
    that hold the latent weights meanwhile are non-persistent buffers: they follow `.to()` and `.half()`, and
    never enter a state_dict, which is always of the weights that the model holds at the moment.

    stochastic: draw the signs with `stochastic_sign` instead of `binary_sign`.
    Raises ValueError for a model with no Conv2d or Linear.
    """

    def __init__(self, model: nn.Module, *, stochastic: bool = False) -> None:
        super().__init__()
        self.model = model
        self.stochastic = stochastic
        self.is_binarized = False
        named_layers = weight_layers(model)
        if not named_layers:
            raise ValueError("the model has no Conv2d or Linear whose weights could be binary")
        self.target_names = [f"{name}.weight" if name else "weight" for name, _ in named_layers]
        self._layers = [layer for _, layer in named_layers]  # a plain list: registers nothing a second time
        for i, layer in enumerate(self._layers):
            self.register_buffer(f"latent_{i}", layer.weight.detach().clone(), persistent=False)

    def targets(self) -> list[nn.Parameter]:
        """The weights that are binarized, in the order of `target_names`."""
        return [layer.weight for layer in self._layers]

    def latent_weights(self) -> list[Tensor]:
        """The latent weights, detached, also while the model holds the binary ones. Not copies: do not write."""
        if self.is_binarized:
            return self._shadows()
        return [weight.detach() for weight in self.targets()]

    def _shadows(self) -> list[Tensor]:
        return [self.get_buffer(f"latent_{i}") for i in range(len(self.target_names))]

    @torch.no_grad()
    def save_params(self) -> None:
        """Copy the latent weights aside. While the model holds binary weights this does nothing: the latent
        weights are aside already, and copying now would lose them."""
        if self.is_binarized:
            return
        for i, (shadow, weight) in enumerate(zip(self._shadows(), self.targets(), strict=True)):
            if (shadow.dtype, shadow.device) == (weight.dtype, weight.device):
                shadow.copy_(weight)
            else:  # the model inside was converted or moved by itself
                setattr(self, f"latent_{i}", weight.detach().clone())

    @torch.no_grad()
    def binarization(self, *, stochastic: bool | None = None) -> None:
        """Put the latent weights aside and -1 or +1 in their place. A second call changes nothing.

        stochastic: overrides the wrapper's own setting for this call.
        Raises ValueError, with the model untouched, where a latent weight is NaN and the weights are on the CPU.
        On an accelerator that question would stall the device at each step; there a NaN goes through to the loss.
        """
        if self.is_binarized:
            return
        targets = self.targets()
        for name, weight in zip(self.target_names, targets, strict=True):
            # The sum, NaN where a weight is, is quicker to take; infinite weights of both signs make it NaN as well.
            if weight.device.type == "cpu" and weight.sum().isnan() and weight.isnan().any():
                raise ValueError(f"{name}: a latent weight is NaN and has no sign")
        self.save_params()
        self.is_binarized = True
        sign = stochastic_sign if (self.stochastic if stochastic is None else stochastic) else binary_sign
        for weight in targets:
            weight.copy_(sign(weight))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the latent weights back, bit for bit. Without a `binarization()` before it, it changes nothing."""
        if not self.is_binarized:
            return
        for weight, shadow in zip(self.targets(), self._shadows(), strict=True):
            weight.copy_(shadow)
        self.is_binarized = False

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the latent weights to [-1, 1]: beyond, they would no longer change the sign or its gradient."""
        for weight in self._shadows() if self.is_binarized else self.targets():
            weight.clamp_(-1, 1)

    @contextmanager
    def binarized(self) -> Iterator[BC]:
        """`with bc.binarized():` binary weights (deterministic ones) inside, the latent ones back afterwards,
        also after an exception. Nested inside another binarization it leaves that one standing."""
        outermost = not self.is_binarized
        self.binarization(stochastic=False)
        try:
            yield self
        finally:
            if outermost:
                self.restore()

    def forward(self, x: Tensor) -> Tensor:
        """The model on x, with whichever weights it holds now."""
        return self.model(x)


@torch.no_grad()
def binarize_model(model: nn.Module) -> None:
    """Replace every Conv2d and Linear weight by its sign, for good.

    Raises ValueError naming the layer where a weight is NaN.
    """
    layers = weight_layers(model)
    for name, layer in layers:
        if layer.weight.isnan().any():
            raise ValueError(f"{name}.weight: a weight is NaN and has no sign")
    for _, layer in layers:
        layer.weight.copy_(binary_sign(layer.weight))
