"""The runs of a cell by what they are for, and the arm's and the baseline's on the same seed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean

from recipes.study.records import Job, Phase, Record, Score

__all__ = [
    "FinalRuns",
    "Records",
    "TuningRuns",
    "final_pairs",
    "final_ratios",
    "final_runs",
    "log_ratios",
    "pairs",
    "search_error",
    "tuning_runs",
]

Records = Mapping[Job, Record]

FinalRuns = Mapping[str, Mapping[int, Record]]
"""The runs of one cell that are compared, by arm and seed."""

TuningRuns = Mapping[str, Mapping[float, Mapping[int, Record]]]
"""The runs of one cell that tried learning rates, by arm, rate and seed; rates ascend."""


def final_runs(records: Records) -> FinalRuns:
    """Leave out the runs of a cell that tried learning rates, and sort the others by arm and seed.

    An arm whose search went on after its first final runs, on a finer grid say, can have some at several rates.
    Those at one are returned: the rate with the smallest validation error in the search, or, where nothing was
    searched, the one with the most runs; the smaller one of equals.
    """
    tried = tuning_runs(records)
    found = _runs_of_phase(records, "final")
    return {arm: by_rate[_compared_rate(by_rate, tried.get(arm, {}))] for arm, by_rate in found.items()}


def _runs_of_phase(records: Records, phase: Phase) -> dict[str, dict[float, dict[int, Record]]]:
    """Sort the runs of one phase by arm, rate and seed; rates and seeds ascend."""
    found: dict[str, dict[float, dict[int, Record]]] = {}
    jobs = [job for job in records if job.phase == phase]
    for job in sorted(jobs, key=lambda job: (job.lr, job.seed)):
        found.setdefault(job.arm, {}).setdefault(job.lr, {})[job.seed] = records[job]
    return found


def _compared_rate(
    finals: Mapping[float, Mapping[int, Record]], tried: Mapping[float, Mapping[int, Record]]
) -> float:
    """Return the learning rate of those final runs of an arm that are compared; see `final_runs`."""
    return min(finals, key=lambda lr: (search_error(tried.get(lr, {}).values()), -len(finals[lr]), lr))


def search_error(runs: Collection[Record]) -> float:
    """Return the error by which a learning rate is chosen: the mean log validation error of its runs.

    Args:
        runs: The runs that tried it. Without any, or where one of them diverged, the error is infinite.
    """
    if not runs or any(run.diverged for run in runs):
        return math.inf
    return fmean(run.log_error("val") for run in runs)


def tuning_runs(records: Records) -> TuningRuns:
    """Sort the runs of a cell that tried learning rates by arm, rate and seed.

    Of each arm the rates with the most seeds alone are returned, because means over different seeds can't be
    compared: a rate that is being tried has fewer.
    """
    kept: dict[str, dict[float, dict[int, Record]]] = {}
    for arm, by_rate in _runs_of_phase(records, "tune").items():
        most = max(map(len, by_rate.values()))
        kept[arm] = {lr: runs for lr, runs in by_rate.items() if len(runs) == most}
    return kept


def pairs(runs: Mapping[int, Record], others: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    """Return the runs for whose seed there is another run, each with that one, by ascending seed."""
    common = sorted(runs.keys() & others.keys())
    return [(runs[seed], others[seed]) for seed in common]


def log_ratios(runs: Iterable[tuple[Record, Record]], score: Score) -> dict[int, float]:
    """Return the log of the first run's error over the second's, by seed, for pairs of runs of one seed.

    Pairs without the score, from results of version 0.1, are left out.
    """
    ratios = {own.seed: own.log_error(score) - other.log_error(score) for own, other in runs}
    return {seed: ratio for seed, ratio in ratios.items() if not math.isnan(ratio)}


def final_pairs(runs: FinalRuns, arm: str, baseline: str) -> list[tuple[Record, Record]]:
    """Return the final runs of an arm, each with the baseline's of the same seed, by ascending seed."""
    return pairs(runs.get(arm, {}), runs.get(baseline, {}))


def final_ratios(runs: FinalRuns, arm: str, baseline: str, score: Score) -> dict[int, float]:
    """Return the log of the error of an arm over that of a baseline, by seed; none for an arm and itself."""
    return {} if arm == baseline else log_ratios(final_pairs(runs, arm, baseline), score)
