"""From alphas to the sparsity of each layer.

`allocate` checks what it is given, asks one method for the ratio of each block or matrix, scales the ratios to the
target, and says what a user should know of the result. Everything but `method="search"`, which runs the model, is
NumPy in float64.

Sources: AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912), FARMS (Hu et al., ICML 2025, arXiv 2506.06280),
OWL (Yin et al., arXiv 2310.05175).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from farms_tb.keywords import takes_options
from farms_tb.options import check_number, plain_value
from farms_tb.sparsity import ratios
from farms_tb.sparsity.advice import notes_of
from farms_tb.sparsity.calibration import Batch
from farms_tb.sparsity.filling import Filling, Floats
from farms_tb.sparsity.layers import Layers, Sizes, checked_layers, numbers
from farms_tb.sparsity.options import ALPHA_METHODS, SparsityKeywords, SparsityOptions
from farms_tb.sparsity.plan import PlannedLayer, SparsityPlan
from farms_tb.sparsity.search import searched
from farms_tb.sparsity.shrinkage import by_shrinkage
from farms_tb.warnings import warn_once
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
    model: nn.Module | None = None,
    calibration: Iterable[Batch] | None = None,
    **options: Unpack[SparsityKeywords],
) -> SparsityPlan:
    """Allocate the sparsity of a model to its layers.

    With a_b the mean alpha of block b, n_i the entries of layer i and S the target, the method `"alpha"` gives
    each layer of block b the sparsity p_b = c r_b, where

        r_b = (1 - epsilon) + 2 epsilon (a_b - min a) / (max a - min a),    c such that sum n_i p_i = S sum n_i.

    The sum is met to rounding, also where bounds bind: layers at a bound stay there, and the others are scaled
    further. Layers that are in no block (an embedding, a head) are left out of the plan and stay dense; where no
    blocks are found, `granularity="matrix"` plans every layer.

    A layer without an alpha counts as its block, and a block without one as the mean of the others. An alpha more
    than 8 robust standard deviations from the median of all tells of a failed fit: it counts as missing, with a
    warning. All alphas missing or equal, or a single block: uniform.

    Args:
        alphas: alpha of each layer by name, `analyze(model).alphas`; None or NaN where a layer has none. Layers
            that `sizes` lacks are ignored.
        sizes: number of entries of each layer by name, or its shape, which `SparsityPlan.check_fits` compares with
            that of the model to prune. Without numbers in the names, the order is that of depth.
        target: the sparsity over all entries of the planned layers, 0 to 1.
        blocks: name of the block of each layer, None for a layer that stays dense; or what tells it, patterns such
            as `["encoder.layers.*"]` or a function of the layer's name; None to find blocks by the names, see
            `farms_tb.weights.blocks.blocks_of`.
        errors: standard errors of the alphas, for `method="shrinkage"`: a record's `alpha_error`.
        outliers: with `method="owl"`, the share of outliers of each block (of each layer, with
            `granularity="matrix"`) on calibration data, in any unit: `farms_tb.sparsity.outlier_shares`.
        model: with `method="search"`, the model that the alphas are of. For a batch it returns a loss, as models
            of transformers do where there are `labels`, or logits for the next token of each of its `input_ids`.
            Its weights are put back afterwards.
        calibration: with `method="search"`, at least twelve batches, each a dict of keyword arguments for the
            model: half of them prune, a quarter chooses, a quarter confirms that the winner beats uniform.

    Returns:
        The plan: `plan.sparsity` by layer, `plan.total`, `plan.save("plan.json")`.

    Raises:
        ValueError: the target is out of reach of the bounds, no blocks are found, a size is not positive, an alpha
            infinite, an option out of range, or `outliers`, `model` or `calibration` is missing.
        TypeError: an option is unknown or has the wrong type.

    Example:
        >>> alphas = {"layers.0.up": 2.0, "layers.0.down": 3.0, "layers.1.up": 3.0, "layers.1.down": 4.0}
        >>> plan = allocate(alphas, dict.fromkeys(alphas, 1000), target=0.7, epsilon=0.2)
        >>> {name: round(share, 4) for name, share in plan.sparsity.items()}
        {'layers.0.up': 0.56, 'layers.0.down': 0.56, 'layers.1.up': 0.84, 'layers.1.down': 0.84}
    """
    chosen, target = SparsityOptions(**options), plain_value(target)
    check_target(target, chosen)
    layers = checked_layers(alphas, sizes, blocks, errors, chosen.granularity)
    scaled = _scaled(layers)
    left_out = _left_out(scaled, chosen)
    usable = replace(scaled, alphas=np.where(left_out, np.nan, scaled.alphas))
    filling = Filling(layers.sizes, target, chosen.min_sparsity, chosen.max_sparsity)
    make_plan = partial(_plan, layers, target, chosen)
    if chosen.method == "search":
        plan = searched(usable, filling, chosen, make_plan, model, calibration)
    else:
        plan = make_plan(_sparsities(usable, filling, chosen, outliers))
    notes = notes_of(plan, [name for name, out in zip(layers.names, left_out, strict=True) if out])
    for note in notes:
        warn_once(note, chosen)
    return replace(plan, notes=(*plan.notes, *notes))


def check_target(target: float, options: SparsityOptions) -> None:
    """Refuse a target that no sparsities within the bounds have as their mean.

    Args:
        target: the sparsity over all layers.
        options: with the bounds.

    Raises:
        TypeError: it is no number.
        ValueError: it is no share, or out of reach.
    """
    check_number("target", target, at_least=0, at_most=1)
    low, high = options.min_sparsity, options.max_sparsity
    if options.compat is None and not low <= target <= high:
        raise ValueError(
            f"target={target!r} is out of reach: with min_sparsity={low!r} and max_sparsity={high!r} the total "
            f"can be {low!r} to {high!r}; change the target or the bounds"
        )


def _scaled(layers: Layers) -> Layers:
    """Return layers whose largest alpha or error is 1, so that no square overflows; all maps are relative."""
    largest = max(np.nanmax(np.abs(values), initial=0.0) for values in (layers.alphas, layers.errors))
    if largest == 0:
        return layers
    return replace(layers, alphas=layers.alphas / largest, errors=layers.errors / largest)


def _left_out(layers: Layers, options: SparsityOptions) -> np.ndarray:
    """Return the alphas that take no part: of outliers, where the method maps alphas."""
    if options.method not in ALPHA_METHODS or options.compat is not None:
        return np.zeros(len(layers.names), dtype=bool)
    return ratios.wild(layers.alphas)


def _sparsities(
    layers: Layers, filling: Filling, options: SparsityOptions, outliers: Mapping[str, float] | None
) -> Floats:
    """Return the sparsity of each layer by the chosen method; alphas come scaled and without those left out."""
    if options.compat is not None:
        return _as_research_code(layers, filling.target, options)
    if options.method == "owl":
        return filling.shifted(_owl_offsets(layers, outliers, options.owl_lambda))
    return filling.proportional(_ratios(layers, options))


def _ratios(layers: Layers, options: SparsityOptions) -> Floats:
    """Return the ratio of each layer by the chosen method, `(n,)`."""
    if options.method == "uniform":
        return np.ones(len(layers.names))
    if options.method == "depth":
        return ratios.line(layers.depths, options.epsilon)
    if options.method == "shrinkage":
        return by_shrinkage(layers, options.epsilon)
    if options.granularity == "mixed":
        return ratios.within_blocks(layers, options.epsilon)
    by_alpha = ratios.by_alpha(layers, options.epsilon)
    if options.method == "shuffled":
        return ratios.shuffled(by_alpha, layers, options.seed)
    return by_alpha


def _owl_offsets(layers: Layers, outliers: Mapping[str, float] | None, half_width: float) -> Floats:
    """Return how far each layer's sparsity lies from that of the block with the fewest outliers, `(n,)`.

    With D_b the share of outliers of block b and lambda the half-width, the offset of its layers is
    -2 lambda (D_b - min D) / (max D - min D). OWL shifts the plain mean of the blocks to the target; here it is
    the mean weighted by size, so that the target is met where blocks differ in size.
    """
    shares = numbers("outliers", outliers or {}, layers.unit_names, at_least=0)
    if np.isnan(shares).any():
        missing = layers.unit_names[int(np.argmax(np.isnan(shares)))]
        raise ValueError(
            f"method='owl' needs outliers, the share of outliers of {missing!r} and every other unit: they are "
            "counted on calibration data"
        )
    # Ratios from 0 to 2, of which the largest share of outliers has the largest.
    return -half_width * ratios.linear_map(shares, 1.0)[layers.units]


def _as_research_code(layers: Layers, target: float, options: SparsityOptions) -> Floats:
    """Return the sparsities of AlphaPruning's code, which may be above 1, or of FARMS's, which cuts those.

    Both scale ratios so that the mean weighted by size is the target, without bounds. FARMS's code then sets what
    is above 1 to 0.998, or to 0.99999 where the target is exactly 0.7, and does not scale the others again.
    """
    mapped = ratios.by_alpha(layers, options.epsilon)
    sparsities: Floats = mapped * target * layers.sizes.sum() / np.dot(layers.sizes, mapped)
    if options.compat == "farms":
        sparsities[sparsities > 1] = 0.99999 if target == 0.7 else 0.998
    return sparsities


def _plan(layers: Layers, target: float, options: SparsityOptions, sparsities: Floats) -> SparsityPlan:
    """Return the plan that records everything, alphas that took no part included."""
    planned = {
        name: PlannedLayer(
            size=int(layers.sizes[index]),
            sparsity=float(sparsities[index]),
            block=layers.blocks[index],
            alpha=_or_none(layers.alphas[index]),
            alpha_error=_or_none(layers.errors[index]),
            shape=layers.shapes[index],
        )
        for index, name in enumerate(layers.names)
    }
    return SparsityPlan(
        layers=planned,
        target=float(target),
        method=options.method,
        epsilon=options.epsilon,
        granularity=options.granularity,
        bounds=(options.min_sparsity, options.max_sparsity),
        seed=options.seed,
        options={"compat": options.compat, "owl_lambda": options.owl_lambda},
    )


def _or_none(value: float) -> float | None:
    """Return a number; None for NaN."""
    return float(value) if np.isfinite(value) else None
