"""Curves of what the callback logged, from the `metrics.csv` that Lightning's CSVLogger writes.

matplotlib is imported where something is drawn, and without its global state, so that drawing works without a
display.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "History", "plot_alpha_curves", "plot_ratio_curves", "read_history"]

MAX_LEGEND = 24
"""With more layers than this a colour bar takes the legend's place."""

COLOURS = "viridis"

Quantity = Literal["alpha", "ratio", "lr"]
_KEY = re.compile(r"farms/(?P<quantity>alpha|ratio|lr)/(?P<layer>.+)")
_Path = str | os.PathLike[str]
_Colour = tuple[float, float, float, float]


class Curve(NamedTuple):
    """One layer's measurements in the order of training.

    Attributes:
        epochs: completed epochs at each measurement, 0 for the initial weights.
        steps: optimizer steps at each measurement.
        values: what was measured.
    """

    epochs: tuple[float, ...]
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """Every layer's curves, by layer name in order of depth.

    Attributes:
        alpha: power-law exponents.
        ratio: learning-rate ratios.
        lr: learning rates in force.
        layers: all names, in order of depth.
    """

    alpha: Mapping[str, Curve] = field(default_factory=dict)
    ratio: Mapping[str, Curve] = field(default_factory=dict)
    lr: Mapping[str, Curve] = field(default_factory=dict)
    layers: tuple[str, ...] = ()


def read_history(metrics_csv: _Path, layers: Sequence[str] | None = None) -> History:
    """Read the callback's rows out of a `metrics.csv`; other rows, columns and empty cells are passed over.

    Args:
        metrics_csv: the file.
        layers: names of the layers in order of depth, say `list(callback.report.layers)`. The file's columns
            are sorted by name; without this argument layers are ordered by name too, with numbers in names
            counting as numbers.

    Returns:
        The curves. A measurement that a resumed run repeated counts once, the later row of equal epoch and step.

    Raises:
        FileNotFoundError: there is no such file.
    """
    points: dict[str, dict[str, dict[tuple[float, int], float]]] = {"alpha": {}, "ratio": {}, "lr": {}}
    with open(metrics_csv, newline="", encoding="utf-8") as file:  # noqa: PTH123 (also takes any os.PathLike)
        for row in csv.DictReader(file):
            for key, cell in row.items():
                match = _KEY.fullmatch(key or "")
                if match and cell not in ("", None):
                    when = (float(row.get("epoch") or "nan"), int(float(row.get("step") or 0)))
                    points[match["quantity"]].setdefault(match["layer"], {})[when] = float(cell)
    names = _by_depth(set().union(*points.values()), layers or ())
    curves = {quantity: {n: _curve(found[n]) for n in names if n in found} for quantity, found in points.items()}
    return History(**curves, layers=names)


def _by_depth(names: Iterable[str], layers: Sequence[str]) -> tuple[str, ...]:
    """Order `names` as in `layers`; those that are not in it come last, by name."""
    depth = {name: position for position, name in enumerate(layers)}
    return tuple(sorted(names, key=lambda name: (depth.get(name, len(depth)), _natural(name))))


def _curve(points: Mapping[tuple[float, int], float]) -> Curve:
    ordered = sorted(points.items(), key=lambda item: item[0][1])
    return Curve(
        epochs=tuple(epoch for (epoch, _), _ in ordered),
        steps=tuple(step for (_, step), _ in ordered),
        values=tuple(value for _, value in ordered),
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `layer.10` comes after `layer.9`."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def plot_alpha_curves(history: History, path: _Path | None = None, *, title: str = "") -> Figure:
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
    return _plot(history, history.alpha, path, title, "power-law exponent alpha", reference=None)


def plot_ratio_curves(history: History, path: _Path | None = None, *, title: str = "") -> Figure:
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
    return _plot(history, history.ratio, path, title, "learning rate / scheduler's learning rate", reference=1.0)


def _plot(
    history: History,
    curves: Mapping[str, Curve],
    path: _Path | None,
    title: str,
    label: str,
    reference: float | None,
) -> Figure:
    colours = _colours(history.layers or tuple(curves))
    if not curves:
        raise ValueError(
            "the history holds no farms/ measurement: train with FARMSTempBalance(log=True) and a logger"
        )
    figure, axes = _new_figure(wide=len(curves) <= MAX_LEGEND)
    if reference is not None:
        axes.axhline(reference, color="0.6", linewidth=1.0, linestyle="--", zorder=1)
    by_step = _measured_within_epochs(curves.values())
    for name, curve in curves.items():
        x = curve.steps if by_step else curve.epochs
        marker = "o" if len(x) < 3 else ""
        axes.plot(x, curve.values, color=colours[name], linewidth=1.4, marker=marker, markersize=3, label=name)
    axes.set_xlabel("optimizer steps" if by_step else "completed epochs")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize="medium")
    _explain_colours(figure, axes, {name: colours[name] for name in curves})
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


def _measured_within_epochs(curves: Iterable[Curve]) -> bool:
    """Whether one epoch holds several measurements, so that only steps can tell them apart."""
    return any(len(set(curve.epochs)) < len(curve.epochs) for curve in curves)


def _new_figure(wide: bool) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.0 if wide else 8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _colours(layers: Sequence[str]) -> dict[str, _Colour]:
    """Colours of the layers, dark at the input; the palest end of the map, which print loses, is left out."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "farms-tb[plot]"') from error
    last = max(1, len(layers) - 1)
    return {name: colormaps[COLOURS](0.92 * position / last) for position, name in enumerate(layers)}


def _explain_colours(figure: Figure, axes: Axes, colours: Mapping[str, _Colour]) -> None:
    """Put a legend beside the axes, or for many layers a colour bar with some of their names."""
    names = list(colours)
    if len(names) <= MAX_LEGEND:
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize="x-small",
            title="layer, by depth",
        )
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    shown = sorted({round(index * (len(names) - 1) / 7) for index in range(8)})
    mappable = ScalarMappable(norm=NoNorm(), cmap=ListedColormap(list(colours.values())))
    bar = figure.colorbar(mappable, ax=axes, ticks=shown, label="layer, by depth", pad=0.02)
    bar.ax.set_yticklabels([names[index] for index in shown], fontsize="x-small")
    bar.ax.invert_yaxis()
