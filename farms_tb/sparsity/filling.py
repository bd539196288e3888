"""Sparsities that meet a target exactly, also where bounds bind (water-filling).

With n_i entries in layer i, bounds lo and hi, and a target S, the sparsities are

    p_i = clip(o_i + c s_i, lo, hi),    c such that sum_i n_i p_i = S sum_i n_i.

Relative ranges have o_i = 0 and s_i the ratio of the layer; absolute ones, as OWL's, have o_i the distance from
the mean and s_i = 1. The sum grows with c, piecewise linearly: the piece is found by bisection, and c in it by one
division, so that the target is met to rounding and not to the tolerance of an iteration.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Filling:
    """What is distributed.

    Attributes:
        sizes: `(n,)` entries of each layer, float64.
        target: the sparsity over all entries.
        low: smallest sparsity of a layer.
        high: largest one; `low <= target <= high`.
    """

    sizes: Floats
    target: float
    low: float
    high: float

    def proportional(self, ratios: Floats) -> Floats:
        """Return p_i = clip(c r_i, lo, hi): sparsities in proportion to ratios.

        Layers of ratio 0 get more than `low` only where all others are at `high` and the target is not met.

        Args:
            ratios: `(n,)`, at least 0.

        Returns:
            `(n,)` sparsities, whose mean weighted by size is the target.
        """
        found = np.full(len(ratios), self.low)
        grows = ratios > 0
        found[grows] = self.high
        if self._total(found) < self.target:
            # Even with all others at the upper bound, the layers of ratio 0 have to give something.
            slopes = np.where(grows, 0.0, 1.0)
            offsets = np.where(grows, self.high, 0.0)
            return self._solved(offsets, slopes)
        return self._solved(np.zeros(len(ratios)), ratios)

    def shifted(self, offsets: Floats) -> Floats:
        """Return p_i = clip(o_i + c, lo, hi): sparsities at fixed distances from each other.

        Args:
            offsets: `(n,)` distances.

        Returns:
            `(n,)` sparsities, whose mean weighted by size is the target.
        """
        return self._solved(offsets, np.ones(len(offsets)))

    def _solved(self, offsets: Floats, slopes: Floats) -> Floats:
        """Return clip(o_i + c s_i, lo, hi) with the c that meets the target."""
        moving = slopes > 0
        if not moving.any():
            return np.clip(offsets, self.low, self.high)
        edges = [(bound - offsets[moving]) / slopes[moving] for bound in (self.low, self.high)]
        corners = np.unique(np.concatenate(edges))
        left = bisect_left(corners[1:-1], self.target, key=lambda c: self._total(self._at(c, offsets, slopes)))
        right = min(left + 1, len(corners) - 1)  # all layers can have one corner in common
        return self._on_piece(corners[left], corners[right], offsets, slopes)

    def _on_piece(self, start: float, end: float, offsets: Floats, slopes: Floats) -> Floats:
        """Return the sparsities for the c between two neighbouring corners that meets the target."""
        found = self._at(end, offsets, slopes)
        before = self._at(start, offsets, slopes)
        free = found > before
        if not free.any():
            return found
        others = math.fsum(self.sizes[~free] * found[~free])
        wanted = self.target * math.fsum(self.sizes) - others
        # Inside a piece, sparsities run along a straight line from `before` to `found`.
        rise = math.fsum(self.sizes[free] * (found[free] - before[free]))
        share = (wanted - math.fsum(self.sizes[free] * before[free])) / rise
        found[free] = before[free] + min(max(share, 0.0), 1.0) * (found[free] - before[free])
        return found

    def _at(self, c: float, offsets: Floats, slopes: Floats) -> Floats:
        """Return clip(o_i + c s_i, lo, hi)."""
        clipped: Floats = np.clip(offsets + c * slopes, self.low, self.high)
        return clipped

    def _total(self, sparsities: Floats) -> float:
        """Return the mean sparsity, weighted by size."""
        return math.fsum(self.sizes * sparsities) / math.fsum(self.sizes)
