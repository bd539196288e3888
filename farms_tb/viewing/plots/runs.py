"""Pictures that compare runs: one colour, marker and kind of line for each run, the same in every picture.

All take the runs by name, as `farms_tb.viewing.several_runs.read_runs` returns them. Layers and metrics that only
some runs have are left out: a difference between two lines comes from the runs, not from which layers they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from farms_tb.report import LayerRecord
from farms_tb.viewing.history import Curve
from farms_tb.viewing.plots.style import (
    FAINT,
    MARKERS,
    PathLike,
    depth_axes,
    heading,
    new_figure,
    plain_names,
    save,
    spread,
    styled,
    time_label,
)
from farms_tb.viewing.run_folder import RunFolder
from farms_tb.viewing.several_runs import in_every_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, RunFolder]
"""Runs by the name that the legend shows."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "0.25")
"""Of Okabe and Ito, for any kind of colour vision; without their yellow, which is lost on white."""

LINES = ("-", "--", ":", "-.")

MAX_RUNS = len(COLOURS) * len(LINES)
"""No more runs than this can be told apart in one picture."""

MAX_PANELS = 20
"""Of more layers or metrics than this, so many are shown."""

WIDE = 100.0
"""Positive metrics that span a larger factor are drawn on a logarithmic axis."""

Quantity = Literal["alpha", "effect"]
"""What is drawn by depth."""

_LABELS: dict[Quantity, str] = {
    "alpha": "power-law exponent alpha",
    "effect": "effect: alpha minus that of shuffled entries",
}


@styled
def plot_mean_alpha(runs: Runs, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw the mean alpha of each run over training.

    It is the mean over the layers that all runs have, or, where they have none in common, over those of each run.

    Args:
        runs: the runs by name; those without logged alphas are left out.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has logged alphas, or there are more than 28 runs.
    """
    figure = _plot_over_layers(runs, alphas_of(runs), fmean, "mean alpha of the layers")
    figure.axes[0].set_title(heading(title))
    return save(figure, path)


@styled
def plot_ratio_spread(runs: Runs, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw the standard deviation of each run's learning-rate ratios between layers, over training.

    It is 0 where all layers have the scheduler's learning rate. As for the mean alpha, the layers are those that
    all runs have.

    Args:
        runs: the runs by name; those without logged ratios are left out.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has logged ratios, or there are more than 28 runs.
    """
    figure = _plot_over_layers(runs, ratios_of(runs), pstdev, "standard deviation of the learning-rate ratios")
    (axes,) = figure.axes
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.04 * top, top)  # so that markers at 0 are whole
    axes.set_title(heading(title))
    return save(figure, path)


