"""Standard errors and intervals of means over few values, by Student's t distribution."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean of values `(n,)`, NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def half_width(values: NDArray[np.float64]) -> float:
    """Return half of the interval of 95 % for the mean of values `(n,)`, NaN for a single one."""
    return standard_error(values) * t_quantile(max(1, len(values) - 1))


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    Half of the interval that holds 95 % of the distribution, found by bisection of the finite series for integer
    degrees of freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4).

    Args:
        freedom: degrees of freedom, at least 1.

    Example:
        >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 3, 30)]
        [12.706, 4.303, 3.182, 2.042]
    """
    low, high = 1.9, 13.0
    for _ in range(50):
        middle = (low + high) / 2
        if _share_within(middle, freedom) < 0.95:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _share_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t is between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
