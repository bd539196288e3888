"""What a spectrum is drawn with: its histogram, the fitted tail, the law of random weights, and its outliers.

Densities are those of the eigenvalues lambda themselves, not of their logarithms: on log-log axes a power law is a
straight line of slope -alpha.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farms_tb.report import EsdHistogram, LayerRecord, Outliers, Report

__all__ = ["Density", "aspect_of_sample", "esd_density", "marchenko_pastur", "spectrum_marks", "tail_density"]

Array = NDArray[np.float64]

POINTS = 192
EIGENVALUES_PER_BIN = 6
"""On average at least; neighbouring bins are merged in twos until they hold as many."""


class Density(NamedTuple):
    """A density at some eigenvalues.

    Attributes:
        x: eigenvalues, ascending; for a histogram the edges of its bins, one more than `y` has entries.
        y: density, in eigenvalues per unit of x, as a share of all.
    """

    x: Array
    y: Array


def esd_density(histogram: EsdHistogram) -> Density:
    """Return a histogram as a density.

    Bins are equal in log10 of the eigenvalues. Spectra of few eigenvalues get fewer, wider bins.

    Args:
        histogram: counts of a layer's eigenvalues, `n` bins or more.

    Returns:
        The edges of the bins `(n + 1,)` and the density in each `(n,)`.
    """
    counts = np.asarray(histogram.counts, dtype=float)
    while len(counts) > 8 and len(counts) % 2 == 0 and counts.sum() < EIGENVALUES_PER_BIN * len(counts):
        counts = counts.reshape(-1, 2).sum(-1)
    # One eigenvalue alone, or all equal, would have a bin of no width.
    high = max(histogram.high, histogram.low + 1e-3)
    edges = 10.0 ** np.linspace(histogram.low, high, len(counts) + 1)
    shares = counts / counts.sum()
    return Density(edges, shares / np.diff(edges))


def tail_density(record: LayerRecord) -> Density | None:
    """Return the density of the fitted tail.

    For lambda >= xmin it is

        share * (alpha - 1) / xmin * (lambda / xmin)^-alpha,

    where share is that of the eigenvalues in the tail. With several blocks alpha and xmin are means, and so is the
    line.

    Args:
        record: a layer's record, with a histogram.

    Returns:
        The two ends of a straight line on log-log axes, from xmin to the largest eigenvalue; None for a layer
        without a fit.
    """
    if record.alpha is None or record.xmin is None or record.histogram is None:
        return None
    start, end = record.xmin, 10.0**record.histogram.high
    if not 0 < start < end:
        return None
    x = np.array([start, end])
    share = _share_above(record.histogram, math.log10(start))
    at_start = share * (record.alpha - 1) / start
    return Density(x, at_start * (x / start) ** -record.alpha)


def _share_above(histogram: EsdHistogram, log_start: float) -> float:
    """Return the share of the eigenvalues above a start; inside a bin they count as evenly spread."""
    counts = np.asarray(histogram.counts, dtype=float)
    edges = np.linspace(histogram.low, histogram.high, len(counts) + 1)
    below_edges = np.concatenate([[0.0], counts.cumsum()])
    below = np.interp(log_start, edges, below_edges)
    return float(1 - below / counts.sum())


def aspect_of_sample(record: LayerRecord, report: Report) -> float:
    """Return short side / long side of the matrices whose eigenvalues were measured, at most 1.

    Args:
        record: the layer's record, for the shape of a whole matrix.
        report: the measurement, whose options tell whether windows were measured, and of which aspect ratio.
    """
    if report.options.get("esd") == "full":
        sides = record.shape[1:]
        return min(sides) / max(sides)
    aspect_ratio = float(report.options.get("aspect_ratio", 1.0))
    return min(aspect_ratio, 1 / aspect_ratio)


def marchenko_pastur(mean: float, aspect: float, lowest: float = 0.0) -> Density:
    """Return the Marchenko-Pastur law: the spectrum of independent random entries, in the limit of large matrices.

    For n x m entries of variance s2, n <= m, the n eigenvalues of the smaller Gram matrix lie between
    s2 (sqrt(m) -+ sqrt(n))^2, their mean is s2 m, and their density is

        sqrt((upper - lambda) (lambda - lower)) / (2 pi s2 n lambda).

    Source: Marchenko and Pastur, Math. USSR Sbornik 1967.

    Args:
        mean: mean eigenvalue, s2 m.
        aspect: n / m, at most 1.
        lowest: eigenvalues below are left out; the density of square matrices has no bound at 0.

    Returns:
        The law at points that are equally spaced in the logarithm, but closer at the edges.
    """
    lower = mean * (1 - math.sqrt(aspect)) ** 2
    upper = mean * (1 + math.sqrt(aspect)) ** 2
    start = max(lower, lowest, 1e-10 * upper)
    # Closer at both ends, where the density falls off like a square root.
    position = (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2
    x = np.clip(start * (upper / start) ** position, start, upper)
    root = np.sqrt((upper - x) * (x - lower).clip(0))
    return Density(x, root / (2 * np.pi * mean * aspect * x))


def spectrum_marks(record: LayerRecord, report: Report) -> Outliers | None:
    """Return what is marked on a layer's spectrum: the edge of random weights, and the spikes and traps beyond it.

    Spikes and traps are eigenvalues of whole matrices, so that they belong to the spectra of `esd="full"`. Where
    they were counted, with a permutation null, the marks are the eigenvalues that `num_spikes` and `num_traps`
    count, and the edge is theirs. On all other spectra, those of windows among them, the edge is that of the
    Marchenko-Pastur law, mean eigenvalue * (1 + sqrt(aspect))^2, and nothing is known beyond it.

    Args:
        record: the layer's record.
        report: the measurement that the record is part of, for its options.

    Returns:
        The marks, in units of the eigenvalues; None for a layer without eigenvalues above 0.
    """
    if report.options.get("esd") == "full" and record.outliers is not None:
        return record.outliers
    if not record.norm_stable_rank:
        return None
    aspect = aspect_of_sample(record, report)
    return Outliers(edge=record.norm_stable_rank * (1 + math.sqrt(aspect)) ** 2)
