"""The plane of effect against rank share: one axis for how much was learnt, one for collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farms_tb.report import Report
from farms_tb.verdicts import Verdict
from farms_tb.viewing.plots.style import FAINT, PathLike, heading, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {
    Verdict.TRAINED: ("o", "#0072B2"),
    Verdict.RANDOM: ("X", "#D55E00"),
    Verdict.COLLAPSED: ("v", "#CC79A7"),
    Verdict.OUTLIERS: ("^", "#009E73"),
    Verdict.NO_POWER_LAW: ("s", "0.5"),
}
"""Marker and colour of each verdict that a layer with an alpha can have; told apart without colours, too."""


@styled
def plot_effect_plane(report: Report, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw each layer's effect against its rank share, with its verdict as the mark.

    The effect is alpha minus that of the same entries in random order: 0 for a random layer. The rank share is
    the share of directions that hold 99 % of the energy, near 0 for a collapsed layer.

    Args:
        report: of `analyze(..., null=True)`.
        path: where to save the picture, in the format of the file's ending; None to save nothing.
        title: a heading, shown as it is: `$` is no mathematics.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has an effect.
    """
    found = [report.layers[name] for name in with_effect(report)]
    if not found:
        raise ValueError("the report holds no effect: measure with analyze(..., null=True)")
    figure = new_figure(5.4, 4.7)
    axes = figure.add_subplot()
    axes.axvline(0.0, color=FAINT, linewidth=1.0, linestyle="--", zorder=1, label="random weights")
    for verdict, (marker, colour) in MARKS.items():
        records = [record for record in found if record.verdict is verdict]
        if not records:
            continue
        axes.errorbar(
            [record.effect for record in records],  # type: ignore[arg-type]
            [record.rank_share for record in records],  # type: ignore[arg-type]
            xerr=[record.effect_error or 0.0 for record in records],
            color=colour,
            marker=marker,
            linestyle="",
            elinewidth=0.8,
            alpha=0.8,
            label=str(verdict),
        )
    axes.set_ylim(0.0, 1.05)
    axes.set_xlabel("effect: alpha minus that of shuffled entries")
    axes.set_ylabel("share of directions with 99 % of the energy")
    axes.set_title(heading(title))
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, path)


def with_effect(report: Report) -> list[str]:
    """Return the names of the layers that have a place in the plane."""
    return [name for name, record in report.layers.items() if record.effect is not None and record.rank_share]
