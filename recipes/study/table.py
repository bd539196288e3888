"""A study's findings in the terminal: the table, and in a sentence or two what it says.

The sentence is there because a table of intervals is easily read as more than it shows: it names the arms that
differ beyond the noise, how small an effect this study could have seen, and whether it has seeds enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.study.report import POOLED, Row, percent

__all__ = ["ENOUGH_SEEDS", "print_rows", "verdict"]

SIGNIFICANT = 0.05
ENOUGH_SEEDS = 5
"""With fewer pairs, a t-interval rests on a standard deviation that is itself mostly chance."""


def print_rows(console: Console, rows: Sequence[Row], baseline: str) -> None:
    """Print the table and, in a sentence, what it says.

    The last column is the overhead: the callback's time in per cent of the baseline's training.

    Args:
        console: Where to print.
        rows: The findings, those of one cell in a row.
        baseline: The arm that the others are compared with.
    """
    table = Table(box=box.SIMPLE_HEAD, title=f"Test error by arm, compared with {baseline}", title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for heading in ("lr", "runs", "test error %", "change %", "95% interval", "p (Holm)", "cost %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, members in groupby(rows, key=attrgetter("cell")):
        first, *others = members
        table.add_row(cell, *_cells(first))
        for row in others:
            table.add_row("", *_cells(row))
        table.add_section()
    console.print(table)
    console.print(verdict(rows, baseline), soft_wrap=True)


def _cells(row: Row) -> list[str]:
    """Return the cells of a row behind the name of the cell, in the order of the table's headings."""
    runs = str(row.runs)
    if row.diverged:
        runs += f" ({row.diverged} diverged)"
    error = _number(100 * row.error_mean, ".2f")
    if not math.isnan(row.error_sd):
        error += f" ± {100 * row.error_sd:.2f}"
    lr = _number(row.lr, "g")
    cost = _number(100 * row.overhead, ".1f")
    return [row.arm, lr, runs, error, *_effect_cells(row), cost]


def _number(value: float, form: str) -> str:
    """Format a number; NaN, which stands for one that is missing, becomes an empty cell."""
    if math.isnan(value):
        return ""
    return format(value, form)


def _effect_cells(row: Row) -> list[str]:
    """Return the cells of the comparison with the baseline.

    Args:
        row: The row of an arm.

    Returns:
        The change, its interval and its p-value. All are empty for the baseline itself; a single pair has dashes
        for the last two.
    """
    if row.effect is None:
        return ["", "", ""]
    change = f"{percent(row.effect.mean):+.1f}"
    if math.isnan(row.effect.low):
        return [change, "-", "-"]
    interval = f"{percent(row.effect.low):+.1f} to {percent(row.effect.high):+.1f}"
    if row.p_holm < 0.001:
        return [change, interval, "<0.001"]
    return [change, interval, f"{row.p_holm:.3f}"]


def verdict(rows: Sequence[Row], baseline: str) -> str:
    """Say what the last cell's rows, the pooled ones where there are several cells, show.

    With fewer than five seeds in a cell a study proves nothing, and the text says that first.

    Args:
        rows: The findings; those of the last cell stand last.
        baseline: The arm that the others are compared with.

    Returns:
        One to three sentences.
    """
    compared = [row for row in rows if row.effect is not None]
    last = [row for row in compared if row.cell == rows[-1].cell]
    if not last:
        return f"Nothing to compare with {baseline} yet."
    warning = _warning_of_few_seeds(compared)
    where = f"In {last[0].cell}"
    if last[0].cell == POOLED:
        where = "Over all cells"
    return f"{warning}{where}, {_finding(last, baseline)}{_resolution(last)}"


def _warning_of_few_seeds(rows: Sequence[Row]) -> str:
    """Return the sentence for a study whose smallest cell has too few pairs.

    Args:
        rows: The rows with an effect, of all cells; pooled rows are not looked at.

    Returns:
        The sentence, which ends in a space; empty where every cell has enough pairs.
    """
    fewest = min(row.effect.pairs for row in rows if row.effect is not None and row.cell != POOLED)
    if fewest >= ENOUGH_SEEDS:
        return ""
    seeds = f"{fewest} seeds"
    if fewest == 1:
        seeds = "1 seed"
    return (
        f"This proves nothing: with {seeds} chance alone can make any order of the arms; set study.seeds to at "
        f"least {ENOUGH_SEEDS}, better 10 to 20. "
    )


def _finding(rows: Sequence[Row], baseline: str) -> str:
    """Name the arms that differ from the baseline beyond the noise.

    Args:
        rows: The rows with an effect of one cell, or the pooled ones.
        baseline: The arm that they are compared with.
    """
    found = []
    for row in rows:
        significant = row.p_holm < SIGNIFICANT  # NaN is not
        if significant and row.effect is not None:
            found.append(f"{row.arm} has {_change(percent(row.effect.mean))} error")
    if not found:
        return f"no arm differs from {baseline} beyond the noise (5%, Holm)."
    return f"{' and '.join(found)} than {baseline}, beyond the noise (5%, Holm)."


def _change(percentage: float) -> str:
    """Return a change in words, `"3.0% less"`."""
    size = f"{abs(percentage):.1f}%"
    if percentage < 0:
        return f"{size} less"
    return f"{size} more"


def _resolution(rows: Sequence[Row]) -> str:
    """Say how small an effect the intervals can tell from none; nothing where an interval is missing."""
    halves = [(row.effect.high - row.effect.low) / 2 for row in rows if row.effect is not None]
    reach = 100 * mean(halves)
    if math.isnan(reach):
        return ""
    return f" The intervals reach ±{reach:.1f}%: smaller effects than that can't be told from none."
