"""From alphas to the sparsity of each layer.

`allocate` checks what it is given, asks one method for the ratio of each block or matrix, and scales the ratios to
the target. Everything is NumPy in float64: the same input gives the same plan on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from farms_tb.keywords import takes_options
from farms_tb.options import check_number
from farms_tb.sparsity.filling import Filling, Floats
from farms_tb.sparsity.layers import Layers, Sizes, checked_layers
from farms_tb.sparsity.options import SparsityKeywords, SparsityOptions
from farms_tb.sparsity.plan import PlannedLayer, SparsityPlan
from farms_tb.weights.blocks import BlockRule

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(SparsityOptions)
def allocate(
    alphas: Mapping[str, float | None],
    sizes: Sizes,
    target: float,
    *,
    blocks: Mapping[str, str] | BlockRule | None = None,
    errors: Mapping[str, float | None] | None = None,
    outliers: Mapping[str, float] | None = None,
    **options: Unpack[SparsityKeywords],
) -> SparsityPlan:
    """Allocate a model's sparsity to its layers.

    Args:
        alphas: alpha of each layer by name.
        sizes: entries of each layer, or its shape.
        target: the sparsity over all entries.
        blocks: the block of each layer.
        errors: standard errors of the alphas.
        outliers: with `method="owl"`, the share of outliers of each block.

    Returns:
        The plan.
    """
    chosen = SparsityOptions(**options)
    check_number("target", target, at_least=0, at_most=1)
    layers = checked_layers(alphas, sizes, blocks, errors, chosen.granularity)
    filling = Filling(layers.sizes, target, chosen.min_sparsity, chosen.max_sparsity)
    sparsities = filling.proportional(np.ones(len(layers.names)))
    return _plan(layers, sparsities, target, chosen)


def _plan(layers: Layers, sparsities: Floats, target: float, options: SparsityOptions) -> SparsityPlan:
    planned = {}
    for index, name in enumerate(layers.names):
        planned[name] = PlannedLayer(
            size=int(layers.sizes[index]),
            sparsity=float(sparsities[index]),
            block=layers.blocks[index],
            alpha=_or_none(layers.alphas[index]),
            alpha_error=_or_none(layers.errors[index]),
            shape=layers.shapes[index],
        )
    return SparsityPlan(
        layers=planned,
        target=target,
        method=options.method,
        epsilon=options.epsilon,
        granularity=options.granularity,
        bounds=(options.min_sparsity, options.max_sparsity),
        seed=options.seed,
    )


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
