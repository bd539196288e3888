"""What all tables of a study share, in the terminal and as a CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from recipes.study.records import write_rows
from recipes.study.statistics import Effect, TaskEffect

__all__ = ["Line", "Notes", "effect_columns", "terminal_table", "write_table"]

Line = Mapping[str, str]
"""What a line of a table in the terminal has below each heading; below "cell", the cell that it belongs to."""

Notes = Mapping[str, Mapping[str, str]]
"""For each cell, what the line of its name has below the other headings."""


def terminal_table(title: str, lines: Sequence[Line], notes: Notes | None = None) -> Table | None:
    """Return a table, with a line for the cell's name above the lines of each cell; None without lines.

    Args:
        title: The title.
        lines: The lines; all have the headings of the first, and those of one cell are in a row. First comes the
            name of an arm, then numbers.
        notes: What stands behind the names of cells.
    """
    if not lines:
        return None
    names, *numbers = (heading for heading in lines[0] if heading != "cell")
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    # On a narrow terminal names break, and numbers stay whole.
    table.add_column(names, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, members in groupby(lines, key=lambda line: line.get("cell", "")):
        if cell:
            own = (notes or {}).get(cell, {})
            table.add_row(f"[bold]{escape(cell)}[/bold]", *(own.get(heading, "") for heading in numbers))
        indent = "  " if cell else ""
        for line in members:
            table.add_row(indent + escape(line[names]), *(escape(line[heading]) for heading in numbers))
        table.add_section()
    return table


def effect_columns(
    prefix: str, effect: Effect | TaskEffect | None, names: Sequence[str] = ("mean", "low", "high")
) -> dict[str, float | None]:
    """Return the columns of an effect in a CSV.

    Args:
        prefix: What the names of the columns begin with.
        effect: The effect; None makes empty cells.
        names: Fields of the effect.
    """
    return {f"{prefix}_{name}": None if effect is None else getattr(effect, name) for name in names}


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV with an empty cell for each number that is missing.

    Args:
        rows: At least one row; all have the columns of the first. NaN and None are numbers that are missing.
        path: The file; its folder must exist.
    """
    # NaN alone is not equal to itself.
    table = [{name: value if value == value else None for name, value in row.items()} for row in rows]
    write_rows(path, table, list(table[0]))
