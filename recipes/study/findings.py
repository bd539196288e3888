"""All that a study has found, printed and written: tables, sentences, CSVs and figures, from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from recipes.study.figure import FIGURE_FILE, RULES_FIGURE, draw, draw_rules
from recipes.study.figure_mediation import MEDIATION_FIGURE, draw_mediation
from recipes.study.figure_sensitivity import SENSITIVITY_FIGURE, draw_sensitivity
from recipes.study.figure_style import arm_styles
from recipes.study.mediation import (
    CONTRASTS_FILE,
    MEDIATION_FILE,
    Contrast,
    Mediation,
    contrasts,
    mediation,
    write_contrasts,
    write_mediation,
)
from recipes.study.pairs import Records
from recipes.study.report import EFFECTS_FILE, Row, summarise, write_effects
from recipes.study.rules import RULES_FILE, RuleRow, effects_by_rule, write_rules
from recipes.study.sensitivity import RANGES_FILE, SENSITIVITY_FILE, Curve, curves, write_curves, write_ranges
from recipes.study.table import (
    print_contrasts,
    print_mediation,
    print_over_tasks,
    print_ranges,
    print_rows,
    print_rules,
)
from recipes.study.verdict import about_contrasts, about_ranges, about_rules, about_tasks, ruled_out, verdict

__all__ = ["Findings", "find", "show", "write"]


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


def find(
    cells: Mapping[str, Records], own_lrs: Mapping[str, float], arms: Sequence[str], baseline: str
) -> Findings:
    """Make what can be made of the runs that are finished.

    Args:
        cells: The finished runs by cell.
        own_lrs: The baseline's own learning rate in each cell, before tuning.
        arms: The arms to show, in this order.
        baseline: The arm that the others are compared with.
    """
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
    """Print the tables, each with the sentences that say what it shows."""
    rows, baseline = findings.rows, findings.baseline
    print_rows(console, rows, baseline)
    _say(console, verdict(rows, baseline), *ruled_out(rows, baseline))
    print_over_tasks(console, rows)
    _say(console, about_tasks(rows))
    print_rules(console, findings.rules, baseline)
    _say(console, about_rules(findings.rules, baseline))
    print_ranges(console, findings.curves)
    _say(console, about_ranges(findings.curves, baseline))
    print_mediation(console, findings.mediation, baseline)
    print_contrasts(console, findings.contrasts)
    if findings.mediation:
        _say(console, about_contrasts(findings.contrasts))


def _say(console: Console, *sentences: str) -> None:
    """Print sentences, each on a line of its own, and an empty line below; empty sentences are left out."""
    said = list(filter(None, sentences))
    for sentence in said:
        console.print(escape(sentence), soft_wrap=True, highlight=False)
    if said:
        console.print()


def write(findings: Findings, folder: Path) -> list[str]:
    """Write a CSV and a figure of everything that was found.

    Args:
        findings: What was found.
        folder: The folder, which must exist.

    Returns:
        The names of the files.
    """
    baseline, styles = findings.baseline, arm_styles(findings.arms, findings.baseline)
    written = []
    if findings.rows:
        write_effects(findings.rows, folder / EFFECTS_FILE)
        draw(findings.rows, baseline, styles, folder / FIGURE_FILE)
        written += [EFFECTS_FILE, FIGURE_FILE]
    if findings.rules:
        write_rules(findings.rules, folder / RULES_FILE)
        draw_rules(findings.rules, baseline, styles, folder / RULES_FIGURE)
        written += [RULES_FILE, RULES_FIGURE]
    if findings.curves:
        write_curves(findings.curves, folder / SENSITIVITY_FILE)
        write_ranges(findings.curves, folder / RANGES_FILE)
        draw_sensitivity(findings.curves, styles, folder / SENSITIVITY_FIGURE)
        written += [SENSITIVITY_FILE, RANGES_FILE, SENSITIVITY_FIGURE]
    if findings.mediation:
        write_mediation(findings.mediation, folder / MEDIATION_FILE)
        written.append(MEDIATION_FILE)
        if any(row.effect is not None or row.arm == baseline for row in findings.mediation):
            draw_mediation(findings.mediation, baseline, styles, folder / MEDIATION_FIGURE)
            written.append(MEDIATION_FIGURE)
    if findings.contrasts:
        write_contrasts(findings.contrasts, folder / CONTRASTS_FILE)
        written.append(CONTRASTS_FILE)
    return written
