"""Effects of blocks, each known only so well, and drawn to their mean accordingly.

AlphaPruning and FARMS map the plain mean alpha of each block. One matrix whose fit went wrong moves that mean, and
with it the smallest or the largest alpha that all other blocks are compared with. Here, instead,

1. the effect of a matrix is its alpha minus the median alpha of its role (all `q_proj`, say), so that blocks with
   other kinds of matrices can be compared;
2. the effect d_b of a block is the mean of those of its matrices, weighted by precision, where what lies further
   than three standard deviations from the block's median counts as three (winsorised); its standard error s_b
   follows from the errors of the alphas and from how much the matrices of one block differ;
3. the effects are a sample of a random-effects model, d_b = delta_b + e_b, e_b of variance s_b^2, delta_b of mean
   m and variance tau^2; m and tau^2 are estimated by the method of Paule and Mandel;
4. the estimate of delta_b is m + w_b (d_b - m), w_b = tau^2 / (tau^2 + s_b^2): noisy blocks are drawn to the
   mean, well-known ones stay. With tau = 0 there is nothing but noise, and the allocation is uniform.

Source of the estimator: Paule & Mandel, J. Res. Natl. Bur. Stand. 87 (1982) 377.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from farms_tb.sparsity.filling import Floats
from farms_tb.sparsity.layers import Layers
from farms_tb.sparsity.ratios import MAD
from farms_tb.spectra.random_effects import shrunk_effects

_FURTHEST = 3.0
"""Standard deviations beyond which an effect inside a block is winsorised."""
_TINY = 1e-200
"""A variance that counts as 0: fractions of smaller ones have no floating-point numbers."""


def by_shrinkage(layers: Layers, epsilon: float) -> Floats:
    """Map the shrunk effect of each unit: r = 1 + epsilon (shrunk - m) / max |d - m|.

    Args:
        layers: the layers, their units blocks or matrices.
        epsilon: half-width of the ratios, which they reach only where nothing is shrunk.

    Returns:
        `(n,)` the ratio of each layer's unit; 1 without an alpha, and for all where tau is 0.
    """
    residuals = layers.alphas - _role_medians(layers)
    own = np.nan_to_num(layers.errors) ** 2
    members = [np.flatnonzero(layers.units == unit) for unit in range(len(layers.unit_names))]
    variances = own + _spread_within(residuals, members) ** 2
    estimates = [_effect(residuals[unit], variances[unit]) for unit in members]
    effects, errors = (np.array(column, dtype=np.float64) for column in zip(*estimates, strict=True))
    known = np.isfinite(effects)
    ratios = np.ones(len(effects))
    if known.any():
        found = shrunk_effects(effects[known].tolist(), errors[known].tolist())
        largest = np.max(np.abs(effects[known] - found.mean))
        if found.tau > 0 and largest > 0:
            ratios[known] += epsilon * (np.array(found.effects) - found.mean) / largest
    return ratios[layers.units]


def _role_medians(layers: Layers) -> Floats:
    """Return the median alpha of each layer's role, over the blocks; of all alphas where there are no roles.

    A role that fewer than three layers have gets the median of all alphas: its own would hide their effect.
    Matrices that are units themselves are compared with all others, as in the papers.
    """
    overall = np.full(len(layers.names), _median(layers.alphas))
    if layers.unit_names == layers.names:
        return overall
    roles = np.array(layers.roles)
    for role in set(layers.roles):
        alphas = layers.alphas[roles == role]
        if np.isfinite(alphas).sum() >= 3:
            overall[roles == role] = _median(alphas)
    return overall


def _spread_within(residuals: Floats, members: Sequence[np.ndarray]) -> float:
    """Return the robust standard deviation of effects around the median of their unit, over all units.

    `MAD` times the median absolute deviation over the units with several effects, corrected for the medians, which
    n matrices pull towards themselves: sqrt(n / (n - 1)) for n the mean number. 0 without such units.
    """
    deviations = []
    for unit in members:
        known = residuals[unit][np.isfinite(residuals[unit])]
        if len(known) > 1:
            deviations.append(np.abs(known - np.median(known)))
    if not deviations:
        return 0.0
    together = np.concatenate(deviations)
    count = len(together) / len(deviations)
    return float(MAD * np.median(together) * np.sqrt(count / (count - 1)))


def _effect(residuals: Floats, variances: Floats) -> tuple[float, float]:
    """Return the effect of a unit and its standard error, from those of its matrices; NaN and 0 without alphas."""
    known = np.isfinite(residuals)
    if not known.any():
        return np.nan, 0.0
    values, squares = residuals[known], variances[known]
    center = np.median(values)
    limits = _FURTHEST * np.sqrt(squares)
    held = np.clip(values, center - limits, center + limits) if squares.min() > 0 else values
    largest = squares.max()
    if largest < _TINY:
        return float(np.mean(held)), 0.0
    weights = 1 / np.maximum(squares, 1e-18 * largest)
    return float(np.sum(weights * held) / np.sum(weights)), float(1 / np.sqrt(np.sum(weights)))


def _median(values: Floats) -> float:
    """Return the median of the values that are there; 0 where none is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else 0.0
