"""Pictures of what the callback logged over training: curves by layer, and a map of the ratios.

All are drawn from a `History`, which `read_history` reads from the `metrics.csv` of Lightning's CSVLogger. The
horizontal axis is in completed epochs, or in optimizer steps where an epoch holds several measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    plain_names,
    save,
    spread,
    styled,
    time_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    from matplotlib.colors import LogNorm

    _check_any(history.ratio)
    when, ratios = _ratio_table(history)
    # Of few layers higher than their names need: the label of the colours is long.
    figure = new_figure(7.5, 1.2 + min(max(0.19 * len(ratios), 2.2), 8.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    axes.grid(False)
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    widest = float(max([1.05, *positive, *(1 / positive)]))  # At least 1.05, so that there is a scale.
    limit = min(widest, WIDEST_RATIO)
    image = axes.imshow(
        np.ma.masked_invalid(ratios).clip(1 / limit, limit),
        norm=LogNorm(1 / limit, limit),
        cmap=DIVERGING,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(**name_ticks(list(history.ratio)))
    shown = spread(len(when), 12)
    times = [f"{when[index]:.12g}" for index in shown]
    axes.set_xticks(shown, times)
    if max(map(len, times)) > 3:  # too long to stand side by side
        axes.tick_params("x", rotation=45)
    axes.set_xlabel(time_label(history.by_step))
    axes.set_ylabel("layer, by depth")
    axes.set_title(heading(title))
    beyond = widest > WIDEST_RATIO or (ratios <= 0).any()
    extend: Any = "both" if beyond else "neither"
    bar = figure.colorbar(image, ax=axes, label=RATIO, extend=extend, pad=0.02)
    ticks = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    return save(figure, path)


def _ratio_table(history: History) -> tuple[list[float], NDArray[np.float64]]:
    """Return all times that any layer was measured at, n of them, and the ratios `(layers, n)`, NaN for none."""
    by_time = [
        dict(zip(curve.times(history.by_step), curve.values, strict=True)) for curve in history.ratio.values()
    ]
    when = sorted(set().union(*by_time))
    return when, np.array([[found.get(time, math.nan) for time in when] for found in by_time])


def _draw_curves(history: History, curves: Mapping[str, Curve]) -> tuple[Figure, Axes]:
    """Draw one line for each layer, and explain their colours; the axes have no label of values yet."""
    from matplotlib.ticker import MaxNLocator

    _check_any(curves)
    with_legend = len(curves) <= MAX_LEGEND
    colours = depth_colours(history.layers or tuple(curves))
    figure = new_figure(9.0 if with_legend else 8.0, 4.8)
    axes = figure.add_subplot()
    labels = plain_names(list(curves))
    for index, (name, curve) in enumerate(curves.items()):
        times = curve.times(history.by_step)
        # Of one or two points a line alone would show little or nothing.
        dots = {"marker": "o" if len(times) < 3 else ""}
        markers = _markers(index, len(times)) if with_legend else dots
        axes.plot(times, curve.values, color=colours[name], label=labels[index], **markers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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


def _check_any(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise ValueError(
            "the history holds no farms/ measurement: train with FARMSTempBalance(log=True) and a logger"
        )
