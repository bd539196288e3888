"""Samples made by several processes, one thread each.

The solvers' libraries would start a thread for each core, in every process. With one thread each the processes
share the cores, and a sample is bitwise the same whichever process makes it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from threadpoolctl import threadpool_limits

from recipes.children import end_with_parent
from recipes.data.cache import Arrays
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
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker)
    try:
        for future in as_completed([pool.submit(_make, problem, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RecipeError(
            "a worker process was killed, perhaps for want of memory; run the same command again, with fewer "
            "workers=..., to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _make(problem: Problem, task: range) -> tuple[range, Arrays]:
    """Make the samples of a task, in a worker, and return them with the task that they belong to."""
    return task, problem.make(task)


def _prepare_worker() -> None:
    """One thread; quiet when the user presses Ctrl-C; gone when the parent is, however that ended."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
