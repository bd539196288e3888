"""Which runs a study needs: a pure function of its options and of the runs that are finished.

So a study that was stopped goes on where it was, and the number of processes decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from recipes.study.pairs import search_error
from recipes.study.records import Job, Record

__all__ = ["ArmPlan", "Search", "Tuning", "plan_arm", "tune"]

TUNE_SEEDS_START = 1_000_000
"""Tuning has seeds of its own, out of the way of the final ones, which are 1, 2, 3, ..."""


@dataclass(frozen=True)
class Tuning:
    """How far the search for an arm's learning rate has come.

    Attributes:
        lrs: The learning rates tried or to be tried, ascending.
        missing: Runs it still needs before it knows more.
        best: The chosen learning rate; None while runs are missing.
        scores: Mean log validation error of each learning rate; infinite where a run diverged. Empty while runs
            are missing.
    """

    lrs: tuple[float, ...]
    missing: tuple[Job, ...]
    best: float | None
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ArmPlan:
    """What an arm needs.

    Attributes:
        tuning: Its search for a learning rate.
        missing: Runs that can be started now.
        done: Number of runs of the plan that are finished.
        total: Runs in all, as far as is known: the search may grow.
    """

    tuning: Tuning
    missing: tuple[Job, ...]
    done: int
    total: int


@dataclass(frozen=True)
class Search:
    """How the learning rate of an arm is searched for.

    Attributes:
        arm: The arm.
        lr: The arm's own learning rate.
        grid: Multiples of `lr` to try, ascending. A single one is taken untried.
        seeds: Runs for each.
        extend: How often the grid may grow at each end.
    """

    arm: str
    lr: float
    grid: tuple[float, ...]
    seeds: int
    extend: int

    def jobs(self, lr: float) -> list[Job]:
        """Return the runs that try one learning rate."""
        seeds = range(TUNE_SEEDS_START + 1, TUNE_SEEDS_START + self.seeds + 1)
        return [Job(self.arm, "tune", seed, lr) for seed in seeds]


def tune(search: Search, finished: Mapping[Job, Record]) -> Tuning:
    """Choose the learning rate whose mean log error on validation data is smallest; the smaller one of equals.

    A learning rate under which a run diverged is out. Where the best is at an end of the grid, the grid grows
    there by one, in the step of its last two, at most `extend` times at each end. Where all diverged it grows
    downwards, and in the end the smallest is taken. Where runs are missing, they are returned in its place.
    """
    lrs = [_tidy(search.lr * multiple) for multiple in search.grid]
    if len(lrs) == 1:
        return Tuning(tuple(lrs), missing=(), best=lrs[0], scores=())
    below = above = search.extend
    while True:
        missing = _missing(chain.from_iterable(map(search.jobs, lrs)), finished)
        if missing:
            return Tuning(tuple(lrs), missing, best=None, scores=())
        scores = [search_error([finished[job] for job in search.jobs(lr)]) for lr in lrs]
        best = scores.index(min(scores))
        if best == 0 and below > 0:
            below -= 1
            lrs.insert(0, _tidy(lrs[0] ** 2 / lrs[1]))
        elif best == len(lrs) - 1 and above > 0:
            above -= 1
            lrs.append(_tidy(lrs[-1] ** 2 / lrs[-2]))
        else:
            return Tuning(tuple(lrs), (), lrs[best], tuple(scores))


def _missing(jobs: Iterable[Job], finished: Mapping[Job, Record]) -> tuple[Job, ...]:
    """Return those of some runs that are not finished, in the same order."""
    return tuple(job for job in jobs if job not in finished)


def _tidy(lr: float) -> float:
    """Round to six digits, so that a rate reads the same everywhere."""
    return float(f"{lr:.6g}")


def plan_arm(search: Search, seeds: int, finished: Mapping[Job, Record]) -> ArmPlan:
    """Plan the search for an arm's learning rate and, once that is found, the arm's final runs.

    While the search goes on, its runs alone can be started: the final ones need its result.

    Args:
        search: How the learning rate is searched for.
        seeds: Number of final runs.
        finished: The runs so far, of this arm and maybe others.
    """
    tuning = tune(search, finished)
    searching = len(tuning.lrs) * search.seeds if len(tuning.lrs) > 1 else 0
    total = searching + seeds
    if tuning.best is None:
        return ArmPlan(tuning, tuning.missing, searching - len(tuning.missing), total)
    finals = [Job(search.arm, "final", seed, tuning.best) for seed in range(1, seeds + 1)]
    missing = _missing(finals, finished)
    return ArmPlan(tuning, missing, total - len(missing), total)
