"""The curves of a training run, as plain data.

The callback's live logging and the readers of `metrics.csv` share these classes, and so share the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["LARGEST_EXACT", "Curve", "History"]

LARGEST_EXACT = 2**53
"""Whole numbers beyond it are not exact in the floating-point numbers of the page and the pictures."""


class Curve(NamedTuple):
    """One layer's measurements in the order of training; all three tuples have the same length.

    Attributes:
        epochs: completed epochs at each measurement, 0 for the initial weights.
        steps: optimizer steps at each measurement.
        values: what was measured.
    """

    epochs: tuple[float, ...]
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def times(self, by_step: bool) -> tuple[float, ...]:
        """Return when each value was measured.

        Args:
            by_step: in optimizer steps, instead of completed epochs.
        """
        return self.steps if by_step else self.epochs


@dataclass(frozen=True)
class History:
    """Every layer's curves, by layer name in order of depth.

    Attributes:
        alpha: power-law exponents.
        ratio: learning-rate ratios.
        lr: active learning rates.
        layers: all names, in order of depth.
        effect: alphas minus those of the permutation null; empty where the run did not log them.
        z: z-scores, likewise.
        rank_share: shares of the directions that hold 99 % of the energy, likewise.
    """

    alpha: Mapping[str, Curve] = field(default_factory=dict)
    ratio: Mapping[str, Curve] = field(default_factory=dict)
    lr: Mapping[str, Curve] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    effect: Mapping[str, Curve] = field(default_factory=dict)
    z: Mapping[str, Curve] = field(default_factory=dict)
    rank_share: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def by_step(self) -> bool:
        """Whether one epoch holds several measurements, so that only steps can tell them apart."""
        curves = [*self.alpha.values(), *self.ratio.values(), *self.lr.values()]
        return any(len(set(curve.epochs)) < len(curve.epochs) for curve in curves)
