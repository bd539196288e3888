"""Processes of this machine, each on one thread and, where there are GPUs, on one of them.

One thread each makes results independent of the number of processes. They are spawned rather than forked: a forked
process can use neither CUDA nor threads that were running in the parent. They live as long as the engine, since
importing torch takes longer than some tasks; one that dies is replaced.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from threadpoolctl import threadpool_limits

from recipes.children import end_with_parent
from recipes.engine.task import Outcome, call

__all__ = ["LocalEngine"]


@dataclass(frozen=True)
class _Process:
    """One process: a pool of its own, as a process that dies takes its whole pool along.

    Attributes:
        pool: The pool.
        pid: Its process id, once it has started.
    """

    pool: ProcessPoolExecutor
    pid: Future[int]


class LocalEngine:
    """A few processes that live until the `with` block ends.

    Args:
        processes: Their number.
        gpus: The GPUs that they are dealt out, as in `CUDA_VISIBLE_DEVICES`; empty to leave all to each.

    Attributes:
        slots: Number of processes.
    """

    def __init__(self, processes: int, gpus: Sequence[str] = ()) -> None:
        self.slots = processes
        self._free = list(range(processes))
        self._gpus = gpus
        self._pools: dict[int, _Process] = {}
        self._running: dict[Future[tuple[Any, str]], tuple[Hashable, int]] = {}

    @property
    def tasks(self) -> set[Hashable]:
        """Names of the tasks that are going on."""
        return {task for task, _ in self._running.values()}

    def __enter__(self) -> LocalEngine:
        """Do nothing: a process starts with its first task."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the processes, in the middle of a task too.

        Those without a task end by themselves: a process that is killed leaves semaphores behind, and Python warns
        of them.
        """
        for _, place in self._running.values():
            with suppress(BrokenProcessPool, ProcessLookupError):
                os.kill(self._pools[place].pid.result(), signal.SIGTERM)
        for process in self._pools.values():
            process.pool.shutdown(cancel_futures=True)
        self._pools.clear()
        self._running.clear()

    def submit(self, task: Hashable, function: Callable[[Any], Any], argument: Any) -> None:
        """Begin a task in a process that has none; see `recipes.engine.task.Engine`."""
        place = self._free.pop(0)
        try:
            future = self._pool(place).submit(call, function, argument)
        except BrokenProcessPool:  # its process died after its last task: no task is lost
            self._drop(place)
            future = self._pool(place).submit(call, function, argument)
        self._running[future] = task, place

    def finished(self, timeout: float) -> Iterator[Outcome]:
        """Wait until a task is done, or `timeout` seconds, and yield the outcome of each that is done."""
        done, _ = wait(self._running, timeout, FIRST_COMPLETED)
        for future in done:
            task, place = self._running.pop(future)
            self._free.append(place)
            try:
                result, failure = future.result()
            except BrokenProcessPool:
                self._drop(place)
                yield Outcome(task, failure="its process died, maybe for want of memory", died=True)
            except SystemExit as error:  # Lightning turns SIGTERM into it; raised here, it would end the command
                self._drop(place)
                yield Outcome(task, failure=f"its process was told to end ({_described(error)})", died=True)
            else:
                yield Outcome(task, result, failure)

    def _pool(self, place: int) -> ProcessPoolExecutor:
        """Return the pool at a place; one is started where there is none."""
        if place not in self._pools:
            gpu = self._gpus[place % len(self._gpus)] if self._gpus else None
            self._pools[place] = _started(gpu)
        return self._pools[place].pool

    def _drop(self, place: int) -> None:
        """Give up the process at a place; the next task there has a new one."""
        self._pools.pop(place).pool.shutdown()


def _described(error: SystemExit) -> str:
    """Return the kind of an exit, with its status where it has one."""
    kind = type(error).__name__
    return kind if error.code is None else f"{kind}, {error.code}"


def _started(gpu: str | None) -> _Process:
    """Start a process, and let it see one GPU alone where one is named."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(gpu,))
    return _Process(pool, pool.submit(os.getpid))


def _prepare(gpu: str | None) -> None:
    """Use one thread and one GPU, leave Ctrl-C to the parent, and end when the parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    threadpool_limits(1)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
