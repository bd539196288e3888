"""Effect of every arm against the baseline, from the records alone: a row for each arm of each cell.

Nothing here trains or reads settings, so a report of a study that is still going on, or of one that was copied
from another machine, is the same computation as that of a finished one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from recipes.study.pairs import FinalRuns, Records, final_pairs, final_ratios, final_runs
from recipes.study.statistics import Effect, TaskEffect, effect_over_tasks, holm, pooled_effect

__all__ = ["POOLED", "Row", "mean_effect", "summarise"]

POOLED = "all cells"


@dataclass(frozen=True)
class Row:
    """One arm in one cell, or over all cells.

    Attributes:
        cell: Name of the cell, or `POOLED`.
        arm: The arm.
        error: What the error is, say "accuracy"; empty for the pooled rows.
        lr: Tuned base learning rate; NaN for the pooled rows.
        runs: Final runs.
        diverged: Those of them that diverged, and count with the error of a network that has learnt nothing.
        error_mean: Mean test error; NaN for the pooled rows.
        error_sd: Its standard deviation over seeds; NaN for the pooled rows or a single run.
        effect: Log ratio to the baseline; None for the baseline itself, or without a pair.
        p_holm: Its p-value, corrected over the arms of this cell; NaN where there is none.
        overhead: Time of the callback divided by the time of the baseline's training on the same seeds.
        difference: Difference of the errors, arm less baseline, in the error's own unit; None where `effect` is,
            and for the pooled rows.
        over_tasks: The effect with the cells as a sample of tasks; None but for the pooled rows, and where fewer
            than two cells have two pairs.
    """

    cell: str
    arm: str
    error: str
    lr: float
    runs: int
    diverged: int
    error_mean: float
    error_sd: float
    effect: Effect | None
    p_holm: float
    overhead: float
    difference: Effect | None = None
    over_tasks: TaskEffect | None = None


def summarise(cells: Mapping[str, Records], arms: Sequence[str], baseline: str) -> list[Row]:
    """Compare the arms with the baseline in every cell, and over all cells where there are several.

    Only pairs count: seeds for which both the arm and the baseline are done. A cell without a pair of an arm is
    not in that arm's pooled effect.

    Args:
        cells: The finished runs by cell.
        arms: The arms to show, in this order.
        baseline: The arm that the others are compared with.

    Returns:
        The rows of arms that have final runs, by cell; last the pooled ones, of arms that several cells compare
        with the baseline, and of the baseline where there is such an arm.
    """
    finals = {name: final_runs(records) for name, records in cells.items()}
    rows: list[Row] = []
    for name, runs in finals.items():
        done = [arm for arm in arms if arm in runs]
        rows += _corrected([_cell_row(name, runs, arm, baseline) for arm in done])
    if len(finals) > 1:
        every_cell = list(finals.values())
        pooled = [arm for arm in arms if arm != baseline and _cells_with_pairs(every_cell, arm, baseline) > 1]
        shown = [arm for arm in arms if pooled and arm in (*pooled, baseline)]
        rows += _corrected([_pooled_row(every_cell, arm, baseline) for arm in shown])
    return rows


def _cells_with_pairs(cells: Iterable[FinalRuns], arm: str, baseline: str) -> int:
    """Return the number of cells with a seed for which both an arm and the baseline are done."""
    return sum(bool(final_pairs(runs, arm, baseline)) for runs in cells)


def mean_effect(cells: Iterable[Mapping[int, float]]) -> Effect | None:
    """Return the mean of paired comparisons, first over the seeds of each cell; None without any.

    Args:
        cells: For each cell the comparison of each seed; cells without one are left out.
    """
    with_pairs = list(filter(None, cells))
    return pooled_effect(with_pairs) if with_pairs else None


def _difference(runs: FinalRuns, arm: str, baseline: str) -> Effect | None:
    """Return the mean difference of the test errors in one cell; None for the baseline, or without any pair."""
    if arm == baseline:
        return None
    found = final_pairs(runs, arm, baseline)
    return mean_effect([{own.seed: own.error("test") - other.error("test") for own, other in found}])


def _overhead(cells: Iterable[FinalRuns], arm: str, baseline: str) -> float:
    """Return seconds of the callback for each second of the baseline's training; NaN without any pair."""
    callback = training = 0.0
    for runs in cells:
        for own, other in final_pairs(runs, arm, baseline):
            callback += own.callback_seconds
            training += other.train_seconds
    return callback / training if training else math.nan


def _cell_row(name: str, cell: FinalRuns, arm: str, baseline: str) -> Row:
    """Return the row of one arm in one cell; its p-value is corrected later, with those of the other arms."""
    runs = list(cell[arm].values())
    errors = [run.error("test") for run in runs]
    return Row(
        cell=name,
        arm=arm,
        error=runs[0].metric,
        lr=runs[0].lr,
        runs=len(runs),
        diverged=sum(run.diverged for run in runs),
        error_mean=mean(errors),
        error_sd=stdev(errors) if len(errors) > 1 else math.nan,
        effect=mean_effect([final_ratios(cell, arm, baseline, "test")]),
        p_holm=math.nan,
        overhead=_overhead([cell], arm, baseline),
        difference=_difference(cell, arm, baseline),
    )


def _pooled_row(cells: Sequence[FinalRuns], arm: str, baseline: str) -> Row:
    """Return the row of one arm over all cells: errors of different tasks have no common mean."""
    runs = [run for cell in cells for run in cell.get(arm, {}).values()]
    ratios = [final_ratios(cell, arm, baseline, "test") for cell in cells]
    return Row(
        cell=POOLED,
        arm=arm,
        error="",
        lr=math.nan,
        runs=len(runs),
        diverged=sum(run.diverged for run in runs),
        error_mean=math.nan,
        error_sd=math.nan,
        effect=mean_effect(ratios),
        p_holm=math.nan,
        overhead=_overhead(cells, arm, baseline),
        over_tasks=effect_over_tasks(ratios),
    )


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Fill in the p-values that are corrected for the number of arms among these rows."""
    p_values = [math.nan if row.effect is None else row.effect.p for row in rows]
    return [replace(row, p_holm=p) for row, p in zip(rows, holm(p_values), strict=True)]
