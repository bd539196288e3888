"""What a study found, from the records alone: a row for each arm of each cell, and `effects.csv`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from recipes.study.records import Job, Record, write_rows
from recipes.study.statistics import Effect, holm, pooled_effect

__all__ = ["EFFECTS_FILE", "POOLED", "Row", "percent", "summarise", "write_effects"]

EFFECTS_FILE = "effects.csv"
POOLED = "all cells"

Records = Mapping[Job, Record]


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


def summarise(cells: Mapping[str, Records], arms: Sequence[str], baseline: str) -> list[Row]:
    """Compare the arms with the baseline in every cell, and over all cells where there are several.

    Only pairs count: seeds for which both the arm and the baseline are done. A cell without a pair of an arm is
    not in that arm's pooled effect.

    Args:
        cells: The finished runs by cell.
        arms: The arms to show, in this order.
        baseline: The arm that the others are compared with.

    Returns:
        The rows of arms that have final runs, by cell; the pooled ones last.
    """
    finals = {
        name: {arm: _finals(records, arm) for arm in arms if _finals(records, arm)}
        for name, records in cells.items()
    }
    rows = []
    for name, by_arm in finals.items():
        effects = {arm: _effect([by_arm], arm, baseline) for arm in by_arm}
        rows += _corrected([_cell_row(name, by_arm, arm, baseline, effects[arm]) for arm in by_arm])
    if len(finals) > 1:
        shown = [arm for arm in arms if any(arm in by_arm for by_arm in finals.values())]
        rows += _corrected([_pooled_row(list(finals.values()), arm, baseline) for arm in shown])
    return rows


def _finals(records: Records, arm: str) -> dict[int, Record]:
    return {job.seed: record for job, record in records.items() if job.arm == arm and job.phase == "final"}


ByArm = Mapping[str, Mapping[int, Record]]


def _pairs(by_arm: ByArm, arm: str, baseline: str) -> list[tuple[Record, Record]]:
    ours, theirs = by_arm.get(arm, {}), by_arm.get(baseline, {})
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _effect(cells: Iterable[ByArm], arm: str, baseline: str) -> Effect | None:
    if arm == baseline:
        return None
    ratios = [
        {own.seed: own.log_error("test") - other.log_error("test") for own, other in _pairs(by_arm, arm, baseline)}
        for by_arm in cells
    ]
    ratios = [ratio for ratio in ratios if ratio]
    return pooled_effect(ratios) if ratios else None


def _overhead(cells: Iterable[ByArm], arm: str, baseline: str) -> float:
    pairs = [pair for by_arm in cells for pair in _pairs(by_arm, arm, baseline)]
    training = math.fsum(other.train_seconds for _, other in pairs)
    return math.fsum(own.callback_seconds for own, _ in pairs) / training if training else math.nan


def _cell_row(name: str, by_arm: ByArm, arm: str, baseline: str, effect: Effect | None) -> Row:
    runs = list(by_arm[arm].values())
    errors = [run.error("test") for run in runs]
    return Row(
        cell=name,
        arm=arm,
        error=runs[0].metric,
        lr=runs[0].lr,
        runs=len(runs),
        diverged=sum(run.status == "diverged" for run in runs),
        error_mean=mean(errors),
        error_sd=stdev(errors) if len(errors) > 1 else math.nan,
        effect=effect,
        p_holm=math.nan,
        overhead=_overhead([by_arm], arm, baseline),
    )


def _pooled_row(cells: Sequence[ByArm], arm: str, baseline: str) -> Row:
    runs = [record for by_arm in cells for record in by_arm.get(arm, {}).values()]
    return Row(
        cell=POOLED,
        arm=arm,
        error="",
        lr=math.nan,
        runs=len(runs),
        diverged=sum(run.status == "diverged" for run in runs),
        error_mean=math.nan,
        error_sd=math.nan,
        effect=_effect(cells, arm, baseline),
        p_holm=math.nan,
        overhead=_overhead(cells, arm, baseline),
    )


def _corrected(rows: Sequence[Row]) -> list[Row]:
    adjusted = holm([math.nan if row.effect is None else row.effect.p for row in rows])
    return [Row(**{**vars(row), "p_holm": p}) for row, p in zip(rows, adjusted, strict=True)]


def write_effects(rows: Iterable[Row], path: Path) -> None:
    """Write the rows as a CSV; effects are log ratios, missing numbers empty cells."""
    table = [_flat_row(row) for row in rows]
    write_rows(path, table, list(table[0]) if table else [])


def _flat_row(row: Row) -> dict[str, Any]:
    plain = vars(row).copy()
    effect = plain.pop("effect")
    names = ("mean", "low", "high", "p", "pairs")
    plain.update({f"effect_{name}": math.nan if effect is None else getattr(effect, name) for name in names})
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in plain.items()}


def percent(log_ratio: float) -> float:
    """Return the change in per cent that a log ratio of two errors stands for."""
    return 100 * math.expm1(log_ratio)
