"""Work shared among threads of the CPU, each of which holds torch to itself alone.

LAPACK's own threads gain little at the sizes of windows and round differently, as do those of a long sum. Besides,
torch's threads go on waiting for some milliseconds after each operation and take the core of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, local
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_held = local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to this thread, but for `map_on_threads`, which may use as many as torch may outside."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    _held.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        del _held.threads
        torch.set_num_threads(threads)


def map_on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], memory: int
) -> list[Result]:
    """Call a function for each item, on as many threads as torch may use, begun in their order.

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
    before = torch.get_num_threads()
    workers = min(getattr(_held, "threads", before), len(items))
    room = _Room(memory)

    def work(item: Item, size: int) -> Result:
        with room.taken(size):
            return function(item)

    try:
        if workers < 2:
            if before > 1:
                torch.set_num_threads(1)
            return [function(item) for item in items]
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items, sizes))
    finally:
        # A thread that sets its number sets it for every thread started later, too.
        if torch.get_num_threads() != before or workers > 1:
            torch.set_num_threads(before)


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
