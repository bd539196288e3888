"""Pictures of what the callback logged over training: curves by layer, and a map of the ratios.

All are drawn from a `History`, which `read_history` reads from the `metrics.csv` of Lightning's CSVLogger. The
horizontal axis is in completed epochs, or in optimizer steps where an epoch holds several measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.plots.style import (
    FAINT,
    MARKERS,
    MAX_LEGEND,
    PathLike,
    depth_colours,
    explain_colours,
    heading,
    name_ticks,
    new_figure,
    plain,
    save,
    spread,
    styled,
    time_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

RATIO = "learning rate / scheduler's learning rate"

DIVERGING = "PuOr_r"
"""Violet below the scheduler's rate, orange above it: told apart with any kind of colour vision."""

WIDEST_RATIO = 10.0
"""Ratios beyond this factor, either way, share the last colour of the map; a ratio may be 0."""


@styled
def plot_alpha_curves(history: History, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw each layer's alpha over training; smaller means a heavier tail.

    Args:
        history: what `read_history` returned.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no alpha.
    """
    figure, axes = _draw_curves(history, history.alpha)
    axes.set_ylabel("power-law exponent alpha")
    axes.set_title(heading(title))
    return save(figure, path)


@styled
def plot_ratio_curves(history: History, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw each layer's learning-rate ratio over training; 1 is the rate the scheduler asks for.

    Args:
        history: what `read_history` returned.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no ratio.
    """
    figure, axes = _draw_curves(history, history.ratio)
    axes.axhline(1.0, color=FAINT, linewidth=1.0, linestyle="--", zorder=1)
    axes.set_ylabel(RATIO)
    axes.set_title(heading(title))
    return save(figure, path)


@styled
def plot_ratio_map(history: History, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw the learning-rate ratios as a map, a row for each layer and a column for each measurement.

    The colours are logarithmic and meet at ratio 1: half and twice the scheduler's rate are equally strong. Grey
    marks a layer without a ratio at that time.

    Args:
        history: what `read_history` returned.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no ratio.
    """
    _check_any(history.ratio)
    table = _ratio_table(history)
    figure = new_figure(7.5, 1.2 + min(0.19 * len(table.names), 8.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    axes.grid(False)
    limit = min(table.widest, WIDEST_RATIO)
    image = _draw_map(axes, table, limit)
    axes.set_yticks(**name_ticks(table.names))
    shown = spread(len(table.when), 12)
    axes.set_xticks(shown, [f"{table.when[index]:.12g}" for index in shown])
    axes.set_xlabel(time_label(history.by_step))
    axes.set_ylabel("layer, by depth")
    axes.set_title(heading(title))
    extend: Any = "both" if table.exceeds(WIDEST_RATIO) else "neither"
    bar = figure.colorbar(image, ax=axes, label=RATIO, extend=extend, pad=0.02)
    ticks = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    return save(figure, path)


@dataclass(frozen=True)
class _RatioTable:
    """The learning-rate ratios of a history as one array.

    Attributes:
        names: names of the layers, one for each row.
        when: time of each measurement in steps or epochs, one for each column, ascending.
        ratios: the ratios `(layers, measurements)`; NaN where a layer has none at that time.
    """

    names: list[str]
    when: list[float]
    ratios: NDArray[np.float64]

    @property
    def widest(self) -> float:
        """The largest factor between a ratio and 1, either way; at least 1.05, so that there is a scale."""
        positive = self.ratios[np.isfinite(self.ratios) & (self.ratios > 0)]
        return float(max([1.05, *positive, *(1 / positive)]))

    def exceeds(self, factor: float) -> bool:
        """Whether some ratio is further from 1 than by this factor; a ratio of 0 is, by any factor."""
        return self.widest > factor or bool((self.ratios <= 0).any())


def _ratio_table(history: History) -> _RatioTable:
    """Return the ratios of all layers at all times that any layer was measured at."""
    points = {name: _by_time(history, curve) for name, curve in history.ratio.items()}
    when = sorted(set().union(*points.values()))
    ratios = np.full((len(points), len(when)), math.nan)
    for row, found in enumerate(points.values()):
        for column, time in enumerate(when):
            ratios[row, column] = found.get(time, math.nan)
    return _RatioTable(list(points), when, ratios)


def _by_time(history: History, curve: Curve) -> dict[float, float]:
    """Return a curve's values by the time that the pictures of its run show."""
    times = curve.times(history.by_step)
    return dict(zip(times, curve.values, strict=True))


def _draw_map(axes: Axes, table: _RatioTable, limit: float) -> AxesImage:
    """Draw the ratios as coloured cells, from 1 / limit to limit; cells without a ratio stay transparent."""
    from matplotlib.colors import LogNorm

    return axes.imshow(
        np.ma.masked_invalid(table.ratios).clip(1 / limit, limit),
        norm=LogNorm(1 / limit, limit),
        cmap=DIVERGING,
        aspect="auto",
        interpolation="nearest",
    )


def _draw_curves(history: History, curves: Mapping[str, Curve]) -> tuple[Figure, Axes]:
    """Draw one line for each layer, and explain their colours.

    Args:
        history: the run, for the depth of its layers and the kind of time.
        curves: what to draw, alphas or ratios, by layer.

    Returns:
        The figure and its axes, which have no label of values yet.

    Raises:
        ValueError: there are no curves.
    """
    from matplotlib.ticker import MaxNLocator

    _check_any(curves)
    with_legend = len(curves) <= MAX_LEGEND
    colours = depth_colours(history.layers or tuple(curves))
    figure = new_figure(9.0 if with_legend else 8.0, 4.8)
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        times = curve.times(history.by_step)
        markers = _markers(index, len(times)) if with_legend else _marker_of_short(len(times))
        axes.plot(times, curve.values, color=colours[name], label=plain(name), **markers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(time_label(history.by_step))
    explain_colours(figure, axes, {name: colours[name] for name in curves})
    return figure, axes


def _markers(index: int, points: int) -> dict[str, Any]:
    """Return the markers of one of a few curves, as arguments of `Axes.plot`.

    Each layer has a shape of its own, at about eight of its points. Layers begin at different ones, so that their
    markers do not hide one another.
    """
    every = max(1, points // 8)
    return {"marker": MARKERS[index % len(MARKERS)], "markevery": (index % every, every)}


def _marker_of_short(points: int) -> dict[str, Any]:
    """Return dots for curves of one or two points, of which a line alone would show little or nothing."""
    return {"marker": "o" if points < 3 else ""}


def _check_any(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise ValueError(
            "the history holds no farms/ measurement: train with FARMSTempBalance(log=True) and a logger"
        )
