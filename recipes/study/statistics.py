"""What a study concludes from its errors: paired log ratios, their intervals, Holm's correction.

The effect of an arm on one seed is the log of its error over the baseline's on the same seed, that is with the
same data, the same initial network and the same order of batches. Negative means that the arm is better; 100 times
the effect is, for small effects, the change of the error in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from farms_tb.spectra.random_effects import shrunk_effects

__all__ = ["LEVEL", "Effect", "TaskEffect", "effect_over_tasks", "holm", "pooled_effect"]

LEVEL = 0.95
"""Coverage of the intervals."""

_ROUNDING = 1e-12
"""A standard error or a spread below this share of the largest log ratio is 0, but for rounding."""


@dataclass(frozen=True)
class Effect:
    """A mean of paired comparisons, of log ratios unless something else is said, with its uncertainty.

    Attributes:
        mean: Mean log ratio.
        low: Lower end of its interval; NaN where it is unknown: a cell has fewer than two pairs, or the pairs do
            not differ.
        high: Upper end of its interval; NaN where that is unknown.
        p: Two-sided p-value of no effect; NaN where the interval is unknown.
        pairs: Number of log ratios that went in.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def pooled_effect(cells: Sequence[Mapping[int, float]]) -> Effect:
    """Average log ratios over the seeds of each cell, then over cells, with a t-interval.

    The mean is the plain mean of the cells' means: every cell counts the same, however many seeds it has. Cells
    that share a seed share what the seed decides (the data, say), so their log ratios may be correlated. The
    variance therefore adds up each seed's residuals over the cells before squaring (a cluster-robust variance,
    clusters being seeds):

        var = sum over s of ( sum over c that have s of  sqrt(n_c / (n_c - 1)) (d_cs - mean_c) / (C n_c) )^2

    for log ratios d_cs of C cells with n_c seeds each. The degrees of freedom are those of the smallest cell,
    n_c - 1. For one cell all this is the textbook's paired t-interval and t-test. Log ratios that are the same for
    all seeds, other than 0, leave interval and p-value unknown: on few test samples a handful of seeds may agree.

    Args:
        cells: For each cell the log ratio of each seed; no cell is empty.

    Returns:
        The effect.

    Raises:
        ValueError: There is no cell, or one without a log ratio.
    """
    if not cells or not all(cells):
        raise ValueError("pooled_effect needs at least one log ratio in every cell")
    pairs = sum(map(len, cells))
    means = [fmean(cell.values()) for cell in cells]
    mean = fmean(means)
    smallest = min(map(len, cells))
    if smallest < 2:
        return Effect(mean, math.nan, math.nan, math.nan, pairs)
    residuals = _residuals(cells, means)
    error = math.sqrt(math.fsum(residual**2 for residual in residuals.values()))
    largest = max(abs(value) for cell in cells for value in cell.values())
    if largest == 0.0:  # an arm that does nothing
        return Effect(0.0, 0.0, 0.0, 1.0, pairs)
    if error <= _ROUNDING * largest:
        return Effect(mean, math.nan, math.nan, math.nan, pairs)
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, smallest - 1))
    p = 2 * float(stats.t.sf(abs(mean) / error, smallest - 1))
    return Effect(mean, mean - half, mean + half, p, pairs)


def _residuals(cells: Sequence[Mapping[int, float]], means: Sequence[float]) -> dict[int, float]:
    """Return each seed's residuals, added up over the cells that have it: the sum over c in `pooled_effect`."""
    residuals: dict[int, float] = {}
    for cell, centre in zip(cells, means, strict=True):
        n = len(cell)
        for seed, value in cell.items():
            share = math.sqrt(n / (n - 1)) * (value - centre) / (len(cells) * n)
            residuals[seed] = residuals.get(seed, 0.0) + share
    return residuals


@dataclass(frozen=True)
class TaskEffect:
    """The mean effect on tasks of which the cells are a sample.

    Attributes:
        mean: Mean log ratio over tasks; cells that are known better count more.
        low: Lower end of its interval.
        high: Upper end of its interval.
        tau: Standard deviation of the true effects of tasks; 0 where the noise of the seeds explains all.
        cells: Number of cells that went in.
    """

    mean: float
    low: float
    high: float
    tau: float
    cells: int


def effect_over_tasks(cells: Sequence[Mapping[int, float]]) -> TaskEffect | None:
    """Return the mean effect over tasks, and how much the effect varies between them.

    `pooled_effect` says what more seeds of the same cells would give; this says what other cells might. The
    model: the mean log ratio d_c of cell c is that of a task, drawn with mean m and standard deviation tau, plus
    noise with the standard error se_c of the cell's seeds. tau^2 is Paule and Mandel's estimate, and

        m = sum w_c d_c / sum w_c,    w_c = 1 / (tau^2 + se_c^2),    m +- t(C - 1) sqrt(q / sum w_c)

    for C cells, with the factor q = max(1, sum w_c (d_c - m)^2 / (C - 1)) of Hartung and Knapp, which by Paule and
    Mandel's equation is 1. Cells count as independent of each other, also where they share seeds.

    Sources: Paule and Mandel, J. Res. Natl. Bur. Stand. 87, 377 (1982); Hartung and Knapp, Stat. Med. 20, 3875
    (2001); the factor of at least 1: Roever, Knapp and Friede, BMC Med. Res. Methodol. 15, 99 (2015).

    Where an arm changes nothing in a cell, every log ratio is 0. It counts with the standard error that the seeds
    of the other cells would give it: counted as known for certain, one such cell would decide the mean.

    Args:
        cells: For each cell the log ratio of each seed. Cells with fewer than two are left out, because their
            standard error is unknown; so are those with the same one for all seeds, other than 0.

    Returns:
        The mean and its interval; None with fewer than two cells.
    """
    known = [list(cell.values()) for cell in cells if len(cell) > 1 and _differ(cell)]
    if len(known) < 2:
        return None
    means = [float(np.mean(cell)) for cell in known]
    variances = [float(np.var(cell, ddof=1)) for cell in known]
    typical = [variance for variance in variances if variance > 0] or [0.0]
    within = float(np.mean(typical))
    errors = [math.sqrt((own or within) / len(cell)) for own, cell in zip(variances, known, strict=True)]
    fit = shrunk_effects(means, errors)
    spreads = [fit.tau**2 + error**2 for error in errors]
    half = 0.0
    if min(spreads) > 0:
        total = math.fsum(1 / spread for spread in spreads)
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(known) - 1)) / math.sqrt(total)
    return TaskEffect(fit.mean, fit.mean - half, fit.mean + half, fit.tau, len(known))


def _differ(cell: Mapping[int, float]) -> bool:
    """Return whether a cell's log ratios differ between its seeds by more than rounding, or are all 0."""
    largest = max(map(abs, cell.values()))
    spread = max(cell.values()) - min(cell.values())
    return largest == 0.0 or spread > _ROUNDING * largest


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being one of several (Holm, Scandinavian Journal of Statistics, 1979).

    Args:
        p_values: The p-values; NaN stands for a test that could not be made and is left out of the count.

    Returns:
        The adjusted ones in the same order: below 0.05 is significant at a family-wise error rate of 5 per cent.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")  # NaN comes last, and so changes nothing before it
    tests = np.count_nonzero(~np.isnan(p))
    corrected = (tests - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(corrected, 1.0))
    return [float(value) for value in adjusted]
