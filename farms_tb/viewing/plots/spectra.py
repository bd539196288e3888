"""Pictures of the layers' spectra: the histogram of the eigenvalues, the fitted tail, the Marchenko-Pastur law.

They need a report with histograms, `analyze(model, histogram=True)`. Both axes are logarithmic: a power law is a
straight line there, and its slope is -alpha. Spectra of whole matrices with permutation nulls, `analyze(model,
esd="full", histogram=True, null=True)`, also show the spikes and traps beyond the edge of random weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from farms_tb.report import LayerRecord, Outliers, Report
from farms_tb.viewing.densities import (
    Density,
    aspect_of_sample,
    esd_density,
    marchenko_pastur,
    spectrum_marks,
    tail_density,
)
from farms_tb.viewing.plots.style import (
    PathLike,
    depth_colours,
    heading,
    new_figure,
    plain,
    plain_names,
    save,
    spread,
    styled,
)
from farms_tb.weights.names import first_few

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SPECTRA = 20
"""Of more layers than this, `plot_esds` shows so many."""

SHOWN = 1e-4
"""Eigenvalues below this share of the largest are cut off, unless the tail begins there: they hide the rest."""

TAIL, RANDOM, SPIKES, TRAPS = "#D55E00", "0.25", "#0072B2", "#CC79A7"

STRIP = 6.0
"""The vertical axis goes this factor further down where spikes or traps are marked, below the bars."""


@styled
def plot_esd(report: Report, layer: str, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw a layer's empirical spectral density, its fitted tail and the Marchenko-Pastur law on log-log axes.

    The Marchenko-Pastur law is what independent random entries of the same variance would give, and its edge the
    largest eigenvalue that they would have. Below the bars of a whole matrix are marked the spikes, its
    eigenvalues beyond the edge, and the traps, those of its shuffled entries: `num_spikes` and `num_traps`.

    Args:
        report: a measurement with histograms, `analyze(model, histogram=True)`.
        layer: name of the layer.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is; the layer's name where empty.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer of that name has a histogram.
    """
    with_histogram(report, [layer])
    figure = new_figure(5.0, 4.1)
    axes = figure.add_subplot()
    _draw_esd(axes, report, layer)
    axes.set_title(heading(title) or plain(layer))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    figure.legend(loc="outside lower center", ncols=2)
    return save(figure, path)


