"""Read the callback's measurements out of the `metrics.csv` of Lightning's CSVLogger, also while it is written.

The callback logs each layer under three columns, `farms/alpha/<layer>`, `farms/ratio/<layer>` and
`farms/lr/<layer>`, and under up to three more, see `FURTHER`. A run that goes on may leave half a line at the end,
and a run that crashed may leave anything: lines that are no rows, and what is not a finite number, are left out
and named in `MetricsFile.problems`, the rest is read. A row is one line: a text of several lines is left out, too.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from farms_tb.viewing.history import LARGEST_EXACT, Curve, History
from farms_tb.viewing.names import in_order, shortened
from farms_tb.weights.names import counted, natural_order

__all__ = ["METRICS_FILE", "MetricsFile", "has_measurements", "read_history", "read_metrics"]

METRICS_FILE = "metrics.csv"

QUANTITIES = ("alpha", "ratio", "lr")
"""What is logged of each layer that is measured; a layer with none of them is not part of a history."""

FURTHER = ("effect", "z", "rank_share")
"""What is logged as well where it is known."""

_KEY = re.compile(rf"farms/(?P<quantity>{'|'.join(QUANTITIES + FURTHER)})/(?P<layer>.+)", re.DOTALL)


class _When(NamedTuple):
    """When something was measured."""

    epoch: float
    """Completed epochs; NaN where the row does not say."""
    step: int
    """Optimizer steps."""


_Points = dict[str, dict[str, dict[_When, float]]]
"""Values by quantity, layer and time."""


class _Row(NamedTuple):
    """A row of the file."""

    line: int
    """Its number."""
    cells: dict[str, str]
    """Its cells as text, by column."""


@dataclass(frozen=True)
class MetricsFile:
    """What a `metrics.csv` holds.

    Attributes:
        history: the layers' curves.
        problems: a sentence for each kind of thing that was left out; empty for a file that is whole.
        logged: what else was logged, losses, scores, whatever is no measurement of a layer: curves by the names of
            their columns, in the order in which they begin. NaN and infinite values are left out, and `problems`
            does not list them.
    """

    history: History
    problems: tuple[str, ...] = ()
    logged: Mapping[str, Curve] = field(default_factory=dict)


def read_history(metrics_csv: str | os.PathLike[str], layers: Sequence[str] | None = None) -> History:
    """Read the callback's rows out of a `metrics.csv`; other rows, columns and empty cells are ignored.

    Args:
        metrics_csv: the file. A last line without its end, as a run that is still writing leaves it, is left out;
            so are cells that hold no finite number.
        layers: names of the layers in order of depth, say `list(callback.report.layers)`. The file's columns
            are sorted by name; without this argument layers are ordered by name too, with numbers in names
            counting as numbers.

    Returns:
        The curves. A measurement that a resumed run repeated counts once, the later row of equal epoch and step.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_metrics(Path(metrics_csv), layers or ()).history


def read_metrics(path: Path, layers: Sequence[str] = ()) -> MetricsFile:
    """Read a `metrics.csv` as `read_history` does, with what else was logged, and say what was left out.

    Args:
        path: the file.
        layers: names of the layers in order of depth, those that are known.

    Returns:
        All curves, and what was left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    points: _Points = {quantity: {} for quantity in QUANTITIES + FURTHER}
    others: dict[str, dict[_When, float]] = {}
    left_out: list[str] = []
    for row in _rows(path, left_out):
        _add_measurements(points, row, left_out)
        _add_others(others, row)
    by_name = sorted(set().union(*(points[quantity] for quantity in QUANTITIES)), key=natural_order)
    names = tuple(in_order(by_name, layers))
    curves = {
        quantity: {name: _curve(values[name]) for name in names if name in values}
        for quantity, values in points.items()
    }
    history = History(**curves, layers=names)
    logged = {column: _curve(values) for column, values in others.items()}
    return MetricsFile(history, tuple(_problems(path, left_out)), logged)


def _add_others(points: dict[str, dict[_When, float]], row: _Row) -> None:
    """Add what else was logged in a row, by column and time; a row that does not say when adds nothing."""
    when = _when(row.cells)
    if when is None:
        return
    for column, text in row.cells.items():
        value = _finite(text)
        is_other = column not in ("", "epoch", "step") and not column.startswith("farms/")
        if value is not None and is_other:
            points.setdefault(column, {})[when] = value


def has_measurements(path: Path) -> bool:
    """Return whether a `metrics.csv` has columns of the callback; no for one that vanishes or cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            header = next(csv.reader(_whole_lines(file)), [])
    except (OSError, csv.Error):
        return False
    return any(column.startswith("farms/") for column in header)


