"""One look for all pictures: for print, for the colour-blind, and with the depth of a layer to be seen.

Layers go from dark at the input to bright at the output. matplotlib is imported where something is drawn, without
pyplot, and its settings are put back afterwards: drawing needs no display and changes none of the user's settings.

A function that draws is decorated with `styled`, begins with `new_figure` and ends with `save`. Every text that is
not a constant goes through `plain` (names) or `heading` (titles), since matplotlib takes `$` for mathematics.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from farms_tb.atomic_write import atomic_path
from farms_tb.missing import cannot_import
from farms_tb.viewing.names import shortened, told_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"
MARKERS = "os^DvPX"
FAINT = "0.6"

MAX_LEGEND = 24
"""With more layers than this a colour bar takes the legend's place."""

MAX_NAMES = 40
"""With more layers than this along an axis, some are named."""

LONGEST_TITLE = 200
"""Characters of a title that are kept, the last ones: a picture that grows with its title could not be saved."""

_TITLE_LINE = re.compile(r".{1,49}(?:[\s/,]|$)|.{1,50}")
"""As much of a title as fits the narrowest pictures, up to the last blank, slash or comma where there is one."""

_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.dpi": 150.0,
    "savefig.dpi": 300.0,
    # Text stays text in vector formats: to be searched, and set in TrueType, as publishers ask for.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    # Names are shown as they are, not run through TeX.
    "text.usetex": False,
}

PathLike = str | os.PathLike[str]
Colour = tuple[float, float, float, float]
_P = ParamSpec("_P")
_T = TypeVar("_T")


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function draw and save in the project's style.

    Names may hold letters that the font lacks, Chinese ones for example. matplotlib draws a box in their place and
    warns; the warning is silenced here, since the picture is still of use and its reader sees the box.

    Args:
        draw: a function that draws with matplotlib.

    Returns:
        The function, which also raises an ImportError where matplotlib is not installed.
    """

    @functools.wraps(draw)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            from matplotlib import rc_context
        except Exception as error:  # what a broken installation raises is anything
            raise ImportError(cannot_import("drawing", error, 'pip install "farms-tb[plot]"')) from error
        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            return draw(*args, **kwargs)

    return inner


@styled
def check_format(suffix: str) -> None:
    """Check that matplotlib writes files of this format, before time is spent on a measurement.

    Args:
        suffix: the ending of a file's name, `".png"`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it does not write such files; the message lists the formats it writes.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if suffix.removeprefix(".") not in known:
        raise ValueError(f"no format of pictures {suffix!r}: matplotlib writes {', '.join(sorted(known))}")


def plain(name: str, most: int = 60) -> str:
    r"""Return a name as text that matplotlib shows as it is.

    Matplotlib takes text between two `$` for mathematics, and leaves labels that begin with `_` out of legends.

    Args:
        name: name of a layer or a run.
        most: characters to keep, the last ones: a name of thousands would make a picture too wide to be saved.

    Example:
        >>> plain("$x$"), plain("_orig_mod.0")
        ('\\$x\\$', ' _orig_mod.0')
    """
    return plain_names([name], most)[0]


def plain_names(names: Sequence[str], most: int = 60) -> list[str]:
    """Return names that are shown together as `plain` does, and cut so that they can be told apart.

    Args:
        names: names of layers or runs.
        most: characters to keep of each.
    """
    shown = [label.replace("$", r"\$") for label in told_apart(names, most)]
    return [f" {label}" if label.startswith("_") else label for label in shown]


def heading(title: str) -> str:
    r"""Return a title as text that matplotlib shows as it is; line breaks stay, and longer lines are broken.

    Example:
        >>> heading("lr $x$\nseed 1")
        'lr \\$x\\$\nseed 1'
    """
    lines = shortened(title, LONGEST_TITLE, keep="\n").split("\n")
    broken = ["\n".join(_TITLE_LINE.findall(line)) for line in lines]
    return "\n".join(broken).replace("$", r"\$")


def time_label(by_step: bool) -> str:
    """Return the label of an axis of time: in optimizer steps, or in completed epochs."""
    return "optimizer steps" if by_step else "completed epochs"


def name_ticks(names: Sequence[str], most: int = MAX_NAMES) -> dict[str, Any]:
    """Return ticks of an axis along the layers, as arguments of `Axes.set_xticks`; of many layers some are named.

    Args:
        names: names of the layers, which lie at 0, 1, 2, ... on the axis.
        most: how many are named.
    """
    shown = spread(len(names), most)
    labels = plain_names(names)
    return {"ticks": shown, "labels": [labels[index] for index in shown], "fontsize": "x-small"}


def depth_axes(names: Sequence[str], more_height: float = 0.0) -> tuple[Figure, Axes]:
    """Return a figure with axes whose horizontal one runs along the layers, which lie at 0, 1, 2, ...

    Args:
        names: names of the layers, by depth.
        more_height: room for a legend below the axes, in inches.
    """
    figure = new_figure(max(4.5, min(9.0, 1.2 + 0.3 * len(names))), 4.4 + more_height)
    axes = figure.add_subplot()
    axes.set_xticks(**name_ticks(names), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    return figure, axes


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: PathLike | None) -> Figure:
    """Save a figure where a path is given.

    Args:
        figure: the figure.
        path: the file to write, in the format of its ending; None to save nothing.

    Returns:
        The figure.

    Raises:
        OSError: the file cannot be written; an earlier one is kept.
        ValueError: matplotlib does not know the format.
    """
    if path is None:
        return figure
    suffix = Path(path).suffix.removeprefix(".")
    # Drawn in memory: matplotlib's PDF hides the error of a full disk behind one of its own.
    picture = BytesIO()
    figure.savefig(picture, format=suffix or None, bbox_inches="tight")
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    return figure


def depth_colours(layers: Sequence[str]) -> dict[str, Colour]:
    """Return one colour for each layer, dark at the input.

    The palest end of the colour map, which print loses, is left out.

    Args:
        layers: names of all layers in order of depth, those that are not drawn included: a layer has the same
            colour in every picture of a run.

    Returns:
        Red, green, blue and opacity of each layer, from 0 to 1.
    """
    from matplotlib import colormaps

    colour_map = colormaps[COLOURS]
    last = max(1, len(layers) - 1)
    return {name: colour_map(0.92 * position / last) for position, name in enumerate(layers)}


def explain_colours(figure: Figure, axes: Axes, colours: Mapping[str, Colour]) -> None:
    """Put a legend to the right of the axes, or for many layers a colour bar with some of their names.

    Args:
        figure: the figure that the axes are part of.
        axes: where a line with a label was drawn for each layer.
        colours: colour of each layer, in order of depth.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    if len(colours) <= MAX_LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="layer, by depth")
        return
    mappable = ScalarMappable(norm=NoNorm(), cmap=ListedColormap(list(colours.values())))
    bar = figure.colorbar(mappable, ax=axes, label="layer, by depth", pad=0.02)
    bar.set_ticks(**name_ticks(list(colours), 8))
    bar.ax.invert_yaxis()


def spread(number: int, most: int) -> list[int]:
    """Return the indices of at most `most` of `number` things, evenly spread, first and last among them.

    Example:
        >>> spread(3, 8), spread(100, 4)
        ([0, 1, 2], [0, 33, 66, 99])
    """
    if number <= most:
        return list(range(number))
    step = (number - 1) / (most - 1)
    return sorted({round(index * step) for index in range(most)})
