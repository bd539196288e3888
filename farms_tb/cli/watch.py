"""Curves of a run in the terminal, while it goes on: one line a layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farms_tb.viewing.run_folder import Curve, History, depth_order, metrics_file, read_history

Quantity = Literal["alpha", "ratio"]

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
# Heading, rule and notes around the layers; and the columns beside a curve, without the layer's name.
_OTHER_LINES, _OTHER_CELLS, _WIDEST_NAME = 7, 28, 32


def follow(run_folder: Path, quantity: Quantity, patterns: Sequence[str], every: float, once: bool) -> None:
    """Show a run's curves, and show them anew whenever there is more, until Ctrl-C.

    Args:
        run_folder: where the run writes its metrics, now or later.
        quantity: which figure.
        patterns: shell-style patterns of the layers to show.
        every: seconds between two looks.
        once: show what is there and return; so where stdout is no terminal.
    """
    console = Console()
    if once or not console.is_terminal:
        console.print(view(run_folder, quantity, patterns, console, crop=False, layers=depth_order(run_folder)))
        return
    shown: RenderableType = ""
    layers: list[str] = []
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                layers = layers or depth_order(run_folder)
                shown = view(run_folder, quantity, patterns, console, crop=True, layers=layers)
                live.update(shown, refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        # The screen that was there before is back; leave the last state on it.
        console.print(shown)


def view(
    run_folder: Path,
    quantity: Quantity,
    patterns: Sequence[str],
    console: Console,
    *,
    crop: bool,
    layers: Sequence[str] = (),
) -> RenderableType:
    """Return what there is to see now.

    Args:
        run_folder: where the run writes its metrics.
        quantity: which figure.
        patterns: shell-style patterns of the layers to show.
        console: where it is shown, for its size and characters.
        crop: show no more layers than fit the console.
        layers: names in order of depth, where that is known; the others are ordered by name.
    """
    history = _read(run_folder, layers)
    curves: Mapping[str, Curve] = getattr(history, quantity)
    shown = {name: c for name, c in curves.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not shown:
        if curves:
            what = f"no {quantity} of such a layer: there are {', '.join(list(curves)[:5])}, ..."
        else:
            what = f"no {quantity} yet" if run_folder.exists() else "not there yet"
        return Text(f"{run_folder}: {what}", style="dim")
    fit = max(1, console.height - _OTHER_LINES) if crop else len(shown)
    lines = dict(list(shown.items())[:fit])
    parts: list[RenderableType] = [
        _heading(run_folder, quantity, shown),
        _table(lines, quantity, console.width, console.options.ascii_only),
    ]
    if len(shown) > fit:
        parts.append(Text(f"and {len(shown) - fit} more layers: choose by --filter", style="dim"))
    return Group(*parts)


def _read(run_folder: Path, layers: Sequence[str]) -> History:
    """Read what is whole of the metrics; nothing where there are none, or where they are being replaced."""
    try:
        path = run_folder if run_folder.is_file() else metrics_file(run_folder)
        return History() if path is None else read_history(path, layers)
    except (OSError, ValueError):
        return History()


def _heading(run_folder: Path, quantity: Quantity, curves: Mapping[str, Curve]) -> Text:
    last = max(curves.values(), key=lambda curve: curve.steps[-1])
    low, high = _range(curves.values())
    place = f"epoch {last.epochs[-1]:g}, step {last.steps[-1]}"
    return Text.assemble(
        (str(run_folder), "bold"), f"\n{place}: {quantity} of {len(curves)} layers, {low:.3f} to {high:.3f}"
    )


def _range(curves: Iterable[Curve]) -> tuple[float, float]:
    values = [value for curve in curves for value in curve.values]
    return min(values), max(values)


def _table(curves: Mapping[str, Curve], quantity: Quantity, width: int, ascii_only: bool) -> Table:
    low, high = _range(curves.values())
    name_width = min(max(map(len, curves)), _WIDEST_NAME)
    room = max(8, width - name_width - _OTHER_CELLS)
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", width=name_width, overflow="ellipsis", no_wrap=True)
    table.add_column(quantity, no_wrap=True)
    for heading in ("first", "now", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, curve in curves.items():
        first, now = curve.values[0], curve.values[-1]
        drawn = Text(sparkline(curve.values, low, high, room, levels), style="cyan")
        table.add_row(Text(name), drawn, f"{first:.3f}", f"{now:.3f}", f"{now - first:+.3f}")
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
        values = [values[round(k * (len(values) - 1) / (width - 1))] for k in range(width)]
    span = (high - low) or 1.0
    return "".join(levels[min(len(levels) - 1, int((value - low) / span * len(levels)))] for value in values)
