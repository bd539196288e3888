"""Processes of their own for tests: forks of one that has imported the slow packages once.

A new interpreter needs four to ten seconds of a core to import torch and Lightning; such a fork begins at once.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

PRELOADED = ["lightning.pytorch", "recipes.train", "tests.helpers"]
WAYS = multiprocessing.get_all_start_methods()


def child_processes() -> Any:
    """Return the context whose processes begin as forks; new interpreters where a system has no forks."""
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in WAYS else "spawn")
    if "forkserver" in WAYS:
        # One list for all tests: it is of no effect once the first process has begun.
        context.set_forkserver_preload(PRELOADED)
    return context


def start(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    printed: Path,
    *,
    fresh: bool = False,
) -> Any:
    """Start a process.

    Args:
        function: what it runs, of a module.
        arguments: its arguments.
        environment: all environment variables.
        printed: the file that takes what the process prints.
        fresh: begin as a new interpreter, in which sets have an order of their own, and not as a fork.

    Returns:
        A `multiprocessing.Process`.
    """
    context: Any = multiprocessing.get_context("spawn") if fresh else child_processes()
    process = context.Process(target=_begin, args=(function, arguments, dict(environment), printed))
    process.start()
    return process


def _begin(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], printed: Path
) -> None:
    with printed.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # chosen anew, by the environment
    torch.set_num_threads(1)  # tests run side by side
    for seed in (random.seed, numpy.random.seed, torch.seed):
        seed()  # forks would draw the same numbers
    function(*arguments)