@styled
def plot_alpha_by_layer(runs: Runs, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw the alphas of each layer that all runs have over training, a panel a layer, all on one scale.

    Args:
        runs: the runs by name; those without logged alphas are left out.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure; of more than 20 layers it shows 20, evenly spread over the depth.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has logged alphas, they have no layer in common, or there are more than 28 runs.
    """
    label = _LABELS["alpha"]
    figure = _plot_panels(
        runs, alphas_of(runs), label, title, called="layers", by_step=_by_step(runs), one_scale=True
    )
    return save(figure, path)


@styled
def plot_metrics(runs: Runs, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw what else all runs have logged, losses and scores, against optimizer steps, a panel each.

    Args:
        runs: the runs by name; those that logged nothing else are left out.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure; of more than 20 metrics it shows 20.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the runs have no such metric in common, or there are more than 28 runs.
    """
    label = "logged values"
    figure = _plot_panels(runs, logged_by(runs), label, title, called="metrics", by_step=True, one_scale=False)
    return save(figure, path)


@styled
def plot_runs_by_depth(
    runs: Runs, path: PathLike | None = None, *, quantity: Quantity = "alpha", title: str = ""
) -> Figure:
    """Draw alpha, or the effect, of the weights of several runs or files against depth, with standard errors.

    Args:
        runs: the runs by name; those without measured weights are left out.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        quantity: `"alpha"`, or `"effect"`, alpha minus that of the same entries in random order: 0 for a random
            layer. It needs permutation nulls, `read_runs(paths, null=True)`.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure, of the layers that all runs have.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or there are more than 28 runs.
    """
    looks = run_looks(list(runs))
    found = records_with(runs, quantity)
    names = _checked_common(found)
    figure, axes = depth_axes(names, _legend_height(found))
    for place, (run, records) in enumerate(found.items()):
        # Side by side, so that one run's error bars do not hide another's.
        shift = 0.5 * ((place + 0.5) / len(found) - 0.5)
        places = [index + shift for index in range(len(names))]
        values = [getattr(records[name], quantity) for name in names]
        errors = [getattr(records[name], f"{quantity}_error") or 0.0 for name in names]
        axes.errorbar(places, values, errors, linewidth=0.8, elinewidth=1.0, capsize=1.5, **looks[run])
    if quantity == "effect":
        axes.axhline(0.0, color=FAINT, linewidth=1.0, linestyle="--", zorder=1)
    axes.set_ylabel(_LABELS[quantity])
    axes.set_title(heading(title))
    _explain_runs(figure)
    return save(figure, path)


def alphas_of(runs: Runs) -> dict[str, Mapping[str, Curve]]:
    """Return the logged alphas by run and layer, of the runs that have any."""
    return {name: run.history.alpha for name, run in runs.items() if run.history.alpha}


def ratios_of(runs: Runs) -> dict[str, Mapping[str, Curve]]:
    """Return the logged learning-rate ratios by run and layer, of the runs that have any."""
    return {name: run.history.ratio for name, run in runs.items() if run.history.ratio}


def logged_by(runs: Runs) -> dict[str, Mapping[str, Curve]]:
    """Return what else was logged by run and metric, of the runs that have any."""
    return {name: run.logged for name, run in runs.items() if run.logged}


def records_with(runs: Runs, quantity: Quantity) -> dict[str, dict[str, LayerRecord]]:
    """Return the records of layers that have a metric by run and layer, of the runs that have any."""
    found = {}
    for name, run in runs.items():
        layers = {} if run.farms is None else run.farms.layers
        measured = {layer: record for layer, record in layers.items() if getattr(record, quantity) is not None}
        if measured:
            found[name] = measured
    return found


def check_number_of_runs(runs: int) -> None:
    """Raise a ValueError where there are more runs than can be told apart."""
    if runs > MAX_RUNS:
        raise ValueError(f"at most {MAX_RUNS} runs can be told apart in one picture, got {runs}")


def run_looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker, kind of line and label of each run, as arguments of `Axes.plot`.

    Args:
        names: names of all runs, those that are not drawn included: a run looks the same in every picture.

    Raises:
        ValueError: there are more runs than can be told apart.
    """
    check_number_of_runs(len(names))
    return {
        name: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            # Hollow: where runs coincide, as they do at the start, all their markers are seen.
            "markerfacecolor": "none",
            "markersize": 5.0,
            "linestyle": LINES[index // len(COLOURS)],
            "label": label,
        }
        for index, (name, label) in enumerate(zip(names, plain_names(names), strict=True))
    }


def _plot_over_layers(
    runs: Runs,
    curves: Mapping[str, Mapping[str, Curve]],
    summarise: Callable[[Sequence[float]], float],
    label: str,
) -> Figure:
    """Draw one line for each run: at each time, what `summarise` makes of its layers' values."""
    if not curves:
        raise ValueError(f"no run has logged what to draw: {label}")
    looks = run_looks(list(runs))
    common = in_every_run(curves)
    by_step = _by_step(runs)
    figure = new_figure(6.5, 3.9 + _legend_height(curves))
    axes = figure.add_subplot()
    for run, by_layer in curves.items():
        line = over_layers([by_layer[layer] for layer in common or by_layer], summarise)
        _draw_line(axes, line, by_step, looks[run])
    _set_time_axis(axes, by_step)
    axes.set_xlabel(time_label(by_step))
    axes.set_ylabel(label)
    _explain_runs(figure)
    return figure


def over_layers(curves: Sequence[Curve], summarise: Callable[[Sequence[float]], float]) -> Curve:
    """Return a summary of several layers' curves at each time that any of them has a value.

    Args:
        curves: of one run, at least one.
        summarise: returns the summary of the values of one time, those of the layers that have one.

    Example:
        >>> over_layers([Curve((0.0, 1.0), (0, 5), (2.0, 3.0)), Curve((1.0,), (5,), (4.0,))], fmean)
        Curve(epochs=(0.0, 1.0), steps=(0, 5), values=(2.0, 3.5))
    """
    values: dict[int, list[float]] = {}
    epochs: dict[int, float] = {}
    for curve in curves:
        for epoch, step, value in zip(*curve, strict=True):
            values.setdefault(step, []).append(value)
            epochs[step] = epoch
    steps = sorted(values)
    return Curve(
        epochs=tuple(epochs[step] for step in steps),
        steps=tuple(steps),
        values=tuple(summarise(values[step]) for step in steps),
    )


def _plot_panels(
    runs: Runs,
    curves: Mapping[str, Mapping[str, Curve]],
    label: str,
    title: str,
    *,
    called: str,
    by_step: bool,
    one_scale: bool,
) -> Figure:
    """Draw a panel for each name that all runs have, with one line for each run.

    Args:
        runs: all runs by name.
        curves: what to draw, by run and name.
        label: of the vertical axes.
        title: a heading for all panels.
        called: what a panel stands for, in the plural.
        by_step: whether the horizontal axes are in optimizer steps, instead of completed epochs.
        one_scale: whether the vertical axes are the same, instead of each fitting its panel.
    """
    looks = run_looks(list(runs))
    names = _checked_common(curves)
    shown = [names[index] for index in spread(len(names), MAX_PANELS)]
    columns = min(4, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(max(4.5, 2.3 * columns + 0.4), 1.8 * rows + 0.6 + _legend_height(curves))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=one_scale).flat
    titles = plain_names(shown, 32)
    for place, (axes, name) in enumerate(zip(grid, shown, strict=False)):
        for run, by_name in curves.items():
            _draw_line(axes, by_name[name], by_step, looks[run])
        axes.set_title(titles[place], fontsize=7)
        axes.tick_params(labelsize=6, labelbottom=True)
        _set_time_axis(axes, by_step)
        if not one_scale:
            _set_log_scale(axes, [by_name[name] for by_name in curves.values()])
        if place + columns >= len(shown):
            axes.set_xlabel(time_label(by_step), fontsize=7)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    left_out = f" ({len(shown)} of {len(names)} {called})" if len(shown) < len(names) else ""
    figure.supylabel(label + left_out, fontsize=9)
    figure.suptitle(heading(title), x=0.01, ha="left", fontsize=10)
    _explain_runs(figure)
    return figure


def _set_log_scale(axes: Axes, curves: Sequence[Curve]) -> None:
    """Make the vertical axis logarithmic where all values are positive and they span more than two decades."""
    values = [value for curve in curves for value in curve.values]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.minorticks_off()


def _draw_line(axes: Axes, curve: Curve, by_step: bool, look: Mapping[str, Any]) -> None:
    """Draw one run's curve, with its marker at about six points."""
    times = curve.times(by_step)
    axes.plot(times, curve.values, markevery=max(1, len(times) // 6), **look)


def _checked_common(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names that all runs have; raise a ValueError where there are none."""
    names = in_every_run(values)
    if not names:
        raise ValueError("nothing to draw: there is no layer or metric that all runs have")
    return names


def _by_step(runs: Runs) -> bool:
    """Return whether some run measured more than once an epoch: only steps tell its measurements apart."""
    return any(run.history.by_step for run in runs.values())


def _set_time_axis(axes: Axes, by_step: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    most = 4 if by_step else 8
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _legend_columns(names: Sequence[str]) -> int:
    """Return the number of columns of a legend: the longer the names, the fewer."""
    longest = max(map(len, plain_names(names)))
    return max(1, min(len(names), 4, 72 // (longest + 8)))


def _legend_height(runs: Mapping[str, object]) -> float:
    """Return the height of the legend below the axes, in inches."""
    return 0.17 * math.ceil(len(runs) / _legend_columns(list(runs))) if runs else 0.0


def _explain_runs(figure: Figure) -> None:
    """Put one legend for all panels below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # Kinds of line, which tell more runs apart than there are colours, are seen on long lines alone.
    length = 4.5 if len(labels) > len(COLOURS) else 2.0
    columns = _legend_columns(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=length)
