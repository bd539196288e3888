"""What the figures of a study share: the colour and the marker of each arm, the look of axes, the file.

matplotlib is imported where it is used, since the processes that train import this package too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from farms_tb.atomic_write import atomic_path

__all__ = ["Style", "add_legend", "arm_styles", "plain_axes", "save"]

_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#7A4B2A", "#332288", "#882255"),
)
"""Okabe and Ito's colours, which colour-blind readers can tell apart, then two of Tol's. A grey and a brown stand
for black, which is the baseline's, and for yellow, which is too pale for lines."""
_MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, in every figure.

    Attributes:
        colour: Its colour.
        marker: Its marker, for readers who don't see the colour.
    """

    colour: str
    marker: str


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return the style of each arm; the baseline is black. From the eleventh on colours come again."""
    styles = {baseline: Style("#000000", "D")}
    for place, arm in enumerate(arm for arm in arms if arm != baseline):
        turn, colour = divmod(place, len(_COLOURS))
        styles[arm] = Style(_COLOURS[colour], _MARKERS[(colour + 3 * turn) % len(_MARKERS)])
    return styles


def plain_axes(axes: Any, grid: str) -> None:
    """Draw a grid along "x", "y" or "both" for reading values, and leave out what carries no information."""
    axes.grid(axis=grid, color="0.9", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def add_legend(figure: Any, styles: Mapping[str, Style], line: Literal["-", ""]) -> None:
    """Write the arms above the axes, as many in a line as have room; `line` is drawn through the markers."""
    from matplotlib.lines import Line2D

    handles = []
    for arm, style in styles.items():
        label = f" {arm}" if arm.startswith("_") else arm  # matplotlib leaves out labels that begin with it
        handles.append(
            Line2D([], [], color=style.colour, marker=style.marker, linestyle=line, markersize=5, label=label)
        )
    entry = 0.7 + 0.085 * max(map(len, styles), default=0)  # inches: marker and gaps, letters
    columns = max(1, min(len(handles), int(figure.get_figwidth() / entry)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def save(figure: Any, path: Path) -> None:
    """Write a figure in one step; the name's ending says in which format. Names in it are shown as they are."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # `$` in the name of an arm is no mathematics
    picture = BytesIO()  # as in `farms_tb.viewing.plots.style`
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    with atomic_path(path) as part:
        part.write_bytes(picture.getvalue())
