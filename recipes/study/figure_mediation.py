"""Effects over the mean ratio and over the spread of the ratios, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farms_tb.viewing.plots.style import new_figure
from recipes.study.figure_style import Style, add_legend, plain_axes, save
from recipes.study.mediation import Mediation
from recipes.study.units import percent

__all__ = ["draw_mediation"]

_LABELS = {"mean_ratio": "mean learning-rate ratio", "ratio_sd": "standard deviation of the ratios over layers"}


def draw_mediation(rows: Sequence[Mediation], baseline: str, styles: Mapping[str, Style], path: Path) -> None:
    """Draw a line of two panels for each cell: effect over mean ratio, and over the spread of the ratios.

    Args:
        rows: What each arm did. The baseline is drawn as no effect.
        baseline: The arm that the others are compared with.
        styles: How arms are drawn.
        path: Where the figure goes.
    """
    shown = [row for row in rows if row.effect is not None or row.arm == baseline]
    cells = list(dict.fromkeys(row.cell for row in shown))
    figure = new_figure(8.0, 1.2 + 2.8 * len(cells))
    panels = figure.subplots(len(cells), 2, sharex="col", sharey="row", squeeze=False)
    for cell, (left, right) in zip(cells, panels, strict=True):
        members = [row for row in shown if row.cell == cell]
        for axes, field in ((left, "mean_ratio"), (right, "ratio_sd")):
            axes.axhline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
            for row in members:
                _draw_arm(axes, getattr(row, field), row, styles[row.arm])
            plain_axes(axes, "both")
        left.set_title(cell, fontsize=10, loc="left")
        left.set_ylabel(f"test error against {baseline}, %", fontsize=10)
    for axes, label in zip(panels[-1], _LABELS.values(), strict=True):
        axes.set_xlabel(label, fontsize=10)
    add_legend(figure, {row.arm: styles[row.arm] for row in shown}, "")
    save(figure, path)


def _draw_arm(axes: Any, x: float, row: Mediation, style: Style) -> None:
    """Draw the change of an arm with its interval, where there is one."""
    centre, to_ends = 0.0, None
    if row.effect is not None:
        centre = percent(row.effect.mean)
        if not math.isnan(row.effect.low):
            to_ends = [[centre - percent(row.effect.low)], [percent(row.effect.high) - centre]]
    axes.errorbar(x, centre, yerr=to_ends, fmt=style.marker, color=style.colour, markersize=6, capsize=2.5)
