"""Read the callback's measurements out of the `metrics.csv` of Lightning's CSVLogger, also while it is written."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.names import natural_order, printable, shortened

__all__ = ["METRICS_FILE", "MetricsFile", "has_measurements", "read_history", "read_metrics"]

METRICS_FILE = "metrics.csv"

_KEY = re.compile(r"farms/(?P<quantity>alpha|ratio|lr)/(?P<layer>.+)", re.DOTALL)

_LARGEST_STEP = 2**53
"""Whole numbers beyond it are no longer exact in the page's and the pictures' floating-point numbers."""

_When = tuple[float, int]
"""Completed epochs and optimizer steps at a measurement."""


@dataclass(frozen=True)
class MetricsFile:
    """What a `metrics.csv` holds of the callback.

    Attributes:
        history: the layers' curves.
        problems: a sentence for each kind of thing that was left out; empty for a file that is whole.
    """

    history: History
    problems: tuple[str, ...] = ()


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
    """Read a `metrics.csv` as `read_history` does, and say what was left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    points: dict[str, dict[str, dict[_When, float]]] = {"alpha": {}, "ratio": {}, "lr": {}}
    left_out: list[str] = []
    for row in _rows(path, left_out):
        for quantity, layer, when, value in _measurements(row, left_out):
            points[quantity].setdefault(layer, {})[when] = value
    names = _by_depth(set().union(*points.values()), layers)
    curves = {quantity: {n: _curve(found[n]) for n in names if n in found} for quantity, found in points.items()}
    return MetricsFile(History(**curves, layers=names), tuple(_problems(path, left_out)))


def has_measurements(path: Path) -> bool:
    """Tell whether a `metrics.csv` has columns of the callback; no for one that vanishes or cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            header = next(csv.reader(_whole_lines(file)), [])
    except (OSError, csv.Error):
        return False
    return any(column.startswith("farms/") for column in header)


def _whole_lines(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if line.endswith("\n"))


def _rows(path: Path, left_out: list[str]) -> Iterator[dict[str, str]]:
    """Yield each row by column; lines that are no CSV are noted in `left_out`."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(_whole_lines(file))
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                left_out.append(f"line {reader.line_num} ({error})")
                continue
            if header is None:
                header = cells
            else:
                yield dict(zip(header, cells, strict=False))


def _measurements(row: Mapping[str, str], left_out: list[str]) -> Iterator[tuple[str, str, _When, float]]:
    """Yield quantity, layer, time and value of each measurement in a row."""
    cells = [(match, cell) for column, cell in row.items() if cell and (match := _KEY.fullmatch(column))]
    if not cells:
        return
    step = _finite(row.get("step") or "0")
    if step is None or abs(step) > _LARGEST_STEP:
        left_out.append(f"a row of step {_quoted(row['step'])}")
        return
    epoch = _finite(row.get("epoch") or "nan")
    when = (math.nan if epoch is None else epoch, int(step))
    for match, cell in cells:
        value = _finite(cell)
        if value is None:
            left_out.append(f"{_quoted(cell)} as {match['quantity']} of {_quoted(match['layer'])}")
        else:
            yield match["quantity"], match["layer"], when, value


def _finite(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _quoted(text: str) -> str:
    return repr(shortened(printable(text), 40))


def _problems(path: Path, left_out: Sequence[str]) -> Iterator[str]:
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        yield f"{path.name} holds what is no finite number or no CSV, which is left out: {left_out[0]}{more}."
    if not path.read_bytes().endswith(b"\n"):
        yield f"{path.name} ends in half a line, which is left out: the run seems to be writing it."


def _by_depth(names: Iterable[str], layers: Sequence[str]) -> tuple[str, ...]:
    """Order `names` as in `layers`; those that are not in it come last, by name."""
    depth = {name: position for position, name in enumerate(layers)}
    return tuple(sorted(names, key=lambda name: (depth.get(name, len(depth)), natural_order(name))))


def _curve(points: Mapping[_When, float]) -> Curve:
    ordered = sorted(points.items(), key=lambda item: item[0][1])
    return Curve(
        epochs=tuple(epoch for (epoch, _), _ in ordered),
        steps=tuple(step for (_, step), _ in ordered),
        values=tuple(value for _, value in ordered),
    )
