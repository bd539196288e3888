"""Threads that each run torch single-threaded, for work on the CPU.

Small eigenvalue problems gain little from LAPACK's own threads, and both LAPACK's and torch's results then depend
on the number of threads. So every task runs on one thread, and several tasks run at the same time: the results are
bitwise identical for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded_torch(threads: int | None = None) -> Iterator[int]:
    """Run torch single-threaded and without autocast on this thread, for as long as the context lasts.

    The threads of `map_on_threads` know no autocast, so that results would depend on their number with it.

    Args:
        threads: number of worker threads that the caller may use; None for as many as torch uses now.

    Yields:
        The number of worker threads to hand to `map_on_threads`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as settings:
        settings.callback(torch.set_num_threads, before)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            settings.enter_context(torch.autocast(device, enabled=False))
        yield threads or before


def map_on_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Call a function for each item, on several threads; the results are in the order of the items.

    Args:
        function: must not call `map_on_threads` itself.
        items: what it is called with. The first ones are begun first.
        threads: number of threads; with one, or with a single item, no thread is started.

    Raises:
        Exception: what the function raised for the first item that failed, once no call is running any more.
    """
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def call(item: Item) -> Result:
        # The modes of autograd belong to a thread, and a worker starts with the default ones.
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    pool = _pool(threads)
    futures = [pool.submit(call, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # no call outlives this function


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return worker threads, the same ones at each call: new threads would have to set up libraries anew."""
    pool = ThreadPoolExecutor(threads, "farms_tb", initializer=torch.set_num_threads, initargs=(1,))
    # All threads start now: `set_num_threads` also sets the default of threads that are started later, by anybody,
    # which `single_threaded_torch` then puts back.
    started = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    return pool


if hasattr(os, "register_at_fork"):
    # A forked process has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
