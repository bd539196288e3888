"""The sparsity of each unit, relative to the others: one function a method.

A unit is a block or a matrix. Ratios are at least 0; only their proportions count, since
`farms_tb.sparsity.filling` scales them to the target. With half-width epsilon they reach from 1 - epsilon to
1 + epsilon.

Sources: AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912), FARMS (Hu et al., ICML 2025, arXiv 2506.06280).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farms_tb.sparsity.filling import Floats
from farms_tb.sparsity.layers import Layers

MAD = 1.4826
"""Standard deviation of a Gaussian over its median absolute deviation."""

WILD = 8.0
"""Robust z-score beyond which an alpha says more of its fit than of its layer.

The alphas that both papers' repositories ship for LLaMA-7B stay within 3.4, those of strongly uneven made-up
layers within 7. Of the 210 matrices of SmolLM2-135M, by FARMS with `fit="xmin_peak"`, two failed fits are at 29
(alpha 41) and 9.5 (alpha 16), and all others within 5.1.
"""


def linear_map(values: Floats, epsilon: float) -> Floats:
    """Return r = (1 - epsilon) + 2 epsilon (a - min a) / (max a - min a); 1 where all are equal.

    Args:
        values: alphas of the units, NaN where a unit has none: it gets the mean of the others.
        epsilon: half-width of the ratios, 0 to 1.
    """
    known = np.isfinite(values)
    if not known.any():
        return np.ones(len(values))
    filled = np.where(known, values, np.mean(values[known]))
    span = np.ptp(filled)
    if span == 0:
        return np.ones(len(values))
    ratios: Floats = (1 - epsilon) + 2 * epsilon * (filled - filled.min()) / span
    return ratios


def line(depths: NDArray[np.intp], epsilon: float) -> Floats:
    """Return ratios that rise by equal steps from 1 - epsilon, the first block, to 1 + epsilon, the last.

    Args:
        depths: `(n,)` depth of each layer.
        epsilon: half-width of the ratios.
    """
    return linear_map(depths.astype(np.float64), epsilon)


def by_alpha(layers: Layers, epsilon: float) -> Floats:
    """Map the mean alpha of each unit linearly, as AlphaPruning and FARMS do.

    Args:
        layers: the layers; their alphas as they are mapped.
        epsilon: half-width of the ratios.

    Returns:
        `(n,)` the ratio of each layer's unit.
    """
    return linear_map(layers.unit_means(layers.alphas), epsilon)[layers.units]


def within_blocks(layers: Layers, epsilon: float) -> Floats:
    """Return block ratios times matrix ratios that keep the mean of each block, weighted by size.

    With r_b the ratio of block b from its mean alpha, and q_i that of matrix i from the alphas of its block alone,
    r_i = r_b q_i sum_j n_j / sum_j n_j q_j, the sums over the block.

    Args:
        layers: the layers, each a unit.
        epsilon: half-width of both ranges.

    Returns:
        `(n,)` the ratio of each layer.
    """
    blocks = sorted(set(layers.blocks))
    members = [np.flatnonzero(np.array(layers.blocks) == block) for block in blocks]
    means = np.array([_mean_or_nan(layers.alphas[own]) for own in members])
    found = np.ones(len(layers.names))
    for own, ratio in zip(members, linear_map(means, epsilon), strict=True):
        inside = linear_map(layers.alphas[own], epsilon)
        sizes = layers.sizes[own]
        found[own] = ratio * inside * sizes.sum() / np.dot(sizes, inside)
    return found


def _mean_or_nan(values: Floats) -> float:
    """Return the mean of the values that are there; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(np.mean(known)) if len(known) else np.nan


def shuffled(ratios: Floats, layers: Layers, seed: int) -> Floats:
    """Return the units' ratios in random order.

    Args:
        ratios: `(n,)` the ratio of each layer's unit.
        layers: the layers.
        seed: the same seed gives the same order.
    """
    of_units = np.ones(len(layers.unit_names))
    of_units[layers.units] = ratios
    return np.random.default_rng(seed).permutation(of_units)[layers.units]


def wild(alphas: Floats) -> NDArray[np.bool_]:
    """Return the alphas that are far from all others.

    The robust z-score of an alpha is its distance from the median, over `MAD` times the median of all distances.

    Args:
        alphas: `(n,)`, NaN for none.

    Returns:
        `(n,)` booleans: whether the z-score is beyond `WILD`. None where more than half of the alphas are equal.
    """
    known = np.isfinite(alphas)
    if not known.any():
        return np.zeros(len(alphas), dtype=bool)
    distances = np.abs(alphas - np.median(alphas[known]))
    scale = MAD * np.median(distances[known])
    far: NDArray[np.bool_] = (scale > 0) & (np.nan_to_num(distances) > WILD * scale)
    return far
