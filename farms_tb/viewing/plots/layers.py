"""Pictures of one measurement: alpha by depth, and full-matrix against FARMS alpha.

Both are drawn from a `Report`, as `analyze` and `analyze_checkpoint` return it. Its spectra are drawn by
`farms_tb.viewing.plots.spectra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from farms_tb.report import LayerRecord, Report
from farms_tb.verdicts import Verdict
from farms_tb.viewing.plots.plane import MARKS
from farms_tb.viewing.plots.style import (
    FAINT,
    Colour,
    PathLike,
    depth_axes,
    depth_colours,
    heading,
    new_figure,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"real": "o", "spectral": "D"}
_KINDS = {"real": "real weights", "spectral": "complex spectral weights"}

_Measured = Mapping[int, LayerRecord]
"""The layers that have an alpha, by their places on the axis."""


@styled
def plot_alpha_by_depth(report: Report, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw alpha against depth, with its standard error where the report has one.

    A report of `analyze(..., null=True)` also shows the band of the permutation null: alpha of the same weights in
    random order, mean +- two standard deviations. A layer below it has learnt something.
    Layers with a verdict other than *trained* are marked.

    Args:
        report: a measurement; layers without an alpha leave a gap.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has an alpha.
    """
    names = list(report.layers)
    records = report.layers.values()
    measured = {place: record for place, record in enumerate(records) if record.alpha is not None}
    if not measured:
        raise ValueError("the report holds no alpha: print(report) says why")
    figure, axes = depth_axes(names)
    _draw_alphas(axes, measured, list(depth_colours(names).values()))
    _draw_null_band(axes, measured)
    _mark_verdicts(axes, measured)
    _explain_kinds(axes, measured)
    axes.set_ylabel("power-law exponent alpha")
    axes.set_title(heading(title))
    _, labels = axes.get_legend_handles_labels()
    if labels:
        # Above the axes, where it covers no layer; below them are the names.
        figure.legend(loc="outside upper right", ncols=3 if len(names) > 16 else 1)
    return save(figure, path)


def _draw_alphas(axes: Axes, measured: _Measured, colours: Sequence[Colour]) -> None:
    """Draw a point with an error bar for each layer, in its colour, and a faint line through them."""
    alphas = [record.alpha for record in measured.values()]
    axes.plot(list(measured), alphas, color="0.8", linewidth=0.8)  # type: ignore[arg-type]
    for place, record in measured.items():
        axes.errorbar(
            place,
            record.alpha,  # type: ignore[arg-type]
            record.alpha_error,
            color=colours[place],
            marker=_MARKERS[record.kind],
            capsize=2,
        )


def _mark_verdicts(axes: Axes, measured: _Measured) -> None:
    """Mark the layers that ask for a look: those with a verdict other than trained."""
    for verdict, (marker, colour) in MARKS.items():
        alphas = {place: record.alpha for place, record in measured.items() if record.verdict is verdict}
        if not alphas or verdict is Verdict.TRAINED:
            continue
        places, heights = list(alphas), list(alphas.values())
        axes.scatter(places, heights, s=70, c=colour, marker=marker, zorder=3, label=str(verdict))  # type: ignore[arg-type]


def _explain_kinds(axes: Axes, measured: _Measured) -> None:
    """Add the markers of real and complex weights to the legend where there are both."""
    kinds = {record.kind for record in measured.values()}
    if len(kinds) < 2:
        return
    for kind, label in _KINDS.items():
        axes.plot([], [], color=FAINT, marker=_MARKERS[kind], linestyle="", label=label)


def _draw_null_band(axes: Axes, measured: _Measured) -> None:
    """Draw a grey band of each layer's permutation null, where it is known.

    The band is the mean +- two standard deviations of the alphas of the same entries in random order, which about
    95 % of layers without any structure would fall into.
    """
    nulls = {place: record.null for place, record in measured.items() if record.null is not None}
    if nulls:
        bottoms = [mean - 2 * std for mean, std in nulls.values()]
        heights = [4 * std for _, std in nulls.values()]
        label = "random weights, mean ± 2 sd"
        axes.bar(list(nulls), heights, 0.8, bottoms, color="0.85", zorder=0.5, label=label)


@styled
def plot_full_against_farms(
    farms: Report, full: Report, path: PathLike | None = None, *, title: str = ""
) -> Figure:
    """Draw each layer's full-matrix alpha against its FARMS alpha, coloured by the layer's aspect ratio.

    The distance from the diagonal is the bias of the aspect ratio, which FARMS removes.

    Args:
        farms: `analyze(model)`.
        full: `analyze(model, esd="full")` of the same weights.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has both alphas.
    """
    from matplotlib.colors import LogNorm

    pairs = _pairs(farms, full)
    if not pairs:
        raise ValueError("no layer has both a FARMS and a full-matrix alpha: nothing to compare")
    figure = new_figure(5.4, 4.4)
    axes = figure.add_subplot()
    axes.axline((2, 2), slope=1, color=FAINT, linewidth=1.0, linestyle="--", zorder=1, label="equal alphas")
    windowed, whole, aspects = zip(*pairs, strict=True)
    widest = max(2.0, *aspects)
    dots = axes.scatter(
        windowed,
        whole,
        c=aspects,
        s=30,
        cmap="cividis",
        norm=LogNorm(1, widest),
        edgecolor="white",
        linewidth=0.5,
    )
    bar = figure.colorbar(dots, ax=axes, label="aspect ratio of the layer, long / short side", pad=0.02)
    ticks = [2.0**exponent for exponent in range(12) if 2.0**exponent <= widest]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    axes.legend(loc="lower right")
    axes.set_xlabel("FARMS alpha")
    axes.set_ylabel("full-matrix alpha")
    axes.set_title(heading(title))
    return save(figure, path)


def _pairs(farms: Report, full: Report) -> list[tuple[float, float, float]]:
    """Return both alphas of each layer that has both, and its aspect ratio, long side / short side."""
    pairs = []
    for name, record in farms.layers.items():
        whole = full.layers.get(name)
        if record.alpha is None or whole is None or whole.alpha is None:
            continue
        sides = record.shape[1:]
        pairs.append((record.alpha, whole.alpha, max(sides) / min(sides)))
    return pairs
