"""`farms-tb watch`: curves of a run in the terminal while it goes on, one line for each layer.

The run's `metrics.csv` is read anew each time, since it may be replaced. `view` makes what is shown, from the
folder and the console's size, and `sparkline` draws one curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farms_tb.cli.arguments import Filter
from farms_tb.cli.messages import complaints
from farms_tb.cli.tables import number
from farms_tb.printable import printable
from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.metrics_csv import MetricsFile, read_metrics
from farms_tb.viewing.run_files import find_run
from farms_tb.viewing.saved_state import newest_state
from farms_tb.viewing.several_runs import listed
from farms_tb.weights.names import counted

Quantity = Literal["alpha", "ratio"]

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"

_OTHER_LINES = 7
"""Lines around those of the layers: heading, rule and notes."""

_OTHER_CELLS = 28
"""Characters of a line that are neither the layer's name nor its curve."""

_WIDEST_NAME = 32


def watch(
    run_folder: Annotated[
        Path,
        typer.Argument(metavar="RUN_FOLDER", help="Where the run writes its metrics.csv.", show_default=False),
    ],
    ratio: Annotated[bool, typer.Option("--ratio", help="Learning-rate ratios instead of alphas.")] = False,
    patterns: Filter = None,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what is there and end.")] = False,
) -> None:
    """Show how each layer's alpha develops while a run goes on. Ends on Ctrl-C.

    Waits for the folder where there is none yet. Where stdout is no terminal, prints once.
    """
    quantity: Quantity = "ratio" if ratio else "alpha"
    shown = Shown(run_folder, quantity, tuple(patterns or ("*",)))
    console = Console()
    with complaints():
        if once or not console.is_terminal:
            console.print(view(shown, console, crop=False, layers=_layers_by_depth(run_folder)))
        else:
            _follow(shown, console, every)


@dataclass(frozen=True)
class Shown:
    """What is watched.

    Attributes:
        run_folder: where the run writes its metrics, now or later; or a `metrics.csv` itself.
        quantity: which curves.
        patterns: shell-style patterns of the layers to show.
    """

    run_folder: Path
    quantity: Quantity
    patterns: Sequence[str] = ("*",)

    @property
    def place(self) -> str:
        """The folder as text for a terminal."""
        return printable(str(self.run_folder))

    def takes(self, layer: str) -> bool:
        """Return whether a layer is shown."""
        return any(fnmatchcase(layer, pattern) for pattern in self.patterns)


