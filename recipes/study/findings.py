"""All that a study has found, printed and written: tables, sentences, CSVs and figures, from the records alone.

`find` computes it. Below, a function for each part of the report says how that part is shown and written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.study.effects import Row, summarise
from recipes.study.figure import draw_effects, draw_mediation, draw_rules
from recipes.study.figure_sensitivity import draw_sensitivity
from recipes.study.figure_style import Style, arm_styles
from recipes.study.mediation import Contrast, Mediation, contrasts, mediation
from recipes.study.pairs import Records
from recipes.study.rules import RULES, RuleRow, effects_by_rule
from recipes.study.sensitivity import Curve, curves, rate_range
from recipes.study.table import Line, effect_columns, terminal_table, write_table
from recipes.study.units import change, heading, interval, number, p_value, show_percent, unit_of
from recipes.study.verdict import about_contrasts, about_ranges, about_rules, about_tasks, ruled_out, verdict

__all__ = ["Findings", "find", "show", "write"]

_FILES = (
    *("effects.csv", "effects.png", "rules.csv", "rules.png", "sensitivity.csv", "rate_ranges.csv"),
    *("sensitivity.png", "mediation.csv", "mediation.png", "contrasts.csv"),
)
"""All files that a report can have."""

Columns = Mapping[str, Any]
"""A row of a CSV, by the names of its columns."""


@dataclass(frozen=True)
class Findings:
    """What a study has found.

    Attributes:
        arms: The arms, in the order in which they are shown.
        baseline: The arm that the others are compared with.
        rows: The effect of each arm.
        rules: The same by three rules of scoring.
        curves: Validation error over base learning rate.
        mediation: Ratios and effect of each arm.
        contrasts: Pairs of arms with the same base rate, mean ratio and spread.
    """

    arms: tuple[str, ...]
    baseline: str
    rows: Sequence[Row]
    rules: Sequence[RuleRow]
    curves: Sequence[Curve]
    mediation: Sequence[Mediation]
    contrasts: Sequence[Contrast]

    @property
    def styles(self) -> Mapping[str, Style]:
        """How arms are drawn, in every figure."""
        return arm_styles(self.arms, self.baseline)


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        table: What is printed; None where nothing was found, and so no file is written either.
        sentences: What the table says; empty ones are left out.
        csvs: The rows of each CSV, by its name.
        figures: What draws each figure, by its name.
    """

    table: Table | None
    sentences: Sequence[str] = ()
    csvs: Mapping[str, Sequence[Columns]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)


def find(
    cells: Mapping[str, Records], own_lrs: Mapping[str, float], arms: Sequence[str], baseline: str
) -> Findings:
    """Make what can be made of the runs that are finished; see `summarise` and `effects_by_rule`."""
    mediators = mediation(cells, arms, baseline)
    return Findings(
        tuple(arms),
        baseline,
        rows=summarise(cells, arms, baseline),
        rules=effects_by_rule(cells, own_lrs, arms, baseline),
        curves=curves(cells, arms),
        mediation=mediators,
        contrasts=contrasts(mediators, cells),
    )


def show(findings: Findings, console: Console) -> None:
    """Print the tables, each with the sentences that say what it shows, and an empty line below these."""
    for part in _parts(findings):
        if part.table:
            console.print(part.table)
        said = list(filter(None, part.sentences))
        for sentence in said:
            console.print(escape(sentence), soft_wrap=True, highlight=False)
        if said:
            console.print()


def write(findings: Findings, folder: Path) -> list[str]:
    """Write the CSVs and the figures of everything that was found; return their names.

    Files of an earlier report that this one does not have are removed, since they would look like a part of it.
    """
    parts = [part for part in _parts(findings) if part.table]
    for part in parts:
        for name, rows in part.csvs.items():
            write_table(rows, folder / name)
    for part in parts:  # after all numbers are safe
        for name, draw in part.figures.items():
            draw(folder / name)
    written = [name for part in parts for name in (*part.csvs, *part.figures)]
    for name in _FILES:
        if name not in written:
            (folder / name).unlink(missing_ok=True)
    return written


def _parts(found: Findings) -> list[Part]:
    """Return the parts of the report, in order."""
    reports = (_effects, _over_tasks, _rules, _ranges, _mediation, _contrasts)
    return [report(found) for report in reports]


