"""Pictures of one measurement: alpha by depth, full-matrix against FARMS alpha, and the layers' spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from farms_tb.report import LayerRecord, Report
from farms_tb.viewing.densities import aspect_of_sample, esd_density, marchenko_pastur, tail_density
from farms_tb.viewing.plots.style import (
    FAINT,
    MAX_NAMES,
    PathLike,
    depth_colours,
    new_figure,
    plain,
    save,
    spread,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SPECTRA = 20
"""With more layers than this, `plot_esds` shows so many of them."""

SHOWN = 1e-4
"""Eigenvalues below this share of the largest are cut off, unless the tail begins there: they hide the rest."""

TAIL, RANDOM = "#D55E00", "0.25"
_KINDS = {"real": ("o", "real weights"), "spectral": ("D", "complex spectral weights")}


@styled
def plot_alpha_by_depth(report: Report, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw alpha against depth, with its standard error where the report has one.

    A report of `analyze(..., null=True)` also shows the band of the permutation null: alpha of the same weights in
    random order, mean +- two standard deviations. A layer below it has learnt something.

    Args:
        report: a measurement; layers without an alpha leave a gap.
        path: where to save the picture, in the format of the file's ending.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has an alpha.
    """
    names = list(report.layers)
    alphas = _with_alpha(report)
    positions = {name: index for index, name in enumerate(names) if name in alphas}
    figure = new_figure(max(4.5, min(9.0, 1.2 + 0.3 * len(names))), 4.4)
    axes = figure.add_subplot()
    heights = {name: alphas[name].alpha or math.nan for name in positions}
    axes.plot(list(positions.values()), list(heights.values()), color="0.8", linewidth=0.8)
    colours = depth_colours(names)
    for name, position in positions.items():
        marker, _ = _KINDS[alphas[name].kind]
        error = alphas[name].alpha_error
        axes.errorbar(position, heights[name], error, color=colours[name], marker=marker, capsize=2)
    explained = [_explain_kinds(axes, alphas), _draw_null_band(axes, alphas, positions)]
    shown = spread(len(names), MAX_NAMES)
    axes.set_xticks(
        shown,
        [plain(names[index]) for index in shown],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        fontsize="x-small",
    )
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("power-law exponent alpha")
    axes.set_title(title)
    if any(explained):
        axes.legend()
    return save(figure, path)


def _explain_kinds(axes: Axes, records: Mapping[str, LayerRecord]) -> bool:
    """Add the markers of real and complex weights to the legend where there are both; tell whether."""
    kinds = [kind for kind in _KINDS if any(record.kind == kind for record in records.values())]
    if len(kinds) < 2:
        return False
    for marker, label in (_KINDS[kind] for kind in kinds):
        axes.plot([], [], color=FAINT, marker=marker, linestyle="", label=label)
    return True


def _draw_null_band(axes: Axes, records: Mapping[str, LayerRecord], positions: Mapping[str, int]) -> bool:
    """Draw mean +- two standard deviations of each layer's permutation null, where it is known; tell whether."""
    nulls = {position: records[name].null for name, position in positions.items()}
    known = {position: null for position, null in nulls.items() if null is not None}
    if not known:
        return False
    bottom = [mean - 2 * std for mean, std in known.values()]
    height = [4 * std for _, std in known.values()]
    label = "random weights, mean ± 2 sd"
    axes.bar(list(known), height, 0.8, bottom, color="0.85", zorder=0.5, label=label)
    return True


@styled
def plot_full_against_farms(
    farms: Report, full: Report, path: PathLike | None = None, *, title: str = ""
) -> Figure:
    """Draw each layer's full-matrix alpha against its FARMS alpha, coloured by the layer's aspect ratio.

    The distance from the diagonal is the bias of the aspect ratio, which FARMS removes.

    Args:
        farms: `analyze(model)`.
        full: `analyze(model, esd="full")` of the same weights.
        path: where to save the picture, in the format of the file's ending.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has both alphas.
    """
    from matplotlib.colors import LogNorm

    both = {
        name: (record.alpha, full.layers[name].alpha, max(record.shape[1:]) / min(record.shape[1:]))
        for name, record in farms.layers.items()
        if record.alpha is not None and name in full.layers and full.layers[name].alpha is not None
    }
    if not both:
        raise ValueError("no layer has both a FARMS and a full-matrix alpha: nothing to compare")
    x, y, aspect = zip(*both.values(), strict=True)
    figure = new_figure(5.4, 4.4)
    axes = figure.add_subplot()
    axes.axline((2, 2), slope=1, color=FAINT, linewidth=1.0, linestyle="--", zorder=1)
    dots = axes.scatter(
        x, y, c=aspect, s=30, cmap="cividis", norm=LogNorm(1, max(2, *aspect)), edgecolor="white", linewidth=0.5
    )
    bar = figure.colorbar(dots, ax=axes, label="aspect ratio of the layer, long / short side", pad=0.02)
    ticks = [tick for power in range(12) for tick in [2.0**power] if tick <= max(2, *aspect)]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    axes.set_xlabel("FARMS alpha")
    axes.set_ylabel("full-matrix alpha")
    axes.set_title(title)
    return save(figure, path)


