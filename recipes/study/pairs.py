"""The runs of a cell by what they are for, and the arm's and the baseline's on the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import mean

from recipes.study.records import Job, Record, Score

__all__ = [
    "FinalRuns",
    "Records",
    "TuningRuns",
    "final_ratios",
    "final_runs",
    "log_ratios",
    "pairs",
    "tuning_runs",
]

Records = Mapping[Job, Record]

FinalRuns = Mapping[str, Mapping[int, Record]]
"""The runs of one cell that are compared, by arm and seed."""

TuningRuns = Mapping[str, Mapping[float, Mapping[int, Record]]]
"""The runs of one cell that tried learning rates, by arm, rate and seed; rates ascend."""


def final_runs(records: Records) -> FinalRuns:
    """Leave out the runs that tried learning rates, and sort the others by arm and seed.

    Args:
        records: The finished runs of a cell.

    Returns:
        The runs. An arm whose search went on after its first final runs, on a finer grid say, can have some at
        several rates. Those at one are returned: the rate with the smallest validation error in the search, or,
        where nothing was searched, the one with the most runs; the smaller one of equals.
    """
    found: dict[str, dict[float, dict[int, Record]]] = {}
    for job, record in records.items():
        if job.phase == "final":
            found.setdefault(job.arm, {}).setdefault(job.lr, {})[job.seed] = record
    tried = tuning_runs(records)
    return {arm: by_rate[_compared_rate(by_rate, tried.get(arm, {}))] for arm, by_rate in found.items()}


def _compared_rate(
    finals: Mapping[float, Mapping[int, Record]], tried: Mapping[float, Mapping[int, Record]]
) -> float:
    """Return the learning rate of those final runs of an arm that are compared; see `final_runs`.

    Args:
        finals: The arm's final runs, by rate and seed.
        tried: The arm's runs that tried rates, by rate and seed.
    """

    def rank(lr: float) -> tuple[float, int, float]:
        runs = tried.get(lr, {}).values()
        diverged = any(run.status == "diverged" for run in runs)
        error = mean(run.log_error("val") for run in runs) if runs and not diverged else math.inf
        return error, -len(finals[lr]), lr

    return min(finals, key=rank)


def tuning_runs(records: Records) -> TuningRuns:
    """Sort the runs that tried learning rates by arm, rate and seed.

    Args:
        records: The finished runs of a cell.

    Returns:
        The runs. Of each arm the rates with the most seeds alone, because means over different seeds can't be
        compared: a rate that is being tried has fewer.
    """
    found: dict[str, dict[float, dict[int, Record]]] = {}
    tried = [job for job in records if job.phase == "tune"]
    for job in sorted(tried, key=lambda job: (job.lr, job.seed)):
        found.setdefault(job.arm, {}).setdefault(job.lr, {})[job.seed] = records[job]
    return {arm: _with_most_seeds(by_rate) for arm, by_rate in found.items()}


def _with_most_seeds(by_rate: Mapping[float, Mapping[int, Record]]) -> dict[float, Mapping[int, Record]]:
    """Leave out the rates with fewer seeds than others."""
    most = max(map(len, by_rate.values()))
    return {lr: runs for lr, runs in by_rate.items() if len(runs) == most}


def pairs(runs: Mapping[int, Record], others: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    """Return runs, each with the one of the same seed among others, by ascending seed.

    Args:
        runs: Runs by seed, say those of an arm.
        others: Runs by seed, say those of the baseline; seeds that only one of the two has are left out.
    """
    common = sorted(runs.keys() & others.keys())
    return [(runs[seed], others[seed]) for seed in common]


def log_ratios(runs: Iterable[tuple[Record, Record]], score: Score) -> dict[int, float]:
    """Return the log of the first run's error over the second's, by seed.

    Args:
        runs: Pairs of runs of one seed.
        score: The score whose error is compared. Pairs without it, from results of version 0.1, are left out.
    """
    ratios = {own.seed: own.log_error(score) - other.log_error(score) for own, other in runs}
    return {seed: ratio for seed, ratio in ratios.items() if not math.isnan(ratio)}


def final_ratios(runs: FinalRuns, arm: str, baseline: str, score: Score) -> dict[int, float]:
    """Return the log of the error of an arm over that of a baseline, by seed; those of an arm to itself are none.

    Args:
        runs: The runs of a cell that are compared. An arm may have none.
        arm: The arm.
        baseline: The arm that it is compared with.
        score: See `log_ratios`.
    """
    if arm == baseline:
        return {}
    return log_ratios(pairs(runs.get(arm, {}), runs.get(baseline, {})), score)
