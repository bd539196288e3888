"""Rows as a table for the eye.

A number is shown with the digits that mean something: its standard error, where it has one, ends with the second
significant digit. In a terminal the table takes the layout with most in it that fits; reasons why layers have no
alpha, which are long, become numbered notes where they do not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from farms_tb.printable import printable
from farms_tb.report import OK

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: which value of a row.
        heading: what stands above it.
        decimals: most decimals of a number; None for text.
        signed: whether positive numbers get a plus sign.
        digits: most significant digits of a number that is known to so many; 0 for any.
        error: key of the number's standard error, whose second significant digit is the last one shown; empty for
            none.
        optional: left out where the terminal is too narrow for all.
        styles: colours of cells by their text.
    """

    key: str
    heading: str
    decimals: int | None = None
    signed: bool = False
    digits: int = 0
    error: str = ""
    optional: bool = False
    styles: Mapping[str, str] = field(default_factory=dict)

    def cell(self, row: Row) -> str:
        """Return the value of a row as text; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if self.decimals is None:
            return printable(str(value)) or "-"
        limits = [self.decimals]
        if self.digits:
            limits.append(decimals_of(value, self.digits))
        if self.error:
            limits.append(decimals_of(row.get(self.error), 2))
        return number(value, min(limits), self.signed)


def decimals_of(value: float | None, digits: int) -> int:
    """Return the decimals with which a number has so many significant digits; many for 0 and None.

    Example:
        >>> decimals_of(0.031, 2), decimals_of(0.31, 2), decimals_of(31.0, 2)
        (3, 2, 0)
    """
    if not value or not math.isfinite(value):
        return 99
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def number(value: float, decimals: int, signed: bool = False) -> str:
    """Return a number with fixed decimals; what rounds to zero has no sign.

    Example:
        >>> number(-0.0004, 3), number(0.25, 2, signed=True), number(0.0, 2, signed=True)
        ('0.000', '+0.25', '0.00')
    """
    text = f"{value:.{decimals}f}"
    rounds_to_zero = not text.strip("-0.")
    if rounds_to_zero:
        return text.removeprefix("-")
    return f"+{text}" if signed and value > 0 else text


_NARROWEST_NAME = 12
"""Characters of a name that a line keeps where names are folded."""


def print_table(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print rows as a table, in the layout with most in it that fits the console.

    Reasons stand in a column of their own where there is room, as numbered notes below the table where not. What
    is piped into a file or a pager keeps a line for each layer.

    Args:
        console: where the table goes.
        title: one line or several above it.
        columns: its columns; one of numbers is left out where no row has one. The status comes last.
        rows: one for each layer; all have a `status`.
    """
    room = console.width if console.is_terminal else sys.maxsize
    layout = _widest_that_fits(console, columns, rows, room)
    if not console.is_terminal:
        console.width = layout.width
    console.print(Text(printable(title, keep="\n"), style="bold"), soft_wrap=not console.is_terminal)
    console.print(layout.table)
    if layout.notes:
        console.print()
        for reason, note in layout.notes.items():
            console.print(Text(f"{note} {reason}", style="dim"))


@dataclass(frozen=True)
class _Layout:
    """A table, its width in characters, and the notes below it by reason."""

    table: Table
    width: int
    notes: Mapping[str, str]


def _widest_that_fits(console: Console, columns: Sequence[Column], rows: Sequence[Row], room: int) -> _Layout:
    """Return the first layout that fits: with all columns and reasons, with notes, without optional columns.

    Where none fits, names are folded, and columns are left out from the right until they have room for it.
    """
    shown = [column for column in columns if _has_values(column, rows)]
    needed = [column for column in shown if not column.optional]
    reasons = list(dict.fromkeys(printable(row["status"]) for row in rows if row["status"] != OK))
    in_full = dict(zip(reasons, reasons, strict=True))
    notes = {reason: f"[{index}]" for index, reason in enumerate(reasons, 1)}
    fewer = [needed[:number] for number in range(len(needed), 1, -1)]
    longest = max((len(printable(str(row.get("layer", "")))) for row in rows), default=0)
    foldable = max(0, longest - _NARROWEST_NAME)
    layouts = [(shown, in_full, 0), (shown, notes, 0), (needed, notes, 0)]
    layouts += [(columns, notes, foldable) for columns in fewer]
    unlimited = console.options.update(width=sys.maxsize)
    for kept, status, saved in layouts:
        table = _table(kept, rows, status)
        width = console.measure(table, options=unlimited).maximum
        if width - saved <= room:
            break
    return _Layout(table, width, {} if status is in_full else notes)


def _has_values(column: Column, rows: Sequence[Row]) -> bool:
    """Return whether a column has something to show; that of the names always has."""
    return column.key == "layer" or any(row.get(column.key) is not None for row in rows)


def _table(columns: Sequence[Column], rows: Sequence[Row], status: Mapping[str, str]) -> Table:
    """Return a table.

    `status` has what stands in the last column for each reason why a layer has no alpha; without reasons there is
    no such column.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        if column.decimals is None:
            table.add_column(column.heading, overflow="fold")
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    if status:
        table.add_column("status", overflow="fold")
    for row in rows:
        cells = []
        for column in columns:
            cell = column.cell(row)
            cells.append(Text(cell, column.styles.get(cell, "")))
        if status:
            reason = printable(row["status"])
            cells.append(Text(status.get(reason, reason)))
        table.add_row(*cells, style=None if row["status"] == OK else "dim")
    return table


def sort_rows(rows: Sequence[Row], column: str, reverse: bool) -> list[Row]:
    """Sort by a column; rows without a value come last, whatever the direction."""
    with_value = [row for row in rows if row[column] not in (None, "")]
    without = [row for row in rows if row[column] in (None, "")]
    with_value.sort(key=lambda row: row[column], reverse=reverse)
    return with_value + without
