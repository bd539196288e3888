"""Work shared among threads of the CPU, each of which holds torch to itself alone.

LAPACK's own threads gain little at the sizes of windows and round differently, as do those of a long sum. Besides,
torch's threads go on waiting for some milliseconds after each operation and take the core of others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition, local
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Held(local):
    """Inside of `one_thread`: how many threads work, and those of them that help this one."""

    number = 0
    helpers: ThreadPoolExecutor | None = None


_held = _Held()


@contextmanager
def one_thread(threads: int | None = None) -> Iterator[None]:
    """Hold torch to this thread, but for `map_on_threads`.

    Args:
        threads: how many threads that may use; None for as many as torch may outside.
    """
    before = torch.get_num_threads()
    number = threads or before
    outer = _held.number, _held.helpers
    helpers = None
    if number > 1:
        # They are started when there is work for them.
        helpers = ThreadPoolExecutor(number - 1, initializer=torch.set_num_threads, initargs=(1,))
    _held.number, _held.helpers = number, helpers
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _held.number, _held.helpers = outer
        if helpers is not None:
            helpers.shutdown()
        # A thread that sets its number sets it for every thread started later, too.
        if before > 1 or number > 1:
            torch.set_num_threads(before)


def map_on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], memory: int
) -> list[Result]:
    """Call a function for each item, on as many threads as `one_thread` allows, this one among them.

    The items are begun in their order. Where one fails no further ones are.

    Within the function torch is held to one thread, so that results don't depend on their number. Where torch is
    held to one anyway, as in loader workers, so is this.

    Args:
        function: is called for each item.
        items: what there is to do.
        sizes: bytes that each item takes while it is worked on.
        memory: bytes that all items together may take at any time. One that takes more is worked on alone.

    Returns:
        The results, in the order of the items.
    """
    if not _held.number:
        with one_thread():
            return map_on_threads(function, items, sizes, memory)
    if _held.helpers is None or len(items) < 2:
        return [function(item) for item in items]
    room = _Room(memory)
    todo = deque(range(len(items)))
    results: dict[int, Result] = {}

    def take() -> int | None:
        try:
            return todo.popleft()
        except IndexError:
            return None

    def work() -> None:
        for place in iter(take, None):
            try:
                with room.taken(sizes[place]):
                    results[place] = function(items[place])
            except BaseException:
                todo.clear()
                raise

    helping = [_held.helpers.submit(work) for _ in range(min(_held.number, len(items)) - 1)]
    try:
        work()
    finally:
        wait(helping)
    for helper in helping:
        helper.result()
    return [results[place] for place in range(len(items))]


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
