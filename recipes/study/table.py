"""A study's findings as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.study.mediation import Contrast, Mediation
from recipes.study.report import Row, percent
from recipes.study.rules import RULES, RuleRow
from recipes.study.sensitivity import Curve, rate_range
from recipes.study.statistics import Effect
from recipes.study.units import heading, number, unit_of

__all__ = ["print_contrasts", "print_mediation", "print_over_tasks", "print_ranges", "print_rows", "print_rules"]


def print_rows(console: Console, rows: Sequence[Row], baseline: str) -> None:
    """Print the test error of each arm and how it compares with the baseline; nothing without rows.

    Above the errors of a cell is what they and their differences are measured in. The last column is the overhead:
    the callback's time in per cent of the baseline's training.

    Args:
        console: Where to print.
        rows: The findings, those of one cell in a row.
        baseline: The arm that the others are compared with.
    """
    if not rows:
        return
    title = f"Test error by arm, compared with {baseline}"
    headings = ("lr", "runs", "test error", "difference", "change %", "95% interval", "p (Holm)", "cost %")
    table = _table(title, headings)
    units = {row.cell: ("", "", heading(row.error)) for row in rows}
    _add_groups(table, rows, _cells, units)
    console.print(table)


def _table(title: str, headings: Iterable[str]) -> Table:
    """Return an empty table; below `headings` are numbers, in front of them the arms of each cell."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    # On a narrow terminal names break, and numbers stay whole.
    table.add_column("arm", overflow="fold")
    for text in headings:
        table.add_column(text, justify="right", no_wrap=True)
    return table


