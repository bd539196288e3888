"""Norms of tensors so large that a plain sum of squares in single precision loses digits."""

from __future__ import annotations

import pytest
import torch

from farms_tb.sparsity.statistics import InputStatistics, relative_output_error
from farms_tb.weights.low_rank import LowRankUpdate, change_of_merged, merged
from farms_tb.weights.norms import frobenius_norm

SIZE = 4096


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def double_norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def update(magnitude: torch.Tensor | None = None) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(shape, generator=generator) for shape in ((SIZE, 2), (2, SIZE)))
    return LowRankUpdate(left, right, 0.5, magnitude)


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 64, 64), (SIZE * SIZE // 8, 8), (8, SIZE * SIZE // 8)])
def test_norm(weight: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert float(frobenius_norm(weight.view(shape))) == pytest.approx(double_norm(weight), rel=5e-5)


def test_norm_of_odd_tensors() -> None:
    assert float(frobenius_norm(torch.tensor([[3 + 4j], [12j]]))) == 13
    assert float(frobenius_norm(torch.ones(3, 0))) == 0
    assert frobenius_norm(torch.ones(2, 2, dtype=torch.complex128)).dtype == torch.float64


def test_change_by_an_adapter(weight: torch.Tensor) -> None:
    changed, change = merged(weight, [update()])
    expected = double_norm(changed.double() - weight.double()) / double_norm(weight)
    assert float(change) == pytest.approx(expected, rel=1e-5)
    after = change_of_merged(changed, [update()])
    assert after is not None
    assert float(after) == pytest.approx(expected, rel=1e-5)


def test_change_by_dora(weight: torch.Tensor) -> None:
    # In one output alone the norm is another one, so that errors of the two norms do not cancel out.
    magnitude = torch.linalg.vector_norm(merged(weight, [update()])[0], dim=1)
    magnitude[0] *= 100
    changed, change = merged(weight, [update(magnitude)])
    expected = double_norm(changed.double() - weight.double()) / double_norm(weight)
    assert float(change) == pytest.approx(expected, rel=1e-5)


def test_output_error() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, dense = torch.randn(1, 512, 16, generator=generator), torch.randn(2**15, 16, generator=generator)
    pruned = dense.clone()
    pruned[-1] = 0
    before, after = (inputs[0].double() @ matrix.double().T for matrix in (dense, pruned))
    found = relative_output_error(dense, pruned, InputStatistics(samples=[inputs]))
    assert found == pytest.approx(double_norm(before - after) / double_norm(before), rel=1e-5)
