"""The densities that a spectrum is drawn with: its histogram, the fitted tail and the law of random weights.

All are densities of the eigenvalues lambda themselves, not of their logarithms: on log-log axes a power law is a
straight line of slope -alpha.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farms_tb.report import EsdHistogram, LayerRecord, Report

__all__ = ["Density", "aspect_of_sample", "esd_density", "marchenko_pastur", "tail_density"]

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
    """Return a histogram as a density: edges of its bins `(n + 1,)` and the density in each `(n,)`.

    Bins are equal in log10 of the eigenvalues. Spectra of few eigenvalues get fewer, wider bins.
    """
    counts = np.asarray(histogram.counts, dtype=float)
    # One eigenvalue alone, or all equal, would have a bin of no width.
    high = max(histogram.high, histogram.low + 1e-3)
    while len(counts) > 8 and len(counts) % 2 == 0 and counts.sum() < EIGENVALUES_PER_BIN * len(counts):
        counts = counts.reshape(-1, 2).sum(-1)
    edges = 10.0 ** np.linspace(histogram.low, high, len(counts) + 1)
    return Density(edges, counts / counts.sum() / np.diff(edges))


def tail_density(record: LayerRecord) -> Density | None:
    """Return the ends of the fitted tail, a straight line on log-log axes; None for a layer without a fit.

    The density is share * (alpha - 1) / xmin * (lambda / xmin)^-alpha from xmin on, where share is that of the
    eigenvalues in the tail. With several blocks alpha and xmin are means, and so is the line.
    """
    if record.alpha is None or record.xmin is None or record.histogram is None:
        return None
    start, end = record.xmin, 10.0**record.histogram.high
    if not 0 < start < end:
        return None
    x = np.array([start, end])
    share = _share_above(record.histogram, math.log10(start))
    return Density(x, share * (record.alpha - 1) / start * (x / start) ** -record.alpha)


def _share_above(histogram: EsdHistogram, log_start: float) -> float:
    """Return the share of the eigenvalues above a start; inside a bin they count as evenly spread."""
    counts = np.asarray(histogram.counts, dtype=float)
    edges = np.linspace(histogram.low, histogram.high, len(counts) + 1)
    below = np.interp(log_start, edges, np.concatenate([[0.0], counts.cumsum()]))
    return float(1 - below / counts.sum())


def aspect_of_sample(record: LayerRecord, report: Report) -> float:
    """Return short side / long side of the matrices whose eigenvalues were measured, at most 1."""
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
    lower, upper = (mean * (1 + sign * math.sqrt(aspect)) ** 2 for sign in (-1, 1))
    start = max(lower, lowest, 1e-10 * upper)
    # Closer at both ends, where the density falls off like a square root.
    position = (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2
    x = np.clip(start * (upper / start) ** position, start, upper)
    return Density(x, np.sqrt((upper - x) * (x - lower).clip(0)) / (2 * np.pi * mean * aspect * x))
