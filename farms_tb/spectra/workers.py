"""Work shared among threads of the CPU, each of which holds torch to itself alone.

LAPACK's own threads gain little at the sizes of windows and round differently, as do those of a long sum. Besides,
torch's threads go on waiting for some milliseconds after each operation and take the core of others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from threading import Barrier, Condition, local
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Held(local):
    """Inside of `one_thread`: how many threads work."""

    number = 0


_held = _Held()
# The last ones are kept: new ones would have to ask for memory, and libraries to set themselves up in them.
_kept: list[tuple[int, ThreadPoolExecutor]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)  # where they are no more


def _helpers(number: int) -> ThreadPoolExecutor:
    """Return at least as many threads, each of which holds torch to itself."""
    if not _kept or _kept[0][0] < number:
        helpers = ThreadPoolExecutor(number, "farms_tb")
        # All of them now: a thread that sets its number sets it for every thread started later, too.
        met = Barrier(number + 1)

        def start() -> None:
            torch.set_num_threads(1)
            met.wait()

        try:
            for _ in range(number):
                helpers.submit(start)
            met.wait()
        except BaseException:
            met.abort()
            raise
        _kept[:] = [(number, helpers)]
    return _kept[0][1]


def number_of_threads() -> int:
    """Return how many threads `work_on_threads` may use here."""
    return _held.number or torch.get_num_threads()


@contextmanager
def one_thread(threads: int | None = None) -> Iterator[None]:
    """Hold torch to this thread, but for what is shared by `work_on_threads`.

    Args:
        threads: how many threads that may use; None for as many as torch may outside.
    """
    before = torch.get_num_threads()
    number = threads or before
    outer, _held.number = _held.number, number
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _held.number = outer
        if before > 1 or number > 1:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Task(Generic[Item]):
    """Something to do.

    Attributes:
        item: what it is done to.
        size: bytes that it takes while it is worked on.
        cost: how long it takes, with all that follows from it, in proportion to that of other tasks.
    """

    item: Item
    size: int = 0
    cost: float = 0.0


def work_on_threads(
    function: Callable[[Item], tuple[Result, list[Task[Item]]]],
    tasks: Sequence[Task[Item]],
    memory: int,
    worth_a_thread: float = 0.0,
) -> list[Result]:
    """Do tasks, and those that follow from them, on as many threads as `one_thread` allows, this one among them.

    Within the function torch is held to one thread, so that results don't depend on their number. Where torch is
    held to one anyway, as in loader workers, so is this, unless it is told otherwise.

    Args:
        function: does a task; returns what came out, and the tasks that follow.
        tasks: what there is to do at first. The costliest are begun first. Where one fails no further ones are.
        memory: bytes that all together may take at any time. A task that takes more is done alone.
        worth_a_thread: the cost from which on another thread takes part.

    Returns:
        What came out of all tasks, in the order in which they were done.
    """
    if not _held.number:
        with one_thread():
            return work_on_threads(function, tasks, memory, worth_a_thread)
    todo = _Todo(tasks)
    room = _Room(memory)
    results: list[Result] = []

    def work() -> None:
        for task in todo:
            following: list[Task[Item]] = []
            try:
                with room.taken(task.size):
                    result, following = function(task.item)
                results.append(result)
            except BaseException:
                todo.give_up()
                raise
            finally:
                todo.done(following)

    number = outer = _held.number
    if worth_a_thread:
        number = min(number, math.ceil(sum(task.cost for task in tasks) / worth_a_thread))
    helping = [_helpers(number - 1).submit(work) for _ in range(number - 1)]
    _held.number = 1  # what a task shares in its turn is its own
    try:
        work()
    except BaseException:
        todo.give_up()
        raise
    finally:
        _held.number = outer
        # Those that help somebody else meanwhile are not needed.
        wait([helper for helper in helping if not helper.cancel()])
    for helper in helping:
        if not helper.cancelled():
            helper.result()
    return results


def map_on_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float] | None = None,
    worth_a_thread: float = 1.0,
) -> list[Result]:
    """Call a function for each item, on threads as `work_on_threads` does; results are in order of the items."""

    def numbered(place: int) -> tuple[tuple[int, Result], list[Task[int]]]:
        return (place, function(items[place])), []

    tasks = [Task(place, cost=1.0 if costs is None else costs[place]) for place in range(len(items))]
    found = work_on_threads(numbered, tasks, 0, worth_a_thread)
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


class _Todo(Generic[Item]):
    """Tasks that threads take, the costliest first, until there are none and nobody is at work on more."""

    def __init__(self, tasks: Sequence[Task[Item]]) -> None:
        self._number = 0
        self._given_up = False
        self._heap: list[tuple[float, int, Task[Item]]] = []
        self._taken = 0
        self._changed = Condition()
        self._add(tasks)

    def _add(self, tasks: Sequence[Task[Item]]) -> None:
        for task in () if self._given_up else tasks:
            self._number += 1
            heappush(self._heap, (-task.cost, self._number, task))

    def __iter__(self) -> Iterator[Task[Item]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._heap or not self._taken)
                if not self._heap:
                    return
                *_, task = heappop(self._heap)
                self._taken += 1
            yield task

    def done(self, following: Sequence[Task[Item]]) -> None:
        """Tell that a task that was taken is done, and what follows."""
        with self._changed:
            self._add(following)
            self._taken -= 1
            self._changed.notify_all()

    def give_up(self) -> None:
        """Drop the tasks that nobody has taken, and those that would follow."""
        with self._changed:
            self._given_up = True
            self._heap.clear()
            self._changed.notify_all()


class _Room:
    """Memory that threads take and give back."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until there is room; whoever needs more than there is gets all of it."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
