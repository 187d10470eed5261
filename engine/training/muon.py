"""Muon: momentum, then the update of each weight matrix orthogonalized.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/). For the gradient G of a weight, with momentum b and learning rate lr:

    M <- b M + (1 - b) G            momentum, as an average
    N  = b M + (1 - b) G            Nesterov
    O  = orthogonalize(N)           about U V^T of the decomposition N = U S V^T: every direction moves alike
    W <- W - lr * O / rms(O)        the root mean square of an update is lr, whatever the shape

A gradient that is large in a few directions moves latent weights in those only; orthogonalized, the rare directions
move as well, and their signs flip too.

torch.optim.Muon (since torch 2.9) takes two-dimensional parameters only. Ours takes convolutions, runs on
the oldest torch that is supported, and orthogonalizes all weights of one shape in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic a x + b x^3 + c x^5 that moves singular values towards 1; steep at zero, from the article above.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-12  # a zero gradient stays zero


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The Newton-Schulz iteration: U S V^T -> about U V^T for each matrix (..., rows, columns).

    It runs in the dtype of `matrices` (float32 in training). Singular values spread evenly between 1 and 1/100 come
    to lie in [0.6, 1.3]; smaller ones, as those of a rank-deficient matrix, stay smaller, and zero stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products below are then of the smaller side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, (out, in, ...), taken as matrices (out, in * ...).

    lr: root mean square of an update. momentum: of the averaged gradient. steps: Newton-Schulz iterations.
    Raises ValueError for a parameter of fewer than two dimensions.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, *, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes weights of two and more dimensions; give the others another optimizer")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p, update in zip(weights, self._nesterov(weights, group["momentum"]), strict=True):
                by_shape[p.shape].append((p, update))
            for alike in by_shape.values():
                updates = torch.stack([update for _, update in alike]).flatten(2)
                updates = orthogonalize(updates, group["steps"])  # (weights of this shape, out, in * ...)
                updates = updates / updates.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=TINY)
                for (p, _), update in zip(alike, updates, strict=True):
                    p.add_(update.view(p.shape), alpha=-group["lr"])

    def _nesterov(self, weights: list[nn.Parameter], momentum: float) -> Sequence[Tensor]:
        """The averages moved on by the gradients; returns U of each weight."""
        if not weights:
            return []
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages, gradients = [self.state[p]["momentum_buffer"] for p in weights], [p.grad for p in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)  # on a GPU one kernel launch for all, here and below
        return torch._foreach_lerp(gradients, averages, momentum)
