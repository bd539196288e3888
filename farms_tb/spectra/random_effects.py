"""Effects of layers, shrunk by what is known of them: a random-effects model of alphas.

The effect of layer i is d_i = alpha_i - mu_i, where mu_i is the mean of its permutation null: how far alpha is
from that of a random layer of the same shape and entries. It is known with the standard error se_i. The model:

    d_i = delta_i + e_i,    Var(e_i) = se_i^2,    delta_i of mean m and variance tau^2 over the layers.

tau^2 and m follow from Paule and Mandel's equation, see `shrunk_effects`. What noise explains is not in tau^2, so
that of random layers it is 0 or nearly so, and their effects shrink to one value.

Sources: Paule and Mandel, J. Res. Natl. Bur. Stand. 87, 377 (1982); DerSimonian and Kacker, Contemp. Clin. Trials
28, 105 (2007). The model of alphas is this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

HALVINGS = 60
"""Halvings of the interval in which tau^2 lies, which leave it known to a rounding of the square of the range."""


@dataclass(frozen=True)
class ShrunkEffects:
    """Effects of layers, drawn to their mean as far as noise explains their differences.

    Attributes:
        effects: delta_i = m + w_i (d_i - m) of each layer. Their plain mean is m.
        weights: w_i = tau^2 / (tau^2 + se_i^2) of each layer, from 0 (all noise) to 1 (sure).
        mean: m, the mean of the effects d_i with the weights 1 / (tau^2 + se_i^2).
        tau: standard deviation of the layers' true effects; 0 where noise explains all differences.
    """

    effects: list[float]
    weights: list[float]
    mean: float
    tau: float

    @property
    def mean_weight(self) -> float:
        """The mean of the weights: how much of the differences between the layers is left, from 0 to 1."""
        return fmean(self.weights)


def shrunk_effects(effects: Sequence[float], errors: Sequence[float]) -> ShrunkEffects:
    """Shrink effects to their mean by Paule and Mandel's estimate of their true variance tau^2.

    tau^2 >= 0 solves

        sum_i (d_i - m)^2 / (tau^2 + se_i^2) = n - 1,

    m the mean with the weights 1 / (tau^2 + se_i^2). It is 0 where the left side is smaller for every tau^2 >= 0.
    The left side falls as tau^2 rises, so that there is one solution.

    Args:
        effects: d_i of each of n layers, at least one.
        errors: standard error se_i of each, at least 0.

    Returns:
        The shrunk effects, in the same order. With effects that are all equal, and with one layer, tau is 0.

    Example:
        >>> shrunk = shrunk_effects([-0.5, 0.0, 0.5], [0.3, 0.3, 0.3])
        >>> round(shrunk.tau, 6), [round(effect, 6) for effect in shrunk.effects]
        (0.4, [-0.32, 0.0, 0.32])
    """
    low, span = min(effects), max(effects) - min(effects)
    if span == 0:
        return ShrunkEffects(list(effects), [0.0] * len(effects), low, 0.0)
    # In units of the range, or of the smallest error where that is larger, so that no square overflows.
    unit = max(span, min(errors))
    positions = [(effect - low) / unit for effect in effects]
    variances = [(error / unit) * (error / unit) for error in errors]
    variance = _paule_mandel(positions, variances)
    mean = _weighted_mean(positions, variances, variance)
    weights = [variance / (variance + own) for own in variances]
    shrunk = [mean + weight * (place - mean) for weight, place in zip(weights, positions, strict=True)]
    effects = [low + unit * place for place in shrunk]
    return ShrunkEffects(effects, weights, low + unit * mean, unit * math.sqrt(variance))


def _paule_mandel(positions: Sequence[float], variances: Sequence[float]) -> float:
    """Return tau^2 for effects d_i between 0 and 1 of variances se_i^2, by bisection."""
    certain = min(variances) == 0  # the left side is infinite at tau^2 = 0
    if not certain and _excess(positions, variances, 0.0) <= 0:
        return 0.0
    # At 2 the left side is at most n / 2, not above n - 1.
    below, above = 0.0, 2.0
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        if _excess(positions, variances, middle) > 0:
            below = middle
        else:
            above = middle
    return (below + above) / 2


def _excess(positions: Sequence[float], variances: Sequence[float], variance: float) -> float:
    """Return sum_i (d_i - m)^2 / (tau^2 + se_i^2) - (n - 1), for tau^2 = `variance`."""
    mean = _weighted_mean(positions, variances, variance)
    terms = [(place - mean) ** 2 / (variance + own) for place, own in zip(positions, variances, strict=True)]
    try:
        return math.fsum(terms) - (len(positions) - 1)
    except OverflowError:  # errors that are nothing beside the effects
        return math.inf


def _weighted_mean(positions: Sequence[float], variances: Sequence[float], variance: float) -> float:
    """Return the mean with the weights 1 / (tau^2 + se_i^2), for tau^2 = `variance`."""
    # Times the smallest denominator, because that may be tiny.
    smallest = variance + min(variances)
    weights = [smallest / (variance + own) for own in variances]
    total = math.fsum(weight * place for weight, place in zip(weights, positions, strict=True))
    return total / math.fsum(weights)
