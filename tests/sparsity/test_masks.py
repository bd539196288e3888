"""Masks: exact counts whatever ties there are; and SparseGPT, where inputs are few or always zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farms_tb.sparsity.masks import magnitude_mask, mixed_counts, n_of_m_mask, pruned_count, row_counts, wanda_mask
from farms_tb.sparsity.sparsegpt import inverse_factor, sparsegpt


def test_a_hessian_that_is_nearly_singular_is_damped_more() -> None:
    inputs = torch.randn(3, 40)
    inputs[:, 7] = 0
    found = inverse_factor(inputs.T @ inputs)
    assert found.factor.isfinite().all()
    assert found.dead.nonzero().flatten().tolist() == [7]
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_damping_is_a_share_of_live_inputs_at_any_scale(scale: float) -> None:
    """Some inputs of an MLP are always zero; they neither make the damping larger nor smaller."""
    torch.manual_seed(0)
    inputs = scale * torch.randn(400, 24).double()
    inputs[:, ::3] = 0
    hessian = inputs.T @ inputs
    found = inverse_factor(hessian)
    live = hessian[~found.dead][:, ~found.dead]
    factor = found.factor[~found.dead][:, ~found.dead].double()
    damped = live / live.diagonal().mean() + 0.01 * torch.eye(len(live))
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(len(live)).double(), rtol=0, atol=1e-4)
    assert found.damping == 0.01


def test_without_any_live_input_nothing_is_corrected() -> None:
    weight = torch.randn(3, 8)
    corrected, mask = sparsegpt(weight, inverse_factor(torch.zeros(8, 8)), [12])
    torch.testing.assert_close(corrected, weight.masked_fill(mask, 0))


sparsities = st.floats(0, 1, allow_nan=False)


@settings(deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 30), share=sparsities, seed=st.integers(0, 99))
def test_counts_are_exact_with_ties(rows: int, columns: int, share: float, seed: int) -> None:
    """Weights of few values, as those of 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (rows, columns), generator=generator).float()
    count = pruned_count(scores.numel(), share)
    for mask in (magnitude_mask(scores, count), wanda_mask(scores.abs(), count)):
        assert int(mask.sum()) == count
    by_row = wanda_mask(scores.abs(), count)
    assert by_row.sum(1).tolist() == row_counts(rows, count).tolist()
    for kept, pruned in zip(scores.abs(), by_row, strict=True):
        if pruned.any() and not pruned.all():
            assert kept[pruned].max() <= kept[~pruned].min()


def test_ties_go_by_index() -> None:
    assert magnitude_mask(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (0, 8), (8, 8)])
def test_n_of_m(n: int, m: int) -> None:
    mask = n_of_m_mask(torch.randn(5, 32), n, m)
    assert (mask.view(5, -1, m).sum(-1) == n).all()


@given(shares=st.lists(sparsities, min_size=1, max_size=8), data=st.data())
def test_mixed_counts_come_near_the_target(shares: list[float], data: Any) -> None:
    names = [str(place) for place in range(len(shares))]
    sizes = {name: data.draw(st.integers(1, 50)) for name in names}
    planned = dict(zip(names, shares, strict=True))
    found = mixed_counts(planned, sizes)
    assert all(0 <= count <= 8 for count in found.values())
    difference = sum(sizes[name] * (found[name] / 8 - planned[name]) for name in names)
    assert abs(difference) <= max(sizes.values()) / 8 * 0.5 + 1e-6 * sum(sizes.values())