def _whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines that have an end; the last one of a file that is being written has none."""
    return (line for line in lines if line.endswith("\n"))


def _rows(path: Path, left_out: list[str]) -> Iterator[_Row]:
    """Yield the rows of a file that have a cell for each column.

    Each line is parsed on its own: for one reader of all, a stray quote would make one cell of all lines after it.
    `left_out` gets a few words on each line that is no row.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = _whole_lines(file)
        head = csv.reader(lines)
        try:
            header = next(head, [])
        except csv.Error as error:
            left_out.append(f"line {head.line_num} ({error})")
            return
        for number, line in enumerate(lines, head.line_num + 1):
            cells, problem = _parsed(line, len(header))
            if cells:
                yield _Row(number, dict(zip(header, cells, strict=True)))
            elif line.strip():
                left_out.append(f"line {number} ({problem})")


def _parsed(text: str, columns: int) -> tuple[list[str], str]:
    """Return the cells of a row; where it is none, no cells and a few words on why."""
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        return [], str(error)
    if not rows or len(rows[0]) != columns:
        found = len(rows[0]) if rows else 0
        return [], f"{counted(found, 'cell')} in place of {columns}"
    return rows[0], ""


def _add_measurements(points: _Points, row: _Row, left_out: list[str]) -> None:
    """Add the measurements in a row; `left_out` gets a few words on everything that is no finite number.

    A later row of equal time replaces an earlier one.
    """
    cells = _filled_cells(row.cells)
    if not cells:
        return
    when = _when(row.cells)
    if when is None:
        left_out.append(f"line {row.line} (a row of step {_quoted(row.cells['step'])})")
        return
    if row.cells.get("epoch") and math.isnan(when.epoch):
        left_out.append(f"line {row.line} (a row of epoch {_quoted(row.cells['epoch'])})")
        return
    for (quantity, layer), text in cells.items():
        value = _finite(text)
        if value is None:
            left_out.append(f"line {row.line} ({_quoted(text)} as {quantity} of {_quoted(layer)})")
        else:
            points[quantity].setdefault(layer, {})[when] = value


def _filled_cells(row: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return the cells of a row that the callback has filled, by quantity and layer."""
    return {
        (match["quantity"], match["layer"]): text
        for column, text in row.items()
        if text and (match := _KEY.fullmatch(column))
    }


def _when(row: Mapping[str, str]) -> _When | None:
    """Return when a row was measured; None where the step is no number, or too large to be exact.

    A row without a step counts as of step 0.
    """
    step = _finite(row.get("step") or "0")
    if step is None or abs(step) > LARGEST_EXACT:
        return None
    epoch = _finite(row.get("epoch", ""))
    return _When(math.nan if epoch is None else epoch, int(step))


def _finite(text: str) -> float | None:
    """Return text as a number; None where it is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _quoted(text: str) -> str:
    """Return a cell or a name in quotes, safe to print and short enough for a sentence."""
    return repr(shortened(text, 40))


def _problems(path: Path, left_out: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each kind of thing that was left out of a file."""
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        yield (
            f"{path.name} has cells that hold no finite number, or broken lines, left out here: "
            f"{left_out[0]}{more}."
        )
    if not path.read_bytes().endswith(b"\n"):
        yield f"{path.name} ends in half a line, which is left out: the run seems to be writing it."


def _curve(points: Mapping[_When, float]) -> Curve:
    """Return values as a curve, in the order of steps; those of equal steps in the order of the file."""
    times = sorted(points, key=lambda when: when.step)
    return Curve(
        epochs=tuple(when.epoch for when in times),
        steps=tuple(when.step for when in times),
        values=tuple(points[when] for when in times),
    )
