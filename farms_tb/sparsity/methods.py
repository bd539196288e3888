"""One matrix, one method: from a weight and what is known of its inputs to a mask and the entries that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farms_tb.printable import printable
from farms_tb.sparsity.masks import (
    magnitude_mask,
    mixed_counts,
    n_of_m_mask,
    pruned_count,
    wanda_mask,
    wanda_scores,
)
from farms_tb.sparsity.options import PRUNE_METHODS, PruneMethod
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.prunable import Layout, PrunableWeight, from_matrix, to_matrix
from farms_tb.sparsity.sparsegpt import DAMPING, block_counts, inverse_factor, sparsegpt
from farms_tb.sparsity.statistics import InputStatistics

Structure = Literal["unstructured", "2:4", "4:8", "mixed:8"]

_FIXED: Mapping[str, tuple[int, int]] = {"2:4": (2, 4), "4:8": (4, 8)}
_MIXED_GROUP = 8


@dataclass(frozen=True)
class PruneTarget:
    """How a matrix is to be pruned.

    Attributes:
        sparsity: share of its entries that becomes zero.
        structure: `(n, m)` where n of each m consecutive inputs become zero; None for any entries.
    """

    sparsity: float
    structure: tuple[int, int] | None = None


@dataclass(frozen=True)
class Pruned:
    """What a method chose for a weight.

    Attributes:
        mask: boolean, of the weight's shape, True where it becomes zero.
        corrected: the entries that stay, float32, of the weight's shape; None where they stay as they are.
        method: what was used: `"magnitude"` also where no input of the matrix was seen.
        damping: what SparseGPT added to the diagonal of the Hessian, as a share of its mean; None for the others.
    """

    mask: Tensor
    corrected: Tensor | None = None
    method: PruneMethod = "magnitude"
    damping: float | None = None


def prune_targets(plan: SparsityPlan, structure: Structure) -> dict[str, PruneTarget]:
    """Return how each matrix of a plan is pruned.

    Args:
        plan: the plan.
        structure: `"unstructured"`; `"2:4"` or `"4:8"`, which need a plan of 50 % everywhere; or `"mixed:8"`, N of
            each 8 with an N for each block (for each matrix where the plan's granularity is not `"block"`), chosen
            so that the total comes nearest to the plan's.

    Returns:
        By name of the layer.

    Raises:
        ValueError: a planned sparsity is above 1, or is not what a fixed structure gives.
    """
    for name, share in plan.sparsity.items():
        if share > 1:  # as plans made with `compat` may have
            raise ValueError(
                f"the plan says {share:.4g} for {name!r}: a sparsity is at most 1. Make the plan without compat, "
                "or with a smaller epsilon"
            )
    if structure == "unstructured":
        return {name: PruneTarget(share) for name, share in plan.sparsity.items()}
    if structure in _FIXED:
        n, m = _FIXED[structure]
        uneven = [name for name, share in plan.sparsity.items() if abs(share - n / m) > 1e-9]
        if uneven:
            raise ValueError(
                f"structure={structure!r} makes {n / m:.0%} of every matrix zero, and the plan says "
                f"{plan.sparsity[uneven[0]]:.4g} for {uneven[0]!r}: use structure='mixed:8', which follows the "
                f"plan, or a plan with method='uniform' and target={n / m}"
            )
        return {name: PruneTarget(n / m, (n, m)) for name in plan.layers}
    return _mixed(plan)


def _mixed(plan: SparsityPlan) -> dict[str, PruneTarget]:
    """Return N of each 8 for every matrix, the same for all matrices that share their sparsity."""
    groups: dict[str, list[str]] = {}
    for name in plan.layers:
        groups.setdefault(plan.unit_of(name), []).append(name)
    sizes, shares = {}, {}
    for group, names in groups.items():
        layers = [plan.layers[name] for name in names]
        sizes[group] = sum(layer.size for layer in layers)
        shares[group] = sum(layer.size * layer.sparsity for layer in layers) / sizes[group]
    counts = mixed_counts(shares, sizes, _MIXED_GROUP)
    targets = {group: PruneTarget(n / _MIXED_GROUP, (n, _MIXED_GROUP)) for group, n in counts.items()}
    return {name: targets[plan.unit_of(name)] for name in plan.layers}


def check_groups(name: str, shape: tuple[int, ...], layout: Layout, target: PruneTarget) -> None:
    """Check that a weight can have a structure, by its shape.

    Args:
        name: of the layer, for the message.
        shape: of the weight as it is stored.
        layout: how it becomes a matrix.
        target: how it is to be pruned.

    Raises:
        ValueError: its inputs cannot be grouped.
    """
    if target.structure is None:
        return
    m = target.structure[1]
    no_groups = f"{name} cannot be pruned in groups of {m}"
    way_out = "Leave it out of the plan, or use structure='unstructured'"
    if layout == "rows":
        unknown = "it is a part of a larger parameter, or which of its entries share an output is not known"
        raise ValueError(f"{no_groups}: {unknown}. {way_out}")
    # Next to each other in a convolution's matrix are the input channels of one kernel position.
    inputs = shape[0 if layout == "transposed" else 1]
    if inputs % m:
        raise ValueError(f"{no_groups}: it has {inputs} inputs, which {m} does not divide. {way_out}")


def prune_weight(
    weight: PrunableWeight, target: PruneTarget, method: PruneMethod, statistics: InputStatistics | None
) -> Pruned:
    """Choose the entries of a weight that become zero; the weight is not changed.

    Args:
        weight: the weight.
        target: how many entries, and in which structure.
        method: how they are chosen. Where no input was seen, or all are zero, by magnitude.
        statistics: of its inputs; for SparseGPT with a Hessian. None for magnitude.

    Returns:
        The mask, and for SparseGPT the corrected weight.

    Raises:
        ValueError: the inputs hold NaN or inf.
    """
    norms = None if statistics is None else statistics.squared_norms
    # All norms are zero, and so all scores, of an expert that no token was sent to, and behind a dead ReLU.
    if not PRUNE_METHODS[method].needs_inputs or statistics is None or norms is None or not norms.any():
        return Pruned(smallest_entries(weight.tensor, weight.layout, target))
    if not norms.isfinite().all():
        raise ValueError(
            f"the inputs of {printable(weight.name)} hold NaN or inf: check the calibration data and the dtype"
        )
    return _WITH_INPUTS[method](weight, target, statistics)


def smallest_entries(weight: Tensor, layout: Layout, target: PruneTarget) -> Tensor:
    """Mark the entries of smallest absolute value, ties in the order in which the weight is stored.

    Args:
        weight: as it is stored.
        layout: how it becomes a matrix; it matters for a structure alone.
        target: how many entries, and in which structure.

    Returns:
        A boolean mask of the weight's shape, True where an entry becomes zero.
    """
    if target.structure is None:
        return magnitude_mask(weight, pruned_count(weight.numel(), target.sparsity))
    mask = n_of_m_mask(to_matrix(weight, layout).abs(), *target.structure)
    return from_matrix(mask, weight.shape, layout)


def _wanda(weight: PrunableWeight, target: PruneTarget, statistics: InputStatistics) -> Pruned:
    """Prune by the magnitude of an entry times the norm of its input."""
    matrix = to_matrix(weight.tensor, weight.layout)
    assert statistics.squared_norms is not None
    scores = wanda_scores(matrix, statistics.squared_norms)
    if target.structure is None:
        mask = wanda_mask(scores, pruned_count(matrix.numel(), target.sparsity))
    else:
        mask = n_of_m_mask(scores, *target.structure)
    return Pruned(from_matrix(mask, weight.tensor.shape, weight.layout), method="wanda")


def _sparsegpt(weight: PrunableWeight, target: PruneTarget, statistics: InputStatistics) -> Pruned:
    """Prune group by group of a convolution, of which a linear layer has one, and correct what stays."""
    matrix = to_matrix(weight.tensor, weight.layout)
    assert statistics.hessian is not None
    masks, corrected, damping = [], [], DAMPING
    done = 0
    for rows, hessian in zip(matrix.chunk(weight.groups), statistics.hessian, strict=True):
        inverse = inverse_factor(hessian)
        height, width = rows.shape
        counts = block_counts(height, width, target.sparsity, before=done)
        values, mask = sparsegpt(rows, inverse, counts, target.structure)
        masks.append(mask)
        corrected.append(values)
        damping = max(damping, inverse.damping)
        done += rows.numel()
    whole_mask = from_matrix(torch.cat(masks), weight.tensor.shape, weight.layout)
    whole = from_matrix(torch.cat(corrected), weight.tensor.shape, weight.layout)
    return Pruned(whole_mask, whole, "sparsegpt", damping)


_WITH_INPUTS: dict[str, Callable[[PrunableWeight, PruneTarget, InputStatistics], Pruned]] = {
    "wanda": _wanda,
    "sparsegpt": _sparsegpt,
}