def _effects(found: Findings) -> Part:
    """Report the test error of each arm, and how it compares with the baseline.

    Above the errors of a cell is what they and their differences are measured in. The last column is the overhead:
    the callback's time in per cent of the baseline's training.
    """
    rows, baseline = found.rows, found.baseline
    units = {row.cell: {"test error": heading(row.error)} for row in rows}
    return Part(
        terminal_table(f"Test error by arm, compared with {baseline}", list(map(_effect_line, rows)), units),
        [verdict(rows, baseline), *ruled_out(rows, baseline)],
        {"effects.csv": list(map(_effect_row, rows))},
        {"effects.png": partial(draw_effects, rows, baseline, found.styles)},
    )


def _effect_line(row: Row) -> Line:
    """Return the line of an arm.

    The change, its interval and its p-value are empty for the baseline itself; a single pair has dashes for the
    last two.
    """
    unit = unit_of(row.error)
    line = {
        "cell": row.cell,
        "arm": row.arm,
        "lr": number(row.lr, "g"),
        "runs": f"{row.runs} ({row.diverged} diverged)" if row.diverged else f"{row.runs}",
        "test error": unit.show(row.error_mean),
        "difference": "" if row.difference is None else unit.show(row.difference.mean, "+"),
        "change %": "",
        "95% interval": "",
        "p (Holm)": "",
        "cost %": number(100 * row.overhead, ".1f"),
    }
    if not math.isnan(row.error_sd):
        line["test error"] += f" ± {unit.show(row.error_sd)}"
    if row.effect is not None:
        known = not math.isnan(row.effect.low)
        line["change %"] = show_percent(row.effect.mean)
        line["95% interval"] = interval(row.effect.low, row.effect.high) if known else "-"
        line["p (Holm)"] = p_value(row.p_holm) if known else "-"
    return line


def _effect_row(row: Row) -> Columns:
    """Return the columns of `effects.csv`; effects are log ratios there, as in the other CSVs."""
    return {
        **_fields(row, without=("effect", "difference", "over_tasks")),
        **effect_columns("effect", row.effect, ("mean", "low", "high", "p", "pairs")),
        **effect_columns("difference", row.difference),
        **effect_columns("tasks", row.over_tasks, ("mean", "low", "high", "tau", "cells")),
    }


def _fields(row: Row | Mediation | Contrast, without: Sequence[str]) -> Columns:
    """Return the fields of a row without its effects, which have several columns each."""
    return {name: value for name, value in vars(row).items() if name not in without}


def _over_tasks(found: Findings) -> Part:
    """Report the effects with the cells as a sample of tasks; `effects.csv` has them, too."""
    lines = [
        {
            "arm": row.arm,
            "cells": str(row.over_tasks.cells),
            "these tasks": change(row.effect),
            "tasks like these": change(row.over_tasks),
            "sd between tasks": f"{100 * row.over_tasks.tau:.1f}",
        }
        for row in found.rows
        if row.over_tasks is not None
    ]
    return Part(terminal_table("Change over tasks, %", lines), [about_tasks(found.rows)])


def _rules(found: Findings) -> Part:
    """Report the change by each rule of scoring."""
    rows, baseline = found.rules, found.baseline
    lines = [
        {
            "cell": row.cell,
            "arm": row.arm,
            **{title: change(row.effects[rule]) for rule, title in RULES.items()},
            "at lr, untuned": "" if math.isnan(row.papers_lr) else f"{row.papers_lr:g}, {row.untuned_lr:g}",
        }
        for row in rows
    ]
    return Part(
        terminal_table(f"Change of the test error against {baseline} by three rules, % (95% interval)", lines),
        [about_rules(rows, baseline)],
        {"rules.csv": list(map(_rule_row, rows))},
        {"rules.png": partial(draw_rules, rows, baseline, found.styles)},
    )


def _rule_row(row: RuleRow) -> Columns:
    """Return the columns of `rules.csv`."""
    columns: dict[str, Any] = {"cell": row.cell, "arm": row.arm}
    for rule in RULES:
        columns.update(effect_columns(rule, row.effects[rule], ("mean", "low", "high", "pairs")))
    return {**columns, "papers_lr": row.papers_lr, "untuned_lr": row.untuned_lr}