@styled
def plot_esds(
    report: Report, path: PathLike | None = None, *, layers: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Draw the spectra of several layers side by side; see `plot_esd`.

    Args:
        report: a measurement with histograms, `analyze(model, histogram=True)`.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        layers: their names; None for all, or 20 of them, evenly spread over the depth, where there are more.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a layer has no histogram, or none has.
    """
    found = with_histogram(report, layers or ())
    chosen = found
    if layers is None:
        chosen = [found[index] for index in spread(len(found), MAX_SPECTRA)]
    columns = min(4, math.ceil(math.sqrt(len(chosen))))
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(2.3 * columns + 0.6, 1.9 * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    labels = plain_names(chosen, 32)
    for place, (axes, name) in enumerate(zip(panels, chosen, strict=False)):
        _draw_esd(axes, report, name)
        axes.set_title(labels[place], fontsize=7)
        axes.tick_params(labelsize=6)
        _set_ticks(axes)
        if place + columns >= len(chosen):
            axes.set_xlabel("eigenvalue", fontsize=7)
    figure.suptitle(heading(title), x=0.01, ha="left", fontsize=10)
    left_out = f" ({len(chosen)} of {len(found)} layers)" if len(chosen) < len(found) else ""
    figure.supylabel(f"density{left_out}", fontsize=9)
    _add_common_legend(figure, columns)
    return save(figure, path)


def _set_ticks(axes: Axes) -> None:
    """Leave the ticks at powers of ten, or, where fewer than two of these are seen, put others between them."""
    from matplotlib.ticker import MaxNLocator

    axes.minorticks_off()  # hundreds of them would take most of the time of drawing
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        if sum(low <= 10.0**power <= high for power in powers) > 1:
            continue
        ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        seen = [tick for tick in ticks if low <= tick <= high]
        if len(seen) < 2:
            seen = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        axis.set_ticks(seen, labels=[f"{tick:g}" for tick in seen])


def _add_common_legend(figure: Figure, columns: int) -> None:
    """Add one legend below all panels; the fitted tails, of different alphas, are one entry, and so are spikes."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries[re.split(r", alpha| \(\d", label)[0]] = handle
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _draw_esd(axes: Axes, report: Report, name: str) -> None:
    """Draw one layer's histogram, its tail where one was fitted, and the law of random weights.

    The axes get logarithmic scales, limits and labels for a legend.
    """
    record = report.layers[name]
    assert record.histogram is not None  # those without are not drawn
    histogram = esd_density(record.histogram)
    tail = tail_density(record)
    lowest = _lowest_shown(histogram, tail)
    floor, ceiling = _heights_shown(histogram, lowest)
    colour = depth_colours(list(report.layers))[name]
    # Empty bins begin at 0, too: from the floor they would reach down into the marks below it.
    baseline = np.where(histogram.y > 0, floor, 0.0)
    axes.stairs(
        histogram.y, histogram.x, baseline=baseline, fill=True, color=colour, alpha=0.45, label="eigenvalues"
    )
    _draw_law(axes, record, report, lowest)
    if tail is not None:
        axes.plot(*tail, color=TAIL, linewidth=1.8, label=f"fitted tail, alpha {record.alpha:.2f}")
        axes.axvline(tail.x[0], color=TAIL, linewidth=0.8, linestyle=":")
    largest = float(histogram.x[-1])
    marks = spectrum_marks(record, report)
    if marks is not None:
        _draw_marks(axes, marks, record, floor)
        largest = max(largest, marks.edge, *marks.spikes, *(marks.traps or ()))
    bottom = floor / STRIP if marks is not None and (marks.spikes or marks.traps) else floor
    axes.set(xscale="log", yscale="log", ylim=(bottom, ceiling), xlim=(lowest, largest * 1.3))


def _draw_marks(axes: Axes, marks: Outliers, record: LayerRecord, floor: float) -> None:
    """Draw the edge of random weights as a line, and a mark for each spike and each trap.

    They lie below `floor`, where the bars end.
    """
    axes.axvline(marks.edge, color=RANDOM, linewidth=0.8, linestyle="-.", label="edge of random weights")
    if marks.spikes:
        height = [floor / STRIP ** (1 / 3)] * len(marks.spikes)
        label = f"spikes ({record.num_spikes})"
        axes.plot(
            marks.spikes, height, "|", color=SPIKES, markersize=6, markeredgewidth=0.8, zorder=3, label=label
        )
    if marks.traps:
        height = [floor / STRIP ** (2 / 3)] * len(marks.traps)
        label = f"traps ({record.num_traps:.2g} a shuffle)"
        axes.plot(marks.traps, height, "x", color=TRAPS, markersize=4, zorder=3, label=label)


def _draw_law(axes: Axes, record: LayerRecord, report: Report, lowest: float) -> None:
    """Draw the Marchenko-Pastur law of the layer's mean eigenvalue, where there is one above 0."""
    mean_eigenvalue = record.norm_stable_rank
    if not mean_eigenvalue:
        return
    law = marchenko_pastur(mean_eigenvalue, aspect_of_sample(record, report), lowest)
    axes.plot(*law, color=RANDOM, linestyle="--", label="random weights (Marchenko-Pastur)")


def _lowest_shown(histogram: Density, tail: Density | None) -> float:
    """Return the left end of the axis: where the histogram begins, or further right, but left of the tail."""
    smallest, largest = float(histogram.x[0]), float(histogram.x[-1])
    cut = largest * SHOWN
    if tail is not None:
        cut = min(cut, float(tail.x[0]) / 3)
    return max(smallest, cut)


def _heights_shown(histogram: Density, lowest: float) -> tuple[float, float]:
    """Return the ends of the vertical axis: a factor of 3 around the histogram's bars that are shown."""
    visible = histogram.x[1:] > lowest
    bars = histogram.y[visible & (histogram.y > 0)]
    return float(bars.min()) / 3, float(bars.max()) * 3


def with_histogram(report: Report, layers: Sequence[str]) -> list[str]:
    """Check that layers have a histogram.

    Args:
        report: a measurement.
        layers: names of layers; none for all that have a histogram.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a layer has no histogram, or none has.
    """
    found = [name for name, record in report.layers.items() if record.histogram is not None]
    if not found:
        raise ValueError("the report holds no histogram: measure with analyze(..., histogram=True)")
    for name in layers:
        if name not in found:
            raise ValueError(f"no layer {name!r} with a histogram; those with one are {first_few(found, 10)}")
    return list(layers) or found


def with_outliers(report: Report) -> list[str]:
    """Return the names of the layers whose spectra have spikes and traps marked, or are known to have none.

    Args:
        report: a measurement; of windows it has none.
    """
    if report.options.get("esd") != "full":
        return []
    return [name for name, record in report.layers.items() if record.histogram and record.outliers]
