"""What an effect goes with: the mean learning-rate ratio of an arm, and the spread of the ratios over the layers.

An arm changes three things at once: the learning rate of the whole net (lr times the mean ratio), how unequal
the layers' rates are (the spread), and which layer has which. Arms that agree in the first two and differ in the
third, as FARMS and its placebo do, tell the third from the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean

from recipes.study.effects import mean_effect
from recipes.study.pairs import FinalRuns, Records, final_ratios, final_runs
from recipes.study.statistics import Effect, holm

__all__ = ["Contrast", "Mediation", "contrasts", "mediation"]

ALIKE = 0.05
"""Mean ratios, spreads and the logs of base learning rates that differ by less count as the same."""


@dataclass(frozen=True)
class Mediation:
    """What one arm did to the learning rates in one cell, and its effect.

    Attributes:
        cell: Name of the cell.
        arm: The arm.
        lr: Tuned base learning rate.
        mean_ratio: Mean ratio over layers, measurements and seeds.
        ratio_sd: Standard deviation of the ratios over layers; its mean over measurements and seeds.
        effect: Mean log ratio of test errors to the baseline; None for the baseline itself, or without a pair.
    """

    cell: str
    arm: str
    lr: float
    mean_ratio: float
    ratio_sd: float
    effect: Effect | None

    @property
    def mean_lr(self) -> float:
        """Base learning rate times mean ratio: the learning rate of the net as a whole."""
        return self.lr * self.mean_ratio


@dataclass(frozen=True)
class Contrast:
    """Two arms with the same base learning rate, mean ratio and spread of ratios.

    Attributes:
        cell: Name of the cell.
        first: One arm.
        second: The other.
        effect: Mean log ratio of the test error of the first to that of the second.
        p_holm: Its p-value, corrected over the contrasts of the cell; NaN where there is none.
    """

    cell: str
    first: str
    second: str
    effect: Effect
    p_holm: float


def mediation(cells: Mapping[str, Records], arms: Sequence[str], baseline: str) -> list[Mediation]:
    """Return what each arm with final runs did, cell by cell; results of version 0.1 do not know the ratios."""
    found = []
    for name, records in cells.items():
        runs = final_runs(records)
        found += [_mediation(name, runs, arm, baseline) for arm in arms if arm in runs]
    return [row for row in found if not math.isnan(row.mean_ratio)]


def _mediation(name: str, runs: FinalRuns, arm: str, baseline: str) -> Mediation:
    """Return what an arm did in one cell."""
    own = list(runs[arm].values())
    ratio = mean(run.mean_ratio for run in own)
    spread = mean(run.ratio_sd for run in own)
    return Mediation(name, arm, own[0].lr, ratio, spread, _effect(runs, arm, baseline))


def _effect(runs: FinalRuns, first: str, second: str) -> Effect | None:
    """Return the mean log ratio of test errors of two arms; None without a pair, or for an arm and itself."""
    return mean_effect([final_ratios(runs, first, second, "test")])


def contrasts(rows: Sequence[Mediation], cells: Mapping[str, Records]) -> list[Contrast]:
    """Compare the arms with each other that have the same base learning rate, mean ratio and spread of ratios.

    Where their errors differ, it matters which layer has which ratio. Where they do not, it does not matter, if
    the two arms give their ratios to different layers, as an arm and its permutation do; that is not looked at.
    Arms without any spread gave every layer the same, and are compared with none.
    """
    found: list[Contrast] = []
    for name, records in cells.items():
        runs = final_runs(records)
        uneven = [row for row in rows if row.cell == name and row.ratio_sd > ALIKE]
        compared = []
        for first, second in combinations(uneven, 2):
            effect = _effect(runs, first.arm, second.arm)
            if _alike(first, second) and effect is not None:
                compared.append(Contrast(name, first.arm, second.arm, effect, math.nan))
        p_values = holm([contrast.effect.p for contrast in compared])
        found += [replace(contrast, p_holm=p) for contrast, p in zip(compared, p_values, strict=True)]
    return found


def _alike(first: Mediation, second: Mediation) -> bool:
    """Return whether two arms have the same base learning rate, mean ratio and spread."""
    differences = (
        math.log(first.lr / second.lr),
        first.mean_ratio - second.mean_ratio,
        first.ratio_sd - second.ratio_sd,
    )
    return max(map(abs, differences)) < ALIKE
