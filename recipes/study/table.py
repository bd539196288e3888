"""A study's findings in the terminal: the table, and in a sentence or two what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """
    table = Table(box=box.SIMPLE_HEAD, title=f"Test error by arm, compared with {baseline}", title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for heading in ("lr", "runs", "test error %", "change %", "95% interval", "p (Holm)", "cost %"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, row.cell):
            table.add_section()
        table.add_row("" if row.cell == before else row.cell, *_cells(row))
        before = row.cell
    console.print(table)
    console.print(verdict(rows, baseline), soft_wrap=True)


def _cells(row: Row) -> list[str]:
    runs = f"{row.runs} ({row.diverged} diverged)" if row.diverged else str(row.runs)
    spread = "" if math.isnan(row.error_sd) else f" ± {100 * row.error_sd:.2f}"
    error = "" if math.isnan(row.error_mean) else f"{100 * row.error_mean:.2f}{spread}"
    lr = "" if math.isnan(row.lr) else f"{row.lr:g}"
    overhead = "" if math.isnan(row.overhead) else f"{100 * row.overhead:.1f}"
    return [row.arm, lr, runs, error, *_effect_cells(row), overhead]


def _effect_cells(row: Row) -> list[str]:
    """Return the change, its interval and its p-value."""
    if row.effect is None:
        return ["", "", ""]
    ends = (row.effect.low, row.effect.high)
    interval = "-" if math.isnan(ends[0]) else " to ".join(f"{percent(end):+.1f}" for end in ends)
    p = f"{row.p_holm:.3f}" if row.p_holm >= 0.001 else "<0.001"
    return [f"{percent(row.effect.mean):+.1f}", interval, "-" if math.isnan(row.p_holm) else p]


def verdict(rows: Sequence[Row], baseline: str) -> str:
    """Say what the last cell's rows, the pooled ones where there are several cells, show.

    With fewer than five seeds in a cell a study proves nothing, and the text says that first.
    """
    last = [row for row in rows if row.cell == rows[-1].cell and row.effect is not None] if rows else []
    if not last:
        return f"Nothing to compare with {baseline} yet."
    where = "Over all cells" if last[0].cell == POOLED else f"In {last[0].cell}"
    return f"{_warning_of_few_seeds(rows)}{where}, {_finding(last, baseline)}{_resolution(last)}"


def _warning_of_few_seeds(rows: Sequence[Row]) -> str:
    fewest = min(row.effect.pairs for row in rows if row.effect is not None and row.cell != POOLED)
    if fewest >= ENOUGH_SEEDS:
        return ""
    seeds = "1 seed" if fewest == 1 else f"{fewest} seeds"
    return (
        f"This proves nothing: with {seeds} chance alone can make any order of the arms; set study.seeds to at "
        f"least {ENOUGH_SEEDS}, better 10 to 20. "
    )


def _finding(rows: Sequence[Row], baseline: str) -> str:
    changes = {row.arm: percent(row.effect.mean) for row in rows if row.effect and row.p_holm < SIGNIFICANT}
    if not changes:
        return f"no arm differs from {baseline} beyond the noise (5%, Holm)."
    found = [f"{arm} has {abs(x):.1f}% {'less' if x < 0 else 'more'} error" for arm, x in changes.items()]
    return f"{' and '.join(found)} than {baseline}, beyond the noise (5%, Holm)."


def _resolution(rows: Sequence[Row]) -> str:
    """Say how small an effect the intervals can tell from none; nothing where an interval is missing."""
    halves = [(row.effect.high - row.effect.low) / 2 for row in rows if row.effect is not None]
    if not all(map(math.isfinite, halves)):
        return ""
    return f" The intervals reach ±{100 * mean(halves):.1f}%: smaller effects than that can't be told from none."