def _add_groups(
    table: Table,
    rows: Iterable[Any],
    show: Callable[[Any], list[str]],
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add rows to a table, cell by cell, with a line for the cell's name above its arms.

    Args:
        table: The table.
        rows: The rows, each with a field `cell`; those of one cell in a row.
        show: What returns the columns of a row.
        notes: For each cell, what its line has in the columns behind its name.
    """
    for cell, members in groupby(rows, key=attrgetter("cell")):
        table.add_row(f"[bold]{escape(cell)}[/bold]", *(notes or {}).get(cell, ()))
        for row in members:
            table.add_row(*show(row))
        table.add_section()


def _arm(row: Any) -> str:
    """Return the name of a row's arm, set in below that of its cell."""
    return f"  {row.arm}"


def _cells(row: Row) -> list[str]:
    """Return the columns of a row, in the order of the table's headings."""
    unit = unit_of(row.error)
    runs = str(row.runs)
    if row.diverged:
        runs += f" ({row.diverged} diverged)"
    error = unit.show(row.error_mean)
    if not math.isnan(row.error_sd):
        error += f" ± {unit.show(row.error_sd)}"
    difference = "" if row.difference is None else unit.show(row.difference.mean, "+")
    lr = number(row.lr, "g")
    cost = number(100 * row.overhead, ".1f")
    return [_arm(row), lr, runs, error, difference, *_effect_cells(row), cost]


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
    interval = _interval(row.effect.low, row.effect.high)
    return [change, interval, _p_value(row.p_holm)]


def _p_value(p: float) -> str:
    """Write a p-value with no more digits than it is worth."""
    return "<0.001" if p < 0.001 else number(p, ".3f")


def _interval(low: float, high: float) -> str:
    """Write the interval of a mean log ratio as changes in per cent."""
    return f"{percent(low):+.1f} to {percent(high):+.1f}"


def _change(effect: Effect | None) -> str:
    """Write an effect in per cent with its interval; empty where there is none."""
    if effect is None:
        return ""
    change = f"{percent(effect.mean):+.1f}"
    if math.isnan(effect.low):
        return change
    return f"{change} ({_interval(effect.low, effect.high)})"


def print_over_tasks(console: Console, rows: Sequence[Row]) -> None:
    """Print the effects with the cells as a sample of tasks; nothing without such an effect.

    Args:
        console: Where to print.
        rows: The findings.
    """
    table = Table("arm", box=box.SIMPLE_HEAD, title="Change over tasks, %", title_justify="left")
    for text in ("cells", "these tasks", "tasks like these", "sd between tasks"):
        table.add_column(text, justify="right", no_wrap=True)
    for row in rows:
        tasks = row.over_tasks
        if tasks is not None:
            interval = f"{percent(tasks.mean):+.1f} ({_interval(tasks.low, tasks.high)})"
            table.add_row(row.arm, str(tasks.cells), _change(row.effect), interval, f"{100 * tasks.tau:.1f}")
    if table.row_count:
        console.print(table)


def print_rules(console: Console, rows: Sequence[RuleRow], baseline: str) -> None:
    """Print the change by each rule; nothing without rows.

    Args:
        console: Where to print.
        rows: The effects by rule.
        baseline: The arm that the others are compared with.
    """
    if not rows:
        return
    title = f"Change of the test error against {baseline} by three rules, % (95% interval)"
    table = _table(title, ("last epoch", "best epoch by validation", "the papers' rule", "at lr, untuned"))
    _add_groups(table, rows, _rule_cells)
    console.print(table)


def _rule_cells(row: RuleRow) -> list[str]:
    """Return the columns of a row."""
    rates = ""
    if not math.isnan(row.papers_lr):
        rates = f"{row.papers_lr:g}, {row.untuned_lr:g}"
    return [_arm(row), *(_change(row.effects[rule]) for rule in RULES), rates]


def print_ranges(console: Console, found: Sequence[Curve]) -> None:
    """Print the range of learning rates within 5 % of each arm's best validation error; nothing without curves.

    Args:
        console: Where to print.
        found: The curves.
    """
    if not found:
        return
    table = _table(
        "Learning rates within 5% of the best validation error", ("best lr", "error", "rates", "factor")
    )
    _add_groups(table, found, _range_cells)
    console.print(table)


def _range_cells(curve: Curve) -> list[str]:
    """Return the columns of a curve."""
    span = rate_range(curve)
    low = f"{'≤ ' if span.open_below else ''}{span.low:.3g}"
    high = f"{'≥ ' if span.open_above else ''}{span.high:.3g}"
    factor = f"{'≥ ' if span.at_least else ''}{span.factor:.1f}"
    error = unit_of(curve.metric).show(curve.best.error)
    return [_arm(curve), f"{curve.best.lr:g}", error, f"{low} to {high}", factor]


def print_mediation(console: Console, rows: Sequence[Mediation], baseline: str) -> None:
    """Print the effect of each arm next to its mean ratio and the spread of its ratios; nothing without rows.

    Args:
        console: Where to print.
        rows: What each arm did.
        baseline: The arm that the others are compared with.
    """
    if not rows:
        return
    title = f"What each arm did to the learning rates, and its change of the test error against {baseline}"
    table = _table(title, ("lr", "mean ratio", "sd of ratios", "lr x mean", "change % (95% interval)"))
    _add_groups(table, rows, _mediation_cells)
    console.print(table)


def _mediation_cells(row: Mediation) -> list[str]:
    """Return the columns of a row."""
    change = _change(row.effect)
    return [_arm(row), f"{row.lr:g}", f"{row.mean_ratio:.3f}", f"{row.ratio_sd:.3f}", f"{row.mean_lr:.3g}", change]


def print_contrasts(console: Console, found: Sequence[Contrast]) -> None:
    """Print how the errors of arms differ with the same base rate, mean ratio and spread; nothing without any.

    Args:
        console: Where to print.
        found: The contrasts.
    """
    if not found:
        return
    title = "Arms with the same base rate, mean ratio and spread"
    table = _table(title, ("against", "difference % (95% interval)", "p (Holm)"))
    _add_groups(table, found, _contrast_cells)
    console.print(table)


def _contrast_cells(contrast: Contrast) -> list[str]:
    """Return the columns of a contrast."""
    return [f"  {contrast.first}", contrast.second, _change(contrast.effect), _p_value(contrast.p_holm)]
