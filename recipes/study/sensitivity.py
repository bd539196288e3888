"""How much an arm suffers from a badly chosen learning rate, from the runs that tuned it.

The curve of an arm is its validation error over the base learning rates tried. Its range is that of the rates
around the best one whose error is within 5 % of the best, read off the curve with straight lines in log error over
log rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

from recipes.study.pairs import Records, tuning_runs
from recipes.study.records import Record

__all__ = ["TOLERANCE", "Curve", "Point", "RateRange", "compare_ranges", "curves", "rate_range"]

TOLERANCE = 0.05
"""How much larger than the best an error may be, as a share of it, for its rate to be in the range."""


@dataclass(frozen=True)
class Point:
    """One learning rate of a curve.

    Attributes:
        lr: Base learning rate.
        seeds: Number of runs.
        diverged: Those of them that diverged, and count with the error of a network that has learnt nothing.
        log_error: Mean log validation error.
        log_standard_error: Standard error of `log_error` over seeds; NaN for one seed.
    """

    lr: float
    seeds: int
    diverged: int
    log_error: float
    log_standard_error: float

    @property
    def error(self) -> float:
        """Geometric mean of the validation errors, in the error's own unit."""
        return math.exp(self.log_error)


@dataclass(frozen=True)
class Curve:
    """Validation error over base learning rate of one arm in one cell.

    Attributes:
        cell: Name of the cell.
        arm: The arm.
        metric: Name of the score, say "accuracy".
        points: The rates tried, ascending.
    """

    cell: str
    arm: str
    metric: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The point with the smallest error; the smaller rate of equals.

        As in the search, a rate at which a run diverged is out, unless one did at every rate.
        """
        return min(self.points, key=lambda point: (point.diverged > 0, point.log_error))

    @property
    def step(self) -> float:
        """The largest ratio of neighbouring rates: how finely the curve is known."""
        return max(above.lr / below.lr for below, above in pairwise(self.points))


@dataclass(frozen=True)
class RateRange:
    """The learning rates whose error is within 5 % of an arm's best.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        open_below: Whether the lower end is the smallest rate tried, so that the range may go on below.
        open_above: Whether the upper end is the largest rate tried.
    """

    low: float
    high: float
    open_below: bool
    open_above: bool

    @property
    def factor(self) -> float:
        """Its width, the largest rate over the smallest."""
        return self.high / self.low

    @property
    def at_least(self) -> bool:
        """Whether the range may be wider than `factor`."""
        return self.open_below or self.open_above


def curves(cells: Mapping[str, Records], arms: Sequence[str]) -> list[Curve]:
    """Return the curves of arms for which more than one rate was tried, in the order of `arms` in each cell."""
    found = []
    for name, records in cells.items():
        tried = tuning_runs(records)
        for arm in arms:
            points = tuple(_point(lr, list(runs.values())) for lr, runs in tried.get(arm, {}).items())
            if len(points) > 1:
                found.append(Curve(name, arm, next(iter(records.values())).metric, points))
    return found


def _point(lr: float, runs: Sequence[Record]) -> Point:
    """Return the point of the runs of one rate."""
    logs = [run.log_error("val") for run in runs]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return Point(lr, len(runs), sum(run.diverged for run in runs), mean(logs), error)


def rate_range(curve: Curve) -> RateRange:
    """Return the rates around the best one whose error is within 5 % of the best.

    Between two tried rates, log error is taken as linear in log rate. Where the curve leaves the 5 % and comes
    back, the range ends where it leaves.
    """
    points = curve.points
    best = points.index(curve.best)
    limit = curve.best.log_error + math.log1p(TOLERANCE)
    low = _end(points[best::-1], limit)
    high = _end(points[best:], limit)
    return RateRange(low or points[0].lr, high or points[-1].lr, low is None, high is None)


def _end(outwards: Sequence[Point], limit: float) -> float | None:
    """Return the rate at which the log error first passes a limit, going outwards; None where it never does."""
    for inner, outer in pairwise(outwards):
        if outer.log_error > limit:
            share = (limit - inner.log_error) / (outer.log_error - inner.log_error)
            return inner.lr * math.pow(outer.lr / inner.lr, share)
    return None


def compare_ranges(own: Curve, baseline: Curve) -> int:
    """Return 1 where the range of an arm is wider than the baseline's in its cell, -1 where narrower, else 0.

    The ranges have no interval, but are no finer than the rates tried: a difference counts where it is larger
    than the step between those, whatever lies beyond the ends of the grid.
    """
    step = max(own.step, baseline.step)
    mine, other = rate_range(own), rate_range(baseline)
    if mine.factor > other.factor * step and not other.at_least:
        return 1
    if mine.factor * step < other.factor and not mine.at_least:
        return -1
    return 0
