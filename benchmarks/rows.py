"""Rows in a CSV file that a benchmark which was stopped finds again."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.results import Value, write_csv
from farms_tb.atomic_write import atomic_path

__all__ = ["Rows", "number"]

Row = dict[str, Value]


def number(text: str) -> Value:
    """Return what a cell of a CSV file says, a float where it is one; NaN for an empty cell."""
    try:
        return float(text or "nan")
    except ValueError:
        return text


class Rows(Sequence[Row]):
    """The rows of a file; each new one is on the disk at once.

    Args:
        path: the CSV file; the rows that are in it count as done.
        keys: the columns that name the run that a row comes from.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path = path
        self.keys = tuple(keys)
        self._rows: list[Row] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._rows[index]

    def missing(self, wanted: Sequence[Mapping[str, Value]]) -> Iterator[Mapping[str, Value]]:
        """Yield the runs that have no row yet.

        Args:
            wanted: what each run is of, with all keys.
        """
        done = {tuple(row[key] for key in self.keys) for row in self._rows}
        for run in wanted:
            if tuple(run[key] for key in self.keys) not in done:
                yield run

    def add(self, rows: Sequence[Row]) -> None:
        """Add the rows of one run, and write the file."""
        self._rows += rows
        with atomic_path(self.path) as part:
            write_csv(part, self._rows)