def _ranges(found: Findings) -> Part:
    """Report the range of learning rates within 5 % of each arm's best validation error, and the curves."""
    title = "Learning rates within 5% of the best validation error"
    return Part(
        terminal_table(title, list(map(_range_line, found.curves))),
        [about_ranges(found.curves, found.baseline)],
        {
            "sensitivity.csv": [row for curve in found.curves for row in _curve_rows(curve)],
            "rate_ranges.csv": list(map(_range_row, found.curves)),
        },
        {"sensitivity.png": partial(draw_sensitivity, found.curves, found.styles)},
    )


def _range_line(curve: Curve) -> Line:
    """Return the line of a curve."""
    span = rate_range(curve)
    low = f"{'≤ ' if span.open_below else ''}{span.low:.3g}"
    high = f"{'≥ ' if span.open_above else ''}{span.high:.3g}"
    return {
        "cell": curve.cell,
        "arm": curve.arm,
        "best lr": f"{curve.best.lr:g}",
        "error": unit_of(curve.metric).show(curve.best.error),
        "rates": f"{low} to {high}",
        "factor": f"{'≥ ' if span.at_least else ''}{span.factor:.1f}",
    }


def _curve_rows(curve: Curve) -> list[Columns]:
    """Return the columns of `sensitivity.csv`, a row for each rate, with the errors in the error's own unit.

    `low` and `high` are one standard error below and above, on the scale of logs.
    """
    return [
        {
            "cell": curve.cell,
            "arm": curve.arm,
            "metric": curve.metric,
            "lr": point.lr,
            "seeds": point.seeds,
            "diverged": point.diverged,
            "val_error": point.error,
            "low": math.exp(point.log_error - point.log_standard_error),
            "high": math.exp(point.log_error + point.log_standard_error),
        }
        for point in curve.points
    ]


def _range_row(curve: Curve) -> Columns:
    """Return the columns of `rate_ranges.csv`: the best rate, and the range of rates within 5 % of its error."""
    span = rate_range(curve)
    return {
        "cell": curve.cell,
        "arm": curve.arm,
        "best_lr": curve.best.lr,
        "best_val_error": curve.best.error,
        "low": span.low,
        "high": span.high,
        "factor": span.factor,
        "open_below": int(span.open_below),
        "open_above": int(span.open_above),
    }


def _mediation(found: Findings) -> Part:
    """Report the effect of each arm next to its mean ratio and the spread of its ratios."""
    rows, baseline = found.mediation, found.baseline
    lines = [
        {
            "cell": row.cell,
            "arm": row.arm,
            "lr": f"{row.lr:g}",
            "mean ratio": f"{row.mean_ratio:.3f}",
            "sd of ratios": f"{row.ratio_sd:.3f}",
            "lr x mean": f"{row.mean_lr:.3g}",
            "change % (95% interval)": change(row.effect),
        }
        for row in rows
    ]
    columns = [
        {
            **_fields(row, without=["effect"]),
            "mean_lr": row.mean_lr,
            **effect_columns("effect", row.effect, ("mean", "low", "high", "pairs")),
        }
        for row in rows
    ]
    figures = {}
    if any(row.effect is not None or row.arm == baseline for row in rows):
        figures["mediation.png"] = partial(draw_mediation, rows, baseline, found.styles)
    title = f"What each arm did to the learning rates, and its change of the test error against {baseline}"
    return Part(terminal_table(title, lines), csvs={"mediation.csv": columns}, figures=figures)


def _contrasts(found: Findings) -> Part:
    """Report how the errors of arms differ with the same base rate, mean ratio and spread."""
    lines = [
        {
            "cell": row.cell,
            "arm": row.first,
            "against": row.second,
            "difference % (95% interval)": change(row.effect),
            "p (Holm)": p_value(row.p_holm),
        }
        for row in found.contrasts
    ]
    columns = [
        {
            **_fields(row, without=["effect"]),
            **effect_columns("effect", row.effect, ("mean", "low", "high", "p", "pairs")),
        }
        for row in found.contrasts
    ]
    return Part(
        terminal_table("Arms with the same base rate, mean ratio and spread", lines),
        [about_contrasts(found.contrasts)] if found.mediation else [],
        {"contrasts.csv": columns},
    )
