"""What a user should know of a plan before anything is pruned by it.

An allocation by alpha is worth its name only where it does better than a straight line in depth, which needs no
alpha: alphas of language models mostly rise with depth. So every plan is compared with that line, and with the
uniform allocation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from farms_tb.sparsity.filling import Filling, Floats
from farms_tb.sparsity.layers import depths
from farms_tb.sparsity.options import ALPHA_METHODS
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.ratios import line
from farms_tb.weights.names import first_few

LINEAR = 0.8
"""Correlation of sparsity and depth from which on a plan counts as close to a straight line.

The block means of alpha that the papers' repositories ship for LLaMA correlate with depth by 0.65 to 0.88.
"""
_EVEN = 0.005
"""Mean distance from the uniform allocation below which the shape of a plan does not matter."""
_FEW_BLOCKS = 4
"""Below so many blocks, a correlation with depth means nothing."""


@dataclass(frozen=True)
class DepthComparison:
    """How a plan compares with the allocations that need no alpha.

    Attributes:
        correlation: Pearson correlation of sparsity and depth over blocks (over layers, where there are none);
            None where all are equal.
        from_uniform: mean absolute difference of the sparsities from the uniform ones, weighted by size.
        from_line: the same from the straight line in depth with the target, epsilon and bounds of the plan; from
            the falling line where that is nearer.
    """

    correlation: float | None
    from_uniform: float
    from_line: float


def compare_with_depth(plan: SparsityPlan) -> DepthComparison:
    """Compare a plan with the uniform allocation and with straight lines in depth.

    Args:
        plan: any plan; its layers in order of depth.

    Returns:
        The correlation with depth and the two distances, in shares of entries: 0.05 means that on average a
        layer's sparsity differs by 5 percentage points.
    """
    positions = _depths(plan)
    sizes = np.array([layer.size for layer in plan.layers.values()], dtype=np.float64)
    low, high = plan.bounds
    if not low <= plan.total <= high:  # as in plans made with `compat`, which have no bounds
        low, high = 0.0, 1.0
    filling = Filling(sizes, plan.total, low, high)
    lines = [filling.proportional(line(order, plan.epsilon)) for order in (positions, -positions)]
    found = np.array(list(plan.sparsity.values()))
    means = np.bincount(positions, weights=found) / np.bincount(positions)
    return DepthComparison(
        correlation=_correlation(means),
        from_uniform=_distance(found, np.full(len(found), plan.total), sizes),
        from_line=min(_distance(found, other, sizes) for other in lines),
    )


def _depths(plan: SparsityPlan) -> np.ndarray:
    """Return the depth of each layer of a plan, `(n,)` integers."""
    return depths(list(plan.layers), [layer.block for layer in plan.layers.values()])


def _distance(first: Floats, second: Floats, sizes: Floats) -> float:
    """Return the mean absolute difference, weighted by size."""
    return float(np.dot(sizes / sizes.sum(), np.abs(first - second)))


def _correlation(values: Floats) -> float | None:
    """Return the correlation of values with their position; None where all are equal."""
    if len(values) < 2 or np.ptp(values) < 1e-12:
        return None
    return float(np.corrcoef(np.arange(len(values)), values)[0, 1])


def largest_sensible_epsilon(target: float) -> float:
    """Return the half-width beyond which uneven allocations are a risk: 0.1 at a target of 0.5, 0.3 at 0.7.

    Below 0.7 the bound is a straight line. It follows the published settings for LLaMA, 0.2 to 0.6 at 0.7 and 0.1
    to 0.4 above. Small models may bear less: of SmolLM2-135M, pruned by Wanda to 0.7, allocations by alpha were
    best at 0.1, and much worse at 0.2 and 0.3, see docs/results/sparsity.
    """
    return min(max(target - 0.4, 0.0), 0.3)


def notes_of(plan: SparsityPlan, left_out: Collection[str]) -> tuple[str, ...]:
    """Return what a user should know of an allocation, a sentence each.

    Args:
        plan: what was allocated.
        left_out: names of the layers whose alphas took no part.
    """
    notes = list(_on_total(plan))
    if plan.method in ALPHA_METHODS:
        notes += _on_alphas(plan, left_out)
    found = list(plan.sparsity.values())
    is_uniform = max(found) - min(found) < 1e-12
    if is_uniform:
        return tuple(notes)
    notes += _on_bounds(plan)
    notes += _on_epsilon(plan)
    if plan.method in ("alpha", "shrinkage", "owl", "search"):
        notes += _on_depth(plan)
    return tuple(notes)


def _on_total(plan: SparsityPlan) -> Iterator[str]:
    """Yield what is to be said where research code is reproduced that misses the target or cannot be pruned."""
    if abs(plan.total - plan.target) > 1e-9:
        yield (
            f"compat={plan.options['compat']!r} cuts sparsities above 1: the total is {plan.total:.4f}, not "
            f"{plan.target:g}"
        )
    beyond = [name for name, layer in plan.layers.items() if layer.sparsity > 1]
    if beyond:
        yield f"sparsities above 1 cannot be pruned, leave out compat: {first_few(beyond)}"


def _on_alphas(plan: SparsityPlan, left_out: Collection[str]) -> Iterator[str]:
    """Yield what is to be said of outliers and of missing alphas."""
    if left_out:
        outliers = [f"{name} ({plan.layers[name].alpha:.3g})" for name in left_out]
        yield f"alphas far from all others took no part: {first_few(outliers)}"
    known = [name for name, layer in plan.layers.items() if layer.alpha is not None and name not in left_out]
    if not known:
        left = "the search has the line alone" if plan.method == "search" else "the allocation is uniform"
        yield f"no layer has an alpha: {left}"
        return
    without = sorted(set(map(plan.unit_of, plan.layers)) - set(map(plan.unit_of, known)))
    if without:
        yield f"without an alpha, these count as the mean of the others: {first_few(without)}"


def _on_bounds(plan: SparsityPlan) -> Iterator[str]:
    """Yield what is to be said of units that bounds keep from a larger or a smaller sparsity."""
    if plan.options["compat"] is not None:
        return
    low, high = plan.bounds
    at_high = {plan.unit_of(name): None for name, share in plan.sparsity.items() if share >= high}
    if at_high:
        yield f"held at max_sparsity={high:g}, the others are pruned more instead: {first_few(list(at_high))}"
    at_low = {plan.unit_of(name): None for name, share in plan.sparsity.items() if 0 < share <= low}
    if at_low:
        yield f"held at min_sparsity={low:g}, the others are pruned less instead: {first_few(list(at_low))}"


def _on_epsilon(plan: SparsityPlan) -> Iterator[str]:
    """Yield a sentence on an epsilon that is large for the target."""
    sensible = largest_sensible_epsilon(plan.target)
    if plan.method not in ("owl", "search") and plan.epsilon > sensible + 1e-12:
        yield (
            f"epsilon={plan.epsilon:g} is large for a target of {plan.target:g}: allocations more uneven than "
            f"{sensible:.2g} may do harm there; compare the result with method='uniform'"
        )


def _on_depth(plan: SparsityPlan) -> Iterator[str]:
    """Yield a sentence on a plan that is close to a straight line in depth."""
    if max(_depths(plan)) + 1 < _FEW_BLOCKS:
        return
    found = compare_with_depth(plan)
    is_uneven = found.from_uniform > _EVEN
    if is_uneven and found.correlation is not None and abs(found.correlation) >= LINEAR:
        yield (
            f"the plan is close to a straight line in depth (correlation {found.correlation:.2f}): compare it "
            "with method='depth', which needs no alphas"
        )
