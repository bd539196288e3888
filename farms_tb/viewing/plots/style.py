"""One look for all pictures: for print, for the colour-blind, and with the depth of a layer to be seen.

Layers go from dark at the input to bright at the output. matplotlib is imported where something is drawn, without
pyplot, and its settings are put back afterwards: drawing needs no display and changes nothing of the user's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from farms_tb.atomic_write import atomic_path
from farms_tb.viewing.names import printable, shortened

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

    Raises:
        ImportError: matplotlib is not installed.
    """

    @functools.wraps(draw)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError('drawing needs matplotlib: pip install "farms-tb[plot]"') from error
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inner


@styled
def check_format(suffix: str) -> None:
    """Raise a ValueError where matplotlib does not write files of this ending."""
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
    shown = shortened(printable(name), most).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: PathLike | None) -> Figure:
    """Save a figure where a path is given, in the format of its ending."""
    if path is not None:
        suffix = Path(path).suffix.removeprefix(".")
        with atomic_path(path) as unfinished:
            figure.savefig(unfinished, format=suffix or None, bbox_inches="tight")
    return figure


def depth_colours(layers: Sequence[str]) -> dict[str, Colour]:
    """Colours of the layers, dark at the input; the palest end of the map, which print loses, is left out."""
    from matplotlib import colormaps

    last = max(1, len(layers) - 1)
    return {name: colormaps[COLOURS](0.92 * position / last) for position, name in enumerate(layers)}


def explain_colours(figure: Figure, axes: Axes, colours: Mapping[str, Colour]) -> None:
    """Put a legend to the right of the axes, or for many layers a colour bar with some of their names."""
    names = list(colours)
    if len(names) <= MAX_LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="layer, by depth")
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    shown = spread(len(names), 8)
    mappable = ScalarMappable(norm=NoNorm(), cmap=ListedColormap(list(colours.values())))
    bar = figure.colorbar(mappable, ax=axes, ticks=shown, label="layer, by depth", pad=0.02)
    bar.ax.set_yticklabels([plain(names[index]) for index in shown], fontsize="x-small")
    bar.ax.invert_yaxis()


def spread(number: int, most: int) -> list[int]:
    """Return the indices of at most `most` of `number` things, evenly spread, first and last among them."""
    if number <= most:
        return list(range(number))
    return sorted({round(index * (number - 1) / (most - 1)) for index in range(most)})
