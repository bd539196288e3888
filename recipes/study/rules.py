"""The effect of each arm by three rules of scoring, so that one sees how much of a gain the rule makes.

- `last`: final weights, each arm at its rate tuned on validation data, on seeds that chose nothing. The rule of
  `effects.csv`.
- `best`: the same runs, each scored at its epoch with the best validation score.
- `papers`: each arm at the best of the rates tried and scored by the lowest test error of any epoch, against the
  baseline at its own rate, untuned. The test data choose the rate and the epoch, and only one side chooses a
  rate, so an arm that does nothing has a gain by it.

The third is computed from the tuning runs, which have the same seeds for all arms and rates; its intervals leave
out that the rate was chosen on these seeds. The baseline has a gain by it too, over itself untuned: that much is
the rule's alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from recipes.study.effects import POOLED, mean_effect
from recipes.study.pairs import Records, TuningRuns, final_ratios, final_runs, log_ratios, pairs, tuning_runs
from recipes.study.statistics import Effect

__all__ = ["RULES", "RuleRow", "effects_by_rule"]

RULES = {"last": "last epoch", "best": "best epoch by validation", "papers": "the papers' rule"}
"""The rules, and what they are called in tables and figures."""

Ratios = Mapping[int, float]
"""Log ratios of test errors, by seed."""


@dataclass(frozen=True)
class RuleRow:
    """The effect of one arm in one cell, or over all cells, by each rule.

    Attributes:
        cell: Name of the cell, or `POOLED`.
        arm: The arm.
        effects: The effect by each of `RULES`; None where there is none, as for the baseline by the first two, and
            by the third with fewer than two tuning seeds.
        papers_lr: Base learning rate of the arm that the third rule takes; NaN where there is none, and pooled.
        untuned_lr: That of the baseline it is compared with.
        cells: Names of the cells that the effects are of.
    """

    cell: str
    arm: str
    effects: Mapping[str, Effect | None]
    papers_lr: float
    untuned_lr: float
    cells: tuple[str, ...]


@dataclass(frozen=True)
class _Scored:
    """What an arm has in one cell: log ratios by rule, and the rates of the third."""

    ratios: Mapping[str, Ratios]
    papers_lr: float
    untuned_lr: float


def effects_by_rule(
    cells: Mapping[str, Records], own_lrs: Mapping[str, float], arms: Sequence[str], baseline: str
) -> list[RuleRow]:
    """Compare the arms with the baseline by each rule, in every cell and, of several, over all.

    Args:
        cells: The finished runs by cell.
        own_lrs: The baseline's own learning rate in each cell, before tuning. The rate nearest to it of those
            tried counts as untuned.
        arms: The arms to show, in this order.
        baseline: The arm that the others are compared with.

    Returns:
        The rows of arms that have an effect by the second or the third rule, by cell; the pooled ones last, of
        arms that several cells have. Results of version 0.1 have none.
    """
    scored = {name: _score_cell(records, own_lrs[name], arms, baseline) for name, records in cells.items()}
    rows = []
    for name, by_arm in scored.items():
        for arm, own in by_arm.items():
            rows.append(RuleRow(name, arm, _effects([own]), own.papers_lr, own.untuned_lr, (name,)))
    for arm in arms:
        found = {name: by_arm[arm] for name, by_arm in scored.items() if any(by_arm[arm].ratios.values())}
        if len(found) > 1:
            rows.append(RuleRow(POOLED, arm, _effects(list(found.values())), math.nan, math.nan, tuple(found)))
    return [row for row in rows if row.effects["best"] or row.effects["papers"]]


def _effects(scored: Sequence[_Scored]) -> dict[str, Effect | None]:
    """Return the effect by each rule over the cells given; None where one of them lacks it.

    The rules are compared with each other, and so must be over the same cells.
    """
    effects = {}
    for rule in RULES:
        ratios = [own.ratios[rule] for own in scored]
        effects[rule] = mean_effect(ratios) if all(ratios) else None
    return effects


def _score_cell(records: Records, own_lr: float, arms: Sequence[str], baseline: str) -> dict[str, _Scored]:
    """Return what each arm has in one cell."""
    finals, tried = final_runs(records), tuning_runs(records)
    found = {}
    for arm in arms:
        lr, untuned, papers = _papers_rule(tried, own_lr, arm, baseline)
        last = final_ratios(finals, arm, baseline, "test")
        best = final_ratios(finals, arm, baseline, "best_test")
        found[arm] = _Scored({"last": last, "best": best, "papers": papers}, lr, untuned)
    return found


def _papers_rule(tried: TuningRuns, own_lr: float, arm: str, baseline: str) -> tuple[float, float, Ratios]:
    """Score an arm by the papers' rule.

    Returns:
        The arm's rate, the baseline's and the log ratios; NaN and none where an arm has fewer than two seeds, or
        the lowest test errors are unknown.
    """
    nothing: tuple[float, float, Ratios] = (math.nan, math.nan, {})
    if arm not in tried or baseline not in tried:
        return nothing
    untuned = min(tried[baseline], key=lambda lr: abs(math.log(lr / own_lr)))
    lr = min(tried[arm], key=lambda lr: fmean(run.log_error("lowest_test") for run in tried[arm][lr].values()))
    ratios = log_ratios(pairs(tried[arm][lr], tried[baseline][untuned]), "lowest_test")
    if len(ratios) < 2:
        return nothing
    return lr, untuned, ratios