@styled
def plot_esd(report: Report, layer: str, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw a layer's empirical spectral density, its fitted tail and the Marchenko-Pastur law on log-log axes.

    The Marchenko-Pastur law is what independent random entries of the same variance would give.

    Args:
        report: a measurement with histograms, `analyze(model, histogram=True)`.
        layer: name of the layer.
        path: where to save the picture, in the format of the file's ending.
        title: a heading; the layer's name where empty.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer of that name has a histogram.
    """
    with_histogram(report, [layer])
    figure = new_figure(5.0, 3.6)
    axes = figure.add_subplot()
    _draw_esd(axes, report, layer, depth_colours(list(report.layers))[layer])
    axes.set_title(title or plain(layer))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.legend(loc="lower left")
    return save(figure, path)


@styled
def plot_esds(
    report: Report, path: PathLike | None = None, *, layers: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Draw the spectra of several layers side by side; see `plot_esd`.

    Args:
        report: a measurement with histograms, `analyze(model, histogram=True)`.
        path: where to save the picture, in the format of the file's ending.
        layers: their names; None for all, or 20 of them, evenly spread over the depth, where there are more.
        title: a heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a layer has no histogram, or none has.
    """
    chosen = with_histogram(report, layers or ())
    if layers is None:
        chosen = [chosen[index] for index in spread(len(chosen), MAX_SPECTRA)]
    columns = min(4, math.ceil(math.sqrt(len(chosen))))
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(2.3 * columns + 0.4, 1.9 * rows + 0.8)
    colours = depth_colours(list(report.layers))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat[: len(chosen)], chosen, strict=True):
        _draw_esd(axes, report, name, colours[name])
        axes.set_title(plain(name, 32), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.minorticks_off()  # hundreds of them would take most of the time of drawing
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.supxlabel("eigenvalue", fontsize=9)
    figure.supylabel("density", fontsize=9)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = {"fitted tail" if "fitted tail" in label else label: handle for label, handle in handles.items()}
    figure.legend(names.values(), names.keys(), loc="outside upper right", ncols=3)
    return save(figure, path)


def _draw_esd(axes: Axes, report: Report, name: str, colour: tuple[float, ...]) -> None:
    record = report.layers[name]
    assert record.histogram is not None  # those without are not drawn
    edges, density = esd_density(record.histogram)
    tail = tail_density(record)
    lowest = max(edges[0], min(edges[-1] * SHOWN, math.inf if tail is None else tail.x[0] / 3))
    shown = density[(density > 0) & (edges[1:] > lowest)]
    floor, ceiling = shown.min() / 3, shown.max() * 3
    axes.stairs(density, edges, baseline=floor, fill=True, color=colour, alpha=0.45, label="eigenvalues")
    if record.norm_stable_rank:
        law = marchenko_pastur(record.norm_stable_rank, aspect_of_sample(record, report), lowest)
        axes.plot(*law, color=RANDOM, linestyle="--", label="random weights (Marchenko-Pastur)")
    if tail is not None:
        axes.plot(*tail, color=TAIL, linewidth=1.8, label=f"fitted tail, alpha {record.alpha:.2f}")
        axes.axvline(tail.x[0], color=TAIL, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", ylim=(floor, ceiling), xlim=(lowest, edges[-1] * 1.3))


def _with_alpha(report: Report) -> dict[str, LayerRecord]:
    found = {name: record for name, record in report.layers.items() if record.alpha is not None}
    if not found:
        raise ValueError("the report holds no alpha: print(report) says why")
    return found


def with_histogram(report: Report, layers: Sequence[str]) -> list[str]:
    """Return `layers`, or for none of them all that have a histogram.

    Raises:
        ValueError: a layer has no histogram, or none has.
    """
    found = [name for name, record in report.layers.items() if record.histogram is not None]
    if not found:
        raise ValueError("the report holds no histogram: measure with analyze(..., histogram=True)")
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise ValueError(f"no layer {unknown[0]!r} with a histogram; those with one are {', '.join(found)}")
    return list(layers) or found
