"""Muon against a float64 singular-value decomposition and against its formula, written out once more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.training.muon import COEFFICIENTS, Muon, orthogonalize

SHAPES = [(16, 144), (64, 10), (32, 32), (10, 64), (64, 576)]


def matrix(rows: int, columns: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X, U, V in float64: X = U diag(s) V^T, the logs of its singular values spread evenly, from 1 to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, size, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, size, dtype=torch.float64, generator=generator))
    s = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return u * s @ v.mT, u, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(
    shape: tuple[int, int], condition: float, dtype: torch.dtype
) -> None:
    x, u, v = matrix(*shape, condition)
    update = orthogonalize(7.5 * x.to(dtype))  # whatever the size of the gradient
    assert update.dtype == dtype
    values = torch.linalg.svdvals(update.double())
    assert values.min() >= 0.6
    assert values.max() <= 1.3
    among_directions = u.mT @ update.double() @ v
    assert (among_directions - among_directions.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_deficient_and_zero_gradients_stay_finite(shape: tuple[int, int]) -> None:
    """As the classifier's, whose rows sum to zero."""
    x, _, _ = matrix(*shape, 10)
    centered = orthogonalize((x - x.mean(0)).float())
    first_only = orthogonalize((x[:, :1] @ x[:1]).float())
    assert centered.isfinite().all()
    assert first_only.isfinite().all()
    assert torch.linalg.matrix_rank(first_only, rtol=1e-3) == 1
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))

    weight = torch.nn.Parameter(torch.ones(shape))
    weight.grad = torch.zeros(shape)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(shape))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_root_mean_square_of_an_update_is_the_rate(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 32, 3, 3))
    weight.grad = scale * torch.randn(weight.shape)
    Muon([weight], lr=0.02).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)


def written_out(start: Tensor, gradients: list[Tensor], lr: float, momentum: float, steps: int) -> Tensor:
    """The weight after some steps, in float64, the quintic taken of each singular value by itself."""
    weight, average = start.double().flatten(1), torch.zeros_like(start).double().flatten(1)
    for gradient in (g.double().flatten(1) for g in gradients):
        average = momentum * average + (1 - momentum) * gradient
        u, s, v = torch.linalg.svd(momentum * average + (1 - momentum) * gradient, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(steps):
            s = sum(c * s**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
        update = u * s @ v
        weight = weight - lr * update / update.square().mean().sqrt()
    return weight.reshape(start.shape)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("momentum", "steps", "dtype", "tolerance"),
    [
        (0.95, 5, torch.float64, 1e-10),
        (0.95, 5, torch.float32, 1e-4),
        (0.5, 3, torch.float64, 1e-10),
    ],
)
def test_the_formula_over_some_steps(
    momentum: float, steps: int, dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format
) -> None:
    """Two weights of one shape, which are taken together, and one of another; each its own momentum."""
    torch.manual_seed(1)
    starts = [torch.randn(shape, dtype=dtype) for shape in ((8, 4, 3, 3), (8, 4, 3, 3), (10, 8, 1, 1))]
    gradients = [[torch.randn_like(start) for _ in range(4)] for start in starts]
    weights = [torch.nn.Parameter(start.clone().to(memory_format=memory_format)) for start in starts]
    optimizer = Muon(weights, lr=0.1, momentum=momentum, steps=steps)
    for number in range(4):
        for weight, own in zip(weights, gradients, strict=True):
            weight.grad = own[number].to(memory_format=memory_format)
        optimizer.step()
    for weight, start, own in zip(weights, starts, gradients, strict=True):
        expected = written_out(start, own, 0.1, momentum, steps)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=tolerance)
        assert weight.is_contiguous(memory_format=memory_format)


def test_what_has_no_gradient_or_no_matrix() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moving.grad = torch.eye(4)
    Muon([still, moving]).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))
    with pytest.raises(ValueError):
        Muon([torch.nn.Parameter(torch.ones(4))])