def _follow(shown: Shown, console: Console, every: float) -> None:
    """Show the curves anew until Ctrl-C, on a screen of their own, as pagers have."""
    last: RenderableType = ""
    layers: Sequence[str] = ()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                layers = layers or _layers_by_depth(shown.run_folder)
                last = view(shown, console, crop=True, layers=layers)
                live.update(last, refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        # The screen that was there before is back; leave the last state on it.
        console.print(last)


def view(shown: Shown, console: Console, *, crop: bool, layers: Sequence[str] = ()) -> RenderableType:
    """Return what there is to see now.

    Args:
        shown: what is watched.
        console: where it is shown, for its size and characters.
        crop: show no more layers than fit the console.
        layers: names in order of depth, where that is known; the others are ordered by name.

    Returns:
        The curves, or a line that says why there are none.

    Raises:
        SeveralRunsError: the folder holds several runs.
    """
    metrics = _read(shown.run_folder, layers)
    curves: Mapping[str, Curve] = getattr(metrics.history, shown.quantity)
    chosen = {name: curve for name, curve in curves.items() if shown.takes(name)}
    if not chosen:
        return Text(f"{shown.place}: {_why_nothing(shown, curves)}", style="dim")
    fit = max(1, console.height - _OTHER_LINES) if crop else len(chosen)
    table = _table(dict(list(chosen.items())[:fit]), shown.quantity, console)
    notes = [] if crop else list(map(printable, metrics.problems))
    if len(chosen) > fit:
        notes.append(f"and {counted(len(chosen) - fit, 'more layer')}: choose by --filter")
    return Group(_heading(shown, chosen), table, *(Text(note, style="dim") for note in notes))


def _read(run_folder: Path, layers: Sequence[str]) -> MetricsFile:
    """Read what is whole of the metrics; nothing where there are none, or where they are being replaced."""
    nothing = MetricsFile(History())
    try:
        path = run_folder if run_folder.is_file() else find_run(run_folder).metrics
        return nothing if path is None else read_metrics(path, layers)
    except OSError:
        return nothing


def _layers_by_depth(run_folder: Path) -> Sequence[str]:
    """Return the layers in order of depth as a checkpoint lists them; empty while there is none."""
    try:
        return newest_state(find_run(run_folder).checkpoints).layers
    except OSError:
        return ()


def _why_nothing(shown: Shown, curves: Mapping[str, Curve]) -> str:
    """Return why no layer is shown: the filter takes none, or nothing was logged yet."""
    if curves:
        return f"no {shown.quantity} of such a layer: there are {listed(list(curves))}"
    return f"no {shown.quantity} yet" if shown.run_folder.exists() else "not there yet"


def _heading(shown: Shown, curves: Mapping[str, Curve]) -> Text:
    """Return the lines above the table: the folder, the time of the last measurement, the span of the values.

    They are about all curves that the filter takes, also those that do not fit the screen.
    """
    last = max(curves.values(), key=lambda curve: curve.steps[-1])
    low, high = _range(curves.values())
    when = f"step {last.steps[-1]}"
    if not math.isnan(last.epochs[-1]):
        when = f"epoch {last.epochs[-1]:g}, {when}"
    summary = f"{shown.quantity} of {counted(len(curves), 'layer')}, {_value(low)} to {_value(high)}"
    return Text.assemble((shown.place, "bold"), f"\n{when}: {summary}")


def _range(curves: Iterable[Curve]) -> tuple[float, float]:
    """Return the smallest and the largest value of some curves."""
    values = [value for curve in curves for value in curve.values]
    return min(values), max(values)


def _value(value: float, signed: bool = False) -> str:
    """Return a value in few characters, also one that no healthy run has."""
    return number(value, 3, signed) if abs(value) < 1e5 else f"{value:.3g}"


def _table(curves: Mapping[str, Curve], quantity: Quantity, console: Console) -> Table:
    """Return a line for each layer: its curve, on one scale for all, its first and its last value.

    The console says how wide the curves may be, and of which characters.
    """
    low, high = _range(curves.values())
    names = {name: printable(name) for name in curves}
    name_width = min(max(map(len, ("layer", *names.values()))), _WIDEST_NAME)
    curve_width = max(8, console.width - name_width - _OTHER_CELLS)
    levels = _ASCII_LEVELS if console.options.ascii_only else _LEVELS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", width=name_width, overflow="ellipsis", no_wrap=True)
    table.add_column(quantity, no_wrap=True)
    for heading in ("first", "now", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, curve in curves.items():
        first, now = curve.values[0], curve.values[-1]
        drawn = Text(sparkline(curve.values, low, high, curve_width, levels), style="cyan")
        table.add_row(Text(names[name]), drawn, _value(first), _value(now), _value(now - first, signed=True))
    return table


def sparkline(values: Sequence[float], low: float, high: float, width: int, levels: str = _LEVELS) -> str:
    """Draw values as a line of bars, one character each; of more values than fit, an even choice.

    Args:
        values: at least one.
        low: the value of the lowest bar.
        high: the value of the highest bar.
        width: most characters.
        levels: the bars, lowest first.

    Example:
        >>> sparkline([1.0, 1.5, 2.0, 1.5], low=1.0, high=2.0, width=10)
        '▁▅█▅'
    """
    if len(values) > width:
        step = (len(values) - 1) / (width - 1)
        values = [values[round(k * step)] for k in range(width)]
    # Halves, so that the difference of two huge numbers is finite.
    span = (high / 2 - low / 2) or 1.0
    bars = []
    for value in values:
        height = (value / 2 - low / 2) / span
        level = min(len(levels) - 1, int(height * len(levels)))
        bars.append(levels[level])
    return "".join(bars)
