"""A study's effects as figures: every arm's change of the error with its interval, by rule and over the ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farms_tb.viewing.plots.style import new_figure
from recipes.study.effects import POOLED, Row
from recipes.study.figure_style import Style, add_legend, plain_axes, save
from recipes.study.mediation import Mediation
from recipes.study.rules import RULES, RuleRow
from recipes.study.statistics import Effect, TaskEffect
from recipes.study.units import percent

__all__ = ["draw_effects", "draw_mediation", "draw_rules"]

TASKS = "tasks like these"
_GAP = 0.8  # between the groups, in heights of a row
_RATIOS = {"mean_ratio": "mean learning-rate ratio", "ratio_sd": "standard deviation of the ratios over layers"}


@dataclass(frozen=True)
class _Bar:
    """One row of a panel.

    Attributes:
        group: The cell, or what else its rows have in common; it is written next to them.
        arm: The arm.
        interval: Mean log ratio and the ends of its interval; None leaves the row empty.
    """

    group: str
    arm: str
    interval: Effect | TaskEffect | None


def draw_effects(rows: Sequence[Row], baseline: str, styles: Mapping[str, Style], path: Path) -> None:
    """Draw every arm's change with its interval, cell by cell, those over all cells lowest.

    Two cells are too few for a sample of tasks: their intervals would set the scale of the figure.
    """
    bars = [_Bar(row.cell, row.arm, row.effect) for row in rows if row.effect is not None]
    bars += [_Bar(TASKS, row.arm, row.over_tasks) for row in rows if row.over_tasks and row.over_tasks.cells > 2]
    figure = new_figure(7.5, _height(bars))
    _draw_bars(figure.add_subplot(), bars, styles)
    _finish(figure, bars, baseline, styles)
    save(figure, path)


def draw_rules(rows: Sequence[RuleRow], baseline: str, styles: Mapping[str, Style], path: Path) -> None:
    """Draw every arm's change by each rule, one panel a rule."""
    panels = {rule: [_Bar(row.cell, row.arm, row.effects[rule]) for row in rows] for rule in RULES}
    figure = new_figure(10, _height(panels["last"]))
    every_axes = figure.subplots(1, len(RULES), sharex=True, sharey=True)
    for (rule, bars), axes in zip(panels.items(), every_axes, strict=True):
        _draw_bars(axes, bars, styles)
        axes.set_title(RULES[rule], fontsize=10)
    _finish(figure, panels["last"], baseline, styles)
    save(figure, path)


def _height(bars: Sequence[_Bar]) -> float:
    """Return the height of a figure with some rows, in inches."""
    if _single(bars):
        return 1.3 + 0.25 * len(bars)
    groups = {bar.group for bar in bars}
    return 1.3 + 0.17 * len(bars) + 0.25 * len(groups)


def _single(bars: Sequence[_Bar]) -> bool:
    """Return whether all rows are of one cell, whose arms can be named next to their rows."""
    return len({bar.group for bar in bars}) == 1


def _finish(figure: Any, bars: Sequence[_Bar], baseline: str, styles: Mapping[str, Style]) -> None:
    """Say what is drawn; name the cell where there is one, as the rows name the arms then, else the arms."""
    label = f"change of the test error against {baseline}, % (95% interval, paired by seed); left is better"
    figure.supxlabel(label, fontsize=10)
    if _single(bars):
        figure.suptitle(bars[0].group, fontsize=10)
    else:
        add_legend(figure, {bar.arm: styles[bar.arm] for bar in bars}, "-")


def _draw_bars(axes: Any, bars: Sequence[_Bar], styles: Mapping[str, Style]) -> None:
    """Draw the rows of a panel downwards, with a gap between the groups and grey behind those over all cells.

    The groups are the cells, or the arms where there is one cell.
    """
    bars = [replace(bar, group=bar.arm) for bar in bars] if _single(bars) else bars
    gap = _GAP if len({bar.group for bar in bars}) < len(bars) else 0.0  # groups of one row need none
    top = 0.0  # of the next group; rows have height 1
    middles = []
    names = list(dict.fromkeys(bar.group for bar in bars))
    for name in names:
        members = [bar for bar in bars if bar.group == name]
        for place, bar in enumerate(members):
            _draw_bar(axes, top + place, bar, styles[bar.arm])
        middles.append(top + (len(members) - 1) / 2)
        if name in (POOLED, TASKS):
            axes.axhspan(top - 0.9, top + len(members) - 0.1, color="0.95", zorder=0)
        top += len(members) + gap
    axes.set_yticks(middles, names)
    axes.set_ylim(top - gap - 0.2, -0.8)
    axes.axvline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
    plain_axes(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _draw_bar(axes: Any, y: float, bar: _Bar, style: Style) -> None:
    """Draw the mean and, where there is one, the interval of a row, in per cent; means over tasks are hollow."""
    if bar.interval is None:
        return
    axes.errorbar(
        percent(bar.interval.mean),
        y,
        xerr=_to_ends(bar.interval),
        fmt=style.marker,
        markersize=5,
        markerfacecolor="white" if bar.group == TASKS else style.colour,
        capsize=2.5,
        color=style.colour,
    )


def _to_ends(interval: Effect | TaskEffect) -> list[list[float]] | None:
    """Return how far the ends of an interval are from the mean, in per cent; None without an interval."""
    if math.isnan(interval.low):
        return None
    centre = percent(interval.mean)
    return [[centre - percent(interval.low)], [percent(interval.high) - centre]]


def draw_mediation(rows: Sequence[Mediation], baseline: str, styles: Mapping[str, Style], path: Path) -> None:
    """Draw a line of two panels for each cell: effect over mean ratio, and over the spread of the ratios.

    The baseline is drawn as no effect.
    """
    shown = [row for row in rows if row.effect is not None or row.arm == baseline]
    cells = list(dict.fromkeys(row.cell for row in shown))
    figure = new_figure(8.0, 1.2 + 2.8 * len(cells))
    panels = figure.subplots(len(cells), 2, sharex="col", sharey="row", squeeze=False)
    for cell, (left, right) in zip(cells, panels, strict=True):
        members = [row for row in shown if row.cell == cell]
        for axes, field in zip((left, right), _RATIOS, strict=True):
            axes.axhline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
            for row in members:
                _draw_change(axes, getattr(row, field), row.effect, styles[row.arm])
            plain_axes(axes, "both")
        left.set_title(cell, fontsize=10, loc="left")
        left.set_ylabel(f"test error against {baseline}, %", fontsize=10)
    for axes, label in zip(panels[-1], _RATIOS.values(), strict=True):
        axes.set_xlabel(label, fontsize=10)
    add_legend(figure, {row.arm: styles[row.arm] for row in shown}, "")
    save(figure, path)


def _draw_change(axes: Any, x: float, effect: Effect | None, style: Style) -> None:
    """Draw the change of an arm with its interval, where there is one; no change where there is no effect."""
    centre, to_ends = 0.0, None
    if effect is not None:
        centre, to_ends = percent(effect.mean), _to_ends(effect)
    axes.errorbar(x, centre, yerr=to_ends, fmt=style.marker, color=style.colour, markersize=6, capsize=2.5)
