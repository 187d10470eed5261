"""Quantizers: functions Tensor -> Tensor that turn latent weights into the weights of the forward pass.

`BC(model, quantizer=f)` takes any function f of this form:

    f(w) returns a new tensor of w's shape, dtype and device, and leaves w as it is.

w holds the latent weights of one layer. A quantizer is called without autograd: the gradient with respect to f(w) is
applied to w unchanged (the straight-through estimator). To add a quantizer, write a function here. It is recorded in
checkpoints under its `__name__`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]


def deterministic_sign(w: Tensor) -> Tensor:
    r"""The sign of w, the binary rule of this collection:

        q(w) = +1 if w >= 0 else -1

    - 0 and -0.0 give +1.
    - NaN stays NaN, never a silent -1, so that it shows in the loss.
    - Signs are unchanged: q(q(w)) = q(w).

    Courbariaux, Bengio and David, "BinaryConnect", 2015 (arXiv:1511.00363), equation 1.
    """
    return signs([w])[0]


def signs(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """`deterministic_sign` of each tensor. This is the one place where a sign is decided.

    Computed as 2 * floor(clip(w, -1, 0)) + 1, whose every step keeps NaN. On a GPU each line below is one kernel
    launch for all the tensors together.
    """
    found = torch._foreach_clamp_min(weights, -1.0)
    torch._foreach_clamp_max_(found, 0.0)
    torch._foreach_floor_(found)  # -1 where w < 0, else 0
    torch._foreach_mul_(found, 2.0)
    torch._foreach_add_(found, 1.0)
    return found


def stochastic_sign(w: Tensor) -> Tensor:
    r"""A random sign, more often +1 the larger w is:

        q(w) = +1 with probability p = clip((w + 1) / 2, 0, 1), the "hard sigmoid", else -1

    - Unbiased between -1 and +1: the mean of q(w) is w.
    - Certain from there on: +1 for w >= 1, -1 for w <= -1.
    - NaN stays NaN.
    - Draws from torch's global generator of w's device.

    Courbariaux, Bengio and David, "BinaryConnect", 2015 (arXiv:1511.00363), equations 2 and 3.
    """
    probability = ((w + 1) / 2).clamp(0, 1)
    # rand_like() lies in [0, 1): it is always below 1 and never below 0.
    drawn = torch.where(torch.rand_like(w) < probability, 1.0, -1.0).to(w.dtype)
    return torch.where(w.isnan(), w, drawn)


# The quantizers whose latent weights become a binary network by their signs, under the names in checkpoints.
SIGN_QUANTIZERS: dict[str, Quantizer] = {f.__name__: f for f in (deterministic_sign, stochastic_sign)}
