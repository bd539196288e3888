"""A study's findings as a figure: every arm's change of the error with its interval.

matplotlib is imported where it is used, since the processes that train import this package too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farms_tb.atomic_write import atomic_path
from recipes.study.report import POOLED, Row, percent

__all__ = ["FIGURE_FILE", "draw"]

FIGURE_FILE = "effects.png"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#CC79A7")
_GAP = 0.8  # between the cells, in heights of a row


def draw(rows: Sequence[Row], baseline: str, path: Path) -> None:
    """Draw every arm's change with its interval, cell by cell, the pooled one lowest.

    Args:
        rows: The findings; rows without an effect are left out.
        baseline: The arm that the others are compared with.
        path: Where the figure goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.effect is not None]
    names = list(dict.fromkeys(row.cell for row in shown))
    arms = list(dict.fromkeys(row.arm for row in shown))
    colours = dict(zip(arms, _COLOURS * len(arms), strict=False))
    figure = Figure(figsize=(7.5, 1.3 + 0.17 * len(shown) + 0.25 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = 0.0  # of the next cell; rows have height 1 and go downwards
    middles = []
    for name in names:
        members = [row for row in shown if row.cell == name]
        for place, row in enumerate(members):
            _draw_row(axes, top + place, row, colours[row.arm])
        middles.append(top + (len(members) - 1) / 2)
        if name == POOLED:
            axes.axhspan(top - 0.9, top + len(members) - 0.1, color="0.95", zorder=0)
        top += len(members) + _GAP
    axes.set_yticks(middles, names)
    axes.set_ylim(top - _GAP - 0.2, -0.8)
    _style(axes, baseline)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one an arm
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, len(arms)), frameon=False
    )
    with atomic_path(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])


def _draw_row(axes: Any, y: float, row: Row, colour: str) -> None:
    """Draw the mean and, where there is one, the interval of a row, in per cent; pooled rows get diamonds.

    Args:
        axes: Where to draw.
        y: Height of the row.
        row: A row with an effect.
        colour: Colour of its arm.
    """
    assert row.effect is not None
    centre = percent(row.effect.mean)
    to_ends = None
    if not math.isnan(row.effect.low):
        to_ends = [[centre - percent(row.effect.low)], [percent(row.effect.high) - centre]]
    marker = "o"
    if row.cell == POOLED:
        marker = "D"
    axes.errorbar(
        centre,
        y,
        xerr=to_ends,
        fmt=marker,
        markersize=5,
        capsize=2.5,
        color=colour,
        label=row.arm,
    )


def _style(axes: Any, baseline: str) -> None:
    """Draw the line of no effect and a grid for reading values; leave out what carries no information."""
    axes.axvline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        f"change of the test error against {baseline}, % (95% interval, paired by seed); left is better"
    )
