"""The learning rate: linear warm-up, then cosine annealing to zero, step by step.

Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without restarts.
For another schedule change `make_scheduler`: any torch scheduler, or a chain of them, whose `step()` needs no
argument, is resumed.
"""

from __future__ import annotations

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def warmup_steps(epochs: int, warmup_epochs: float, steps_per_epoch: int) -> int:
    """Steps of warm-up: those of `warmup_epochs`, or a fifth of the run where they would be half of it or more."""
    if warmup_epochs == 0 or epochs > 2 * warmup_epochs:
        return round(warmup_epochs * steps_per_epoch)
    return epochs * steps_per_epoch // 5


def make_scheduler(optimizer: Optimizer, total: int, warmup: int) -> LRScheduler:
    """Linear warm-up, then a cosine to zero. Call `.step()` once after each optimizer step.

    The factor on each group's rate is (t + 1) / (warmup + 1) for step t < warmup, then (1 + cos(pi s)) / 2, where s
    runs from 0 to 1 over the total - warmup steps after it.
    """
    cosine = CosineAnnealingLR(optimizer, T_max=total - warmup)
    if warmup == 0:
        return cosine
    # In older versions of torch SequentialLR calls step() in a way that step() itself warns of.
    warnings.filterwarnings("ignore", r"The epoch parameter in `scheduler\.step\(\)`", UserWarning)
    linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])


def repeat_steps(schedulers: list[LRScheduler], steps: int) -> None:
    """Bring fresh schedules to where they are after `steps` steps, without the steps of their optimizers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that moves before its optimizer
        for scheduler in schedulers:
            for _ in range(steps):
                scheduler.step()
