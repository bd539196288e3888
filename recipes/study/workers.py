"""Processes that run one training after the other, each on one thread and, where there are GPUs, on one GPU.

One thread each makes the results independent of the number of processes. The processes are spawned rather than
forked: a forked process can use neither CUDA nor threads that were running in the parent. They live for the whole
study, since importing torch takes longer than some of the runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import signal
import traceback
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from recipes.children import end_with_parent
from recipes.command import sentence
from recipes.console import quiet_lightning
from recipes.errors import RecipeError
from recipes.study.single import run_once

__all__ = ["Workers"]


@dataclass
class _Worker:
    """A process and what it is doing.

    Attributes:
        process: The process.
        connection: The parent's end of the pipe: settings go in, outcomes come out.
        task: Name of the run that is going on; None while the process is idle.
    """

    process: BaseProcess
    connection: Connection
    task: Hashable | None = None


class Workers:
    """A few processes that live until the `with` block ends.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        """Start the processes."""
        context = multiprocessing.get_context("spawn")
        for index in range(self._count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, index), daemon=True)
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them, in the middle of a run too."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    @property
    def idle(self) -> int:
        """Number of processes with nothing to do."""
        return sum(worker.task is None for worker in self._workers)

    @property
    def tasks(self) -> set[Hashable]:
        """Names of the runs that are going on."""
        return {worker.task for worker in self._workers if worker.task is not None}

    def submit(self, task: Hashable, settings: dict[str, Any]) -> None:
        """Give a run to an idle process.

        Args:
            task: Name of the run, by which `finished` tells of it.
            settings: All settings of the run, resolved.
        """
        worker = next(worker for worker in self._workers if worker.task is None)
        worker.task = task
        with contextlib.suppress(BrokenPipeError):  # `finished` tells of a process that died
            worker.connection.send(settings)

    def finished(self, timeout: float) -> Iterator[tuple[Any, dict[str, Any], list[str]]]:
        """Wait until a run is done, or `timeout` seconds.

        Args:
            timeout: Longest time to wait, in seconds.

        Yields:
            Name, facts and warnings of every run that is done.

        Raises:
            RecipeError: A run failed, or its process died.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        for connection in wait(list(busy), timeout):
            worker = busy[connection]  # type: ignore[index]
            outcome = _receive(worker)
            if outcome.failure:
                raise RecipeError(f"the run {worker.task} failed: {outcome.failure}")
            task = worker.task
            worker.task = None
            yield task, outcome.facts, outcome.messages


@dataclass(frozen=True)
class _Outcome:
    """What a process sends back.

    Attributes:
        facts: See `run_once`; empty where the run failed.
        messages: Warnings of the callback.
        failure: Why the run failed; empty where it did not.
    """

    facts: dict[str, Any]
    messages: list[str]
    failure: str = ""


def _receive(worker: _Worker) -> _Outcome:
    """Take the outcome of a run from its process, which may have been killed."""
    try:
        outcome: _Outcome = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        raise RecipeError(
            f"the process of {worker.task} died (exit code {worker.process.exitcode}), maybe for want of "
            "memory; repeat the command to go on, with a smaller study.workers"
        ) from None
    return outcome


def _work(connection: Connection, index: int) -> None:
    """Serve runs until the parent hangs up; `index` is this process's place among the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()
    torch.set_num_threads(1)
    quiet_lightning(logging.ERROR)
    while True:
        try:
            settings = connection.recv()
        except EOFError:
            return
        connection.send(_run(_on_device(settings, index)))


def _run(settings: dict[str, Any]) -> _Outcome:
    """Do one run quietly. A failure is sent to the parent as text: not every exception can be pickled."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            facts, messages = run_once(settings)
    except Exception as error:
        return _Outcome({}, [], sentence(error) or traceback.format_exc())
    return _Outcome(facts, messages)


def _on_device(settings: dict[str, Any], index: int) -> dict[str, Any]:
    """Spread the processes over the GPUs, where there are some and the settings use them."""
    trainer = settings["trainer"]
    wants_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda")
    if not wants_gpu or not torch.cuda.is_available():
        return settings
    gpu = index % torch.cuda.device_count()
    return {**settings, "trainer": {**trainer, "devices": [gpu]}}
