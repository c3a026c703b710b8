"""Norms of gradients: right to rounding, however many values a tensor has."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.zero.gradient_norms import squared_norms, total_norm


def gradient_of(rows: int, columns: int) -> torch.Tensor:
    """Like that of an embedding: few rows are large, and the many others are small."""
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 1e-4
    gradient[: rows // 100] *= 100
    return gradient


@pytest.mark.parametrize("columns", [64, 63, 1])
def test_a_large_tensor_on_a_cpu_loses_nothing(columns: int) -> None:
    large, small = gradient_of(2_000_000 // columns, columns), torch.tensor([3.0, 4.0])
    expected = large.double().square().sum().item()
    assert squared_norms([large, small.bfloat16()]).tolist() == [pytest.approx(expected, rel=1e-6), 25]
    assert total_norm([large, small]).item() == pytest.approx(math.sqrt(expected + 25), rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    assert not torch.isfinite(total_norm([torch.ones(5000), torch.tensor([1.0, value])]))


def test_of_nothing_it_is_zero() -> None:
    assert total_norm([]).item() == 0 and total_norm([torch.zeros(0, 4)]).item() == 0
