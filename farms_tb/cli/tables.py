"""Rows as a table for the eye."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from farms_tb.report import OK

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: which figure of a row.
        heading: what stands above it.
        form: format specification of a number; empty for text.
        optional: left out where the terminal is too narrow for all.
    """

    key: str
    heading: str
    form: str = ""
    optional: bool = False

    def cell(self, row: Row) -> str:
        """Return the figure as text; a dash where there is none."""
        value = row.get(self.key)
        if self.form:
            return "-" if value is None else format(value, self.form)
        return str(value) or "-"


def print_table(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print rows as a table, in the layout with most in it that fits the console.

    Reasons stand in a column of their own where there is room, as numbered notes below the table where not.
    """
    # What is piped into a file or a pager keeps a line for each layer.
    room = console.width if console.is_terminal else sys.maxsize
    reasons = list(dict.fromkeys(row["status"] for row in rows if row["status"] != OK))
    notes = {reason: f"[{number}]" for number, reason in enumerate(reasons, 1)}
    shown = [c for c in columns if not c.form or any(row.get(c.key) is not None for row in rows)]
    for number in range(3):
        noted = number > 0 and bool(reasons)
        kept = [c for c in shown if number < 2 or not c.optional]
        table = _table(kept, rows, notes if noted else dict(zip(reasons, reasons, strict=True)))
        width = console.measure(table, options=console.options.update(width=sys.maxsize)).maximum
        if width <= room:
            break
    if not console.is_terminal:
        console.width = width
    console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
    console.print(table)
    if noted:
        console.print()
        for reason, note in notes.items():
            console.print(Text(f"{note} {reason}", style="dim"))


def _table(columns: Sequence[Column], rows: Sequence[Row], status: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        if column.form:
            table.add_column(column.heading, justify="right", no_wrap=True)
        else:
            table.add_column(column.heading, overflow="fold")
    if status:
        table.add_column("status", overflow="fold")
    for row in rows:
        cells = [column.cell(row) for column in columns]
        if status:
            cells.append(status.get(row["status"], row["status"]))
        table.add_row(*map(Text, cells), style=None if row["status"] == OK else "dim")
    return table


def sort_rows(rows: Sequence[Row], column: str, reverse: bool) -> list[Row]:
    """Sort by a column; rows without a value come last, whatever the direction.

    Raises:
        ValueError: there is no such column.
    """
    with_value = [row for row in rows if row[column] not in (None, "")]
    without = [row for row in rows if row[column] in (None, "")]
    return [*sorted(with_value, key=lambda row: row[column], reverse=reverse), *without]
