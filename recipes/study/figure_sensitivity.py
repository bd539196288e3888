"""The validation error over the base learning rate of every arm, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farms_tb.viewing.plots.style import new_figure
from recipes.study.figure_style import Style, add_legend, plain_axes, save
from recipes.study.sensitivity import Curve, rate_range
from recipes.study.units import heading, unit_of

__all__ = ["draw_sensitivity"]

_COLUMNS = 3  # at most
_CROWDED = 10  # arms of a panel, at most: more have no colours of their own
_ASIDE = 1.06  # between the first and the last arm's points of one rate
_RANGE_HEIGHT = 0.035  # at most, between the bars of the ranges; a share of the panel
_RANGES_HEIGHT = 0.25  # at most, of all bars together


def draw_sensitivity(found: Sequence[Curve], styles: Mapping[str, Style], path: Path) -> None:
    """Draw a panel for each cell, with a line for each arm and, at its foot, the range within 5 % of its best.

    A cell with many arms has a panel for each of them, with the cell's first arm for comparison.
    """
    panels = _panels(found)
    lines = math.ceil(len(panels) / _COLUMNS)
    columns = math.ceil(len(panels) / lines)
    height = 4.0 if columns == 1 else max(2.4, 3.6 - 0.4 * lines)
    figure = new_figure(max(6.0, 3.6 * columns), 0.9 + height * lines)
    every_axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, axes in zip(panels, every_axes, strict=False):
        _draw_panel(axes, panel.curves, styles)
        axes.set_title(panel.title, fontsize=10)
    for axes in every_axes[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("base learning rate; bars at the foot: rates within 5% of the arm's best error", fontsize=10)
    add_legend(figure, {curve.arm: styles[curve.arm] for panel in panels for curve in panel.in_legend}, "-")
    save(figure, path)


@dataclass(frozen=True)
class _Panel:
    """A panel of the figure.

    Attributes:
        title: The cell and, where the panel is for one arm, that arm.
        curves: What is drawn.
        in_legend: Those whose arms the title does not name.
    """

    title: str
    curves: Sequence[Curve]
    in_legend: Sequence[Curve]


def _panels(found: Sequence[Curve]) -> list[_Panel]:
    """Return the panels of the cells, or of the arms of a cell with many."""
    panels = []
    for cell in dict.fromkeys(curve.cell for curve in found):
        curves = [curve for curve in found if curve.cell == cell]
        if len(curves) <= _CROWDED:
            panels.append(_Panel(cell, curves, curves))
            continue
        first, *others = curves
        panels += [_Panel(f"{cell}\n{curve.arm}", [first, curve], [first]) for curve in others]
    return panels


def _draw_panel(axes: Any, found: Sequence[Curve], styles: Mapping[str, Style]) -> None:
    """Draw some curves of one cell, and their ranges below them."""
    for place, curve in enumerate(found):
        aside = _ASIDE ** ((place + 0.5) / len(found) - 0.5)
        _draw_curve(axes, curve, styles[curve.arm], aside)
    axes.set_xscale("log")
    axes.set_yscale("log")
    height = min(_RANGE_HEIGHT, _RANGES_HEIGHT / (len(found) + 1))
    _make_room_below(axes, height * (len(found) + 1))
    for place, curve in enumerate(reversed(found), start=1):
        _draw_range(axes, curve, height * place, styles[curve.arm])
    _label_rates(axes, found)
    _label_errors(axes)
    plain_axes(axes, "both")
    axes.set_ylabel(f"validation error\n({heading(found[0].metric)})", fontsize=9)


def _draw_curve(axes: Any, curve: Curve, style: Style, aside: float) -> None:
    """Draw the geometric mean over seeds with one standard error; rates with diverged runs have hollow markers.

    All rates are multiplied by `aside`, so that the error bars of several arms are not on each other.
    """
    factor = unit_of(curve.metric).factor
    rates = [aside * point.lr for point in curve.points]
    errors = [factor * point.error for point in curve.points]
    deviations = [point.log_standard_error for point in curve.points]  # NaN draws no bar
    below = [-error * math.expm1(-deviation) for error, deviation in zip(errors, deviations, strict=True)]
    above = [error * math.expm1(deviation) for error, deviation in zip(errors, deviations, strict=True)]
    look = {"color": style.colour, "marker": style.marker, "markersize": 4.5}
    axes.errorbar(rates, errors, yerr=[below, above], capsize=2, linewidth=1.2, zorder=3, **look)
    diverged = [place for place, point in enumerate(curve.points) if point.diverged]
    hollow = {**look, "linestyle": "", "markerfacecolor": "white"}
    axes.plot([rates[place] for place in diverged], [errors[place] for place in diverged], zorder=4, **hollow)


def _make_room_below(axes: Any, share: float) -> None:
    """Lower the foot of a panel with a log axis, so that a share of the panel is below the curves."""
    low, high = map(math.log, axes.get_ylim())
    axes.set_ylim(math.exp(low - (high - low) * share / (1 - share)), math.exp(high))


def _draw_range(axes: Any, curve: Curve, height: float, style: Style) -> None:
    """Draw the range of rates within 5 % at a height, a share of the panel, with an arrow where it may go on."""
    span = rate_range(curve)
    where = axes.get_xaxis_transform()
    axes.plot([span.low, span.high], [height, height], color=style.colour, linewidth=3, transform=where, zorder=2)
    for end, is_open, marker in ((span.low, span.open_below, "<"), (span.high, span.open_above, ">")):
        if is_open:
            axes.plot(end, height, marker, color=style.colour, markersize=6, transform=where, zorder=3)


def _label_rates(axes: Any, found: Sequence[Curve]) -> None:
    """Label the rates that were tried; every second one where there are many."""
    from matplotlib.ticker import NullLocator

    rates = sorted({point.lr for curve in found for point in curve.points})
    shown = rates[:: math.ceil(len(rates) / 6)]
    axes.set_xticks(shown, [f"{rate:.3g}" for rate in shown], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())


def _label_errors(axes: Any) -> None:
    """Label the log axis of errors with plain numbers, also where it spans less than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=8)
