"""What a study found: a table, a figure and `effects.csv`, from the records alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.study.records import Job, Record, write_rows
from recipes.study.statistics import Effect, holm, pooled_effect

__all__ = ["EFFECTS_FILE", "FIGURE_FILE", "POOLED", "Row", "draw", "print_rows", "summarise", "write_effects"]

EFFECTS_FILE = "effects.csv"
FIGURE_FILE = "effects.png"
POOLED = "all cells"
SIGNIFICANT = 0.05

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


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


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
    if row.effect is None:
        change, interval, p = "", "", ""
    else:
        change = f"{_percent(row.effect.mean):+.1f}"
        ends = (row.effect.low, row.effect.high)
        interval = "-" if math.isnan(ends[0]) else " to ".join(f"{_percent(end):+.1f}" for end in ends)
        p = "-" if math.isnan(row.p_holm) else f"{row.p_holm:.3f}" if row.p_holm >= 0.001 else "<0.001"
    overhead = "" if math.isnan(row.overhead) else f"{100 * row.overhead:.1f}"
    return [row.arm, lr, runs, error, change, interval, p, overhead]


def verdict(rows: Sequence[Row], baseline: str) -> str:
    """Say what the last cell's rows, the pooled ones where there are several cells, show."""
    last = [row for row in rows if row.cell == rows[-1].cell and row.effect is not None] if rows else []
    if not last:
        return f"Nothing to compare with {baseline} yet."
    where = "Over all cells" if last[0].cell == POOLED else f"In {last[0].cell}"
    found = [row for row in last if row.p_holm < SIGNIFICANT]
    if found:
        parts = [
            f"{row.arm} has {abs(_percent(effect.mean)):.1f}% {'less' if effect.mean < 0 else 'more'} error"
            for row in found
            if (effect := row.effect) is not None
        ]
        text = f"{where}, {' and '.join(parts)} than {baseline}, beyond the noise (5%, Holm)."
    else:
        text = f"{where}, no arm differs from {baseline} beyond the noise (5%, Holm)."
    halves = [(row.effect.high - row.effect.low) / 2 for row in last if row.effect is not None]
    if all(map(math.isfinite, halves)):
        text += (
            f" The intervals reach ±{100 * mean(halves):.1f}%: smaller effects than that can't be told from none."
        )
    return text


def draw(rows: Sequence[Row], baseline: str, path: Path) -> None:
    """Draw every arm's change with its interval, cell by cell, the pooled one lowest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.effect is not None]
    arms, names = list(dict.fromkeys(row.arm for row in shown)), list(dict.fromkeys(row.cell for row in shown))
    colours = dict(zip(arms, ("#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#CC79A7"), strict=False))
    figure = Figure(figsize=(7.5, 1.3 + 0.17 * len(shown) + 0.25 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    y, ticks, labelled = 0.0, [], set()
    for name in names:
        start = y
        for row in (row for row in shown if row.cell == name):
            assert row.effect is not None
            centre = _percent(row.effect.mean)
            ends = [centre - _percent(row.effect.low), _percent(row.effect.high) - centre]
            known = not math.isnan(ends[0])
            axes.errorbar(
                centre,
                y,
                xerr=[[ends[0]], [ends[1]]] if known else None,
                fmt="D" if name == POOLED else "o",
                markersize=5,
                capsize=2.5,
                color=colours[row.arm],
                label=None if row.arm in labelled else row.arm,
            )
            labelled.add(row.arm)
            y += 1.0
        ticks.append((start + y - 1.0) / 2)
        if name == POOLED:
            axes.axhspan(start - 0.9, y - 0.1, color="0.95", zorder=0)
        y += 0.8
    axes.axvline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.8 - 0.2, -0.8)
    axes.grid(axis="x", color="0.9", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        f"change of the test error against {baseline}, % (95% interval, paired by seed); left is better"
    )
    figure.legend(loc="outside upper center", ncols=max(1, len(arms)), frameon=False)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    figure.savefig(part, dpi=150, format=path.suffix[1:])
    part.replace(path)
