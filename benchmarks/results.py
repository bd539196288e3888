"""What a benchmark leaves behind: CSV files, pictures, and its tables on the page of its folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from farms_tb.atomic_write import write_text_atomically

BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"
BLUE, ORANGE, GREEN, PURPLE = "#3B528B", "#D55E00", "#2A9D6F", "#8E4FA8"

Value = float | int | str


def write_csv(path: Path, rows: Sequence[Mapping[str, Value]]) -> None:
    """Write rows of numbers with six digits; a number that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table; the columns are those of the first row, numbers to the right. Without rows it is empty."""
    if not rows:
        return ""
    columns = list(rows[0])
    numeric = [all(re.match(r"(< )?[-+]?[\d.]*(\d|$)", row[name]) for row in rows) for name in columns]
    lines = [columns, ["--:" if right else "---" for right in numeric], *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(folder: Path, measured: str) -> None:
    """Put what was measured onto the page of the folder, in the place of what was measured before.

    Args:
        folder: holds `README.md`, with the marks `BEGIN` and `END` around that place; made where it is missing.
        measured: Markdown.
    """
    page = folder / "README.md"
    if not page.exists():
        page.write_text(BEGIN + END, encoding="utf-8")
    replace_between(page, BEGIN, END, measured)


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put text onto a page, in the place of what stands there between two marks.

    Args:
        page: a file of Markdown.
        begin: the first mark.
        end: the first one of these below `begin` is the second mark.
        text: Markdown.

    Raises:
        ValueError: the page does not have the marks.
    """
    before, begin_there, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end_there, after = rest.partition(end)
    if not (begin_there and end_there):
        raise ValueError(f"{page} has no place for the tables: a line {begin} and, below it, a line {end}")
    whole = f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"
    write_text_atomically(page, whole if whole.endswith("\n") else whole + "\n")
