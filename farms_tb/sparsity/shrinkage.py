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
from dataclasses import dataclass

import numpy as np

from farms_tb.sparsity.filling import Floats
from farms_tb.sparsity.layers import Layers
from farms_tb.spectra.random_effects import shrunk_effects

_FURTHEST = 3.0
"""Standard deviations beyond which an effect inside a block is winsorised."""
_TINY = 1e-200
"""A variance that counts as 0: fractions of smaller ones have no floating-point numbers."""
_MAD = 1.4826
"""Standard deviation of a Gaussian over its median absolute deviation."""


@dataclass(frozen=True)
class UnitEffects:
    """Effects of units, shrunk.

    Attributes:
        effects: `(units,)` d, NaN for a unit without an alpha.
        errors: `(units,)` standard errors of the effects.
        mean: m, the mean effect.
        tau: standard deviation of the true effects; 0 where noise explains all of their spread.
        shrunk: `(units,)` m + w (d - m); m for a unit without an alpha.
    """

    effects: Floats
    errors: Floats
    mean: float
    tau: float
    shrunk: Floats

    def ratios(self, epsilon: float) -> Floats:
        """Return r = 1 + epsilon (shrunk - m) / max |d - m|, from 1 - epsilon to 1 + epsilon.

        Args:
            epsilon: half-width of the ratios, which they reach only where nothing is shrunk.

        Returns:
            `(units,)` ratios; 1 for the mean effect, and for all where tau is 0.
        """
        largest = np.nanmax(np.abs(self.effects - self.mean), initial=0.0)
        if self.tau == 0 or largest == 0:
            return np.ones(len(self.effects))
        ratios: Floats = 1 + epsilon * (self.shrunk - self.mean) / largest
        return ratios


def unit_effects(layers: Layers) -> UnitEffects:
    """Estimate the effect of each unit.

    Args:
        layers: the layers, their units blocks or matrices.

    Returns:
        The effects, in units of alpha.
    """
    residuals = layers.alphas - _role_medians(layers)
    own = np.nan_to_num(layers.errors) ** 2
    members = [np.flatnonzero(layers.units == unit) for unit in range(len(layers.unit_names))]
    variances = own + _spread_within(residuals, members) ** 2
    estimates = [_effect(residuals[unit], variances[unit]) for unit in members]
    effects, errors = (np.array(column, dtype=np.float64) for column in zip(*estimates, strict=True))
    return with_shrunk(effects, errors)


def with_shrunk(effects: Floats, errors: Floats) -> UnitEffects:
    """Shrink effects to their mean by the method of Paule and Mandel.

    See `farms_tb.spectra.random_effects`; units without an effect take no part.

    Args:
        effects: `(units,)`, NaN where there is none.
        errors: `(units,)` their standard errors.

    Returns:
        The same effects with their mean, tau and shrunk values.
    """
    known = np.isfinite(effects)
    if not known.any():
        return UnitEffects(effects, errors, 0.0, 0.0, np.zeros(len(effects)))
    found = shrunk_effects(effects[known].tolist(), errors[known].tolist())
    shrunk = np.full(len(effects), found.mean)
    shrunk[known] = found.effects
    return UnitEffects(effects, errors, found.mean, found.tau, shrunk)


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

    Args:
        residuals: `(n,)` effects of the matrices, NaN for none.
        members: which matrices each unit has.

    Returns:
        1.4826 times the median absolute deviation over the units with several effects, corrected for the medians,
        which n matrices pull towards themselves: sqrt(n / (n - 1)) for n the mean number. 0 without such units.
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
    return float(_MAD * np.median(together) * np.sqrt(count / (count - 1)))


def _effect(residuals: Floats, variances: Floats) -> tuple[float, float]:
    """Return the effect of one unit and its standard error; NaN and 0 where no matrix has an alpha.

    Args:
        residuals: `(n,)` effects of its matrices, NaN for none.
        variances: `(n,)` their variances.
    """
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
