"""Pictures of what the callback logged over training: curves by layer, and a map of the ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.plots.style import (
    MARKERS,
    MAX_LEGEND,
    MAX_NAMES,
    PathLike,
    depth_colours,
    explain_colours,
    new_figure,
    plain,
    save,
    spread,
    styled,
)

if TYPE_CHECKING:
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
        path: where to save the picture, in the format of the file's ending.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no alpha.
    """
    return _plot_curves(history, history.alpha, path, title, "power-law exponent alpha")


@styled
def plot_ratio_curves(history: History, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw each layer's learning-rate ratio over training; 1 is the rate the scheduler asks for.

    Args:
        history: what `read_history` returned.
        path: where to save the picture, in the format of the file's ending.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no ratio.
    """
    return _plot_curves(history, history.ratio, path, title, RATIO, reference=1.0)


@styled
def plot_ratio_map(history: History, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw the learning-rate ratios as a map, a row for each layer and a column for each measurement.

    The colours are logarithmic and meet at ratio 1: half and twice the scheduler's rate are equally strong. Grey
    marks a layer without a ratio at that time.

    Args:
        history: what `read_history` returned.
        path: where to save the picture, in the format of the file's ending.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no ratio.
    """
    from matplotlib.colors import LogNorm

    _check_any(history.ratio)
    names, when, table = _as_table(history)
    widest = _widest_ratio(table)
    limit = min(widest, WIDEST_RATIO)
    figure = new_figure(7.5, 1.2 + min(0.19 * len(names), 8.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    axes.grid(False)
    image = axes.imshow(
        np.ma.masked_invalid(table).clip(1 / limit, limit),
        norm=LogNorm(1 / limit, limit),
        cmap=DIVERGING,
        aspect="auto",
        interpolation="nearest",
    )
    shown = spread(len(names), MAX_NAMES)
    axes.set_yticks(shown, [plain(names[index]) for index in shown], fontsize="x-small")
    shown = spread(len(when), 12)
    axes.set_xticks(shown, [f"{when[index]:.12g}" for index in shown])
    axes.set_xlabel("optimizer steps" if history.by_step else "completed epochs")
    axes.set_ylabel("layer, by depth")
    axes.set_title(title)
    ticks = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    extend = "both" if widest > WIDEST_RATIO or (table <= 0).any() else "neither"
    bar = figure.colorbar(image, ax=axes, label=RATIO, extend=extend, pad=0.02)
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    return save(figure, path)


def _widest_ratio(table: NDArray[np.float64]) -> float:
    """Return the largest factor between a ratio and 1, either way; at least 1.05, so that there is a scale."""
    positive = table[np.isfinite(table) & (table > 0)]
    return float(max([1.05, *positive, *(1 / positive)]))


def _plot_curves(
    history: History,
    curves: Mapping[str, Curve],
    path: PathLike | None,
    title: str,
    label: str,
    reference: float | None = None,
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    _check_any(curves)
    few = len(curves) <= MAX_LEGEND
    colours = depth_colours(history.layers or tuple(curves))
    figure = new_figure(9.0 if few else 8.0, 4.8)
    axes = figure.add_subplot()
    if reference is not None:
        axes.axhline(reference, color="0.6", linewidth=1.0, linestyle="--", zorder=1)
    for index, (name, curve) in enumerate(curves.items()):
        x = curve.steps if history.by_step else curve.epochs
        every = max(1, len(x) // 8)
        axes.plot(
            x,
            curve.values,
            color=colours[name],
            marker=MARKERS[index % len(MARKERS)] if few else "o" if len(x) < 3 else "",
            # Layers have their markers at different epochs, so that they do not hide one another.
            markevery=(index % every, every),
            label=plain(name),
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer steps" if history.by_step else "completed epochs")
    axes.set_ylabel(label)
    axes.set_title(title)
    explain_colours(figure, axes, {name: colours[name] for name in curves})
    return save(figure, path)


def _check_any(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise ValueError(
            "the history holds no farms/ measurement: train with FARMSTempBalance(log=True) and a logger"
        )


def _as_table(history: History) -> tuple[list[str], list[float], NDArray[np.float64]]:
    """Return the layers, when they were measured, and their ratios `(layers, measurements)`, NaN for none."""
    names = list(history.ratio)
    points = {
        name: dict(zip(curve.steps if history.by_step else curve.epochs, curve.values, strict=True))
        for name, curve in history.ratio.items()
    }
    when = sorted(set().union(*points.values()))
    return names, when, np.array([[points[name].get(x, math.nan) for x in when] for name in names])
