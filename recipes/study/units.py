"""How errors are written, in the unit of their metric, and how their changes are, in per cent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.study.records import METRICS, SHARES
from recipes.study.statistics import Effect, TaskEffect

__all__ = ["Unit", "change", "heading", "interval", "number", "p_value", "percent", "unit_of"]


@dataclass(frozen=True)
class Unit:
    """The unit of an error.

    Attributes:
        factor: What the error is multiplied by.
        digits: Decimals that are shown.
        name: The unit's name behind a number; empty where the error has none.
    """

    factor: float
    digits: int
    name: str

    def show(self, error: float, sign: str = "") -> str:
        """Write an error without its unit; empty where it is missing.

        Args:
            error: The error, or a difference of errors.
            sign: "+" for a sign in any case.
        """
        return number(self.factor * error, f"{sign}.{self.digits}f")


_SHARE = Unit(100, 2, "points")
_NATS = Unit(1, 4, "nats")
_PLAIN = Unit(1, 4, "")


def unit_of(metric: str) -> Unit:
    """Return the unit of a metric's error: hundredths for a share, nats for a loss, none for the others."""
    if metric in SHARES:
        return _SHARE
    return _NATS if metric == "loss" else _PLAIN


def heading(metric: str) -> str:
    """Return what the error of a metric is, and the unit that its numbers are shown in."""
    error = METRICS.get(metric, metric)
    if unit_of(metric) is _SHARE:
        return f"{error}, %"
    return error


def number(value: float, form: str) -> str:
    """Format a number; NaN, which stands for one that is missing, becomes an empty cell."""
    if math.isnan(value):
        return ""
    return format(value, form)


def p_value(p: float) -> str:
    """Write a p-value with no more digits than it is worth."""
    return "<0.001" if p < 0.001 else number(p, ".3f")


def percent(log_ratio: float) -> float:
    """Return the change in per cent that a log ratio of two errors stands for, 100 (exp(log_ratio) - 1)."""
    return 100 * math.expm1(log_ratio)


def show_percent(log_ratio: float) -> str:
    """Write a log ratio as a change in per cent with its sign; one below 1 % has a digit more."""
    change = percent(log_ratio)
    return f"{change:+.{2 if abs(change) < 1 else 1}f}"


def interval(low: float, high: float) -> str:
    """Write the interval of a mean log ratio as changes in per cent."""
    return f"{show_percent(low)} to {show_percent(high)}"


def change(effect: Effect | TaskEffect | None) -> str:
    """Write an effect in per cent, with its interval where there is one; empty where there is no effect."""
    if effect is None:
        return ""
    mean = show_percent(effect.mean)
    if math.isnan(effect.low):
        return mean
    return f"{mean} ({interval(effect.low, effect.high)})"
