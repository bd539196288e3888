"""Samples made by several processes, one thread each.

The solvers' libraries would start a thread for each core, in every process. With one thread each the processes
share the cores, and a sample is bitwise the same whichever process makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from recipes.data.cache import Arrays
from recipes.engine import LocalEngine
from recipes.errors import RecipeError
from recipes.generate.files import Problem

__all__ = ["make_samples", "runs"]


def runs(indices: Sequence[int], longest: int) -> Iterator[range]:
    """Cut increasing numbers into ranges of consecutive ones, none longer than `longest`.

    >>> list(runs([0, 1, 2, 5, 6], 2))
    [range(0, 2), range(2, 3), range(5, 7)]
    """
    run = range(0)
    for index in indices:
        if index == run.stop and 0 < len(run) < longest:
            run = range(run.start, index + 1)
            continue
        if run:
            yield run
        run = range(index, index + 1)
    if run:
        yield run


def make_samples(problem: Problem, tasks: Iterable[range], workers: int) -> Iterator[tuple[range, Arrays]]:
    """Make samples in worker processes.

    Args:
        problem: Makes them.
        tasks: Numbers of the samples, a range a task.
        workers: Number of processes.

    Yields:
        Each task with its samples, in the order in which they get done.

    Raises:
        RecipeError: A worker was killed.
    """
    waiting = list(tasks)
    with LocalEngine(workers) as engine:
        while waiting or engine.tasks:
            while waiting and len(engine.tasks) < engine.slots:
                task = waiting.pop(0)
                engine.submit(task, _make, (problem, task))
            for outcome in engine.finished(timeout=1.0):
                if outcome.failure:
                    raise RecipeError(
                        f"samples {outcome.task} failed: {outcome.failure}; run the same command again to go on, "
                        "with fewer workers=... where memory is short"
                    )
                yield cast(range, outcome.task), outcome.result


def _make(argument: tuple[Problem, range]) -> Arrays:
    """Make the samples of a task, in a process of the engine."""
    problem, task = argument
    return problem.make(task)
