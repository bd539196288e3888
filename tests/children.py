"""Processes of their own for tests: forks of one that has imported the slow packages once.

A new interpreter needs four to ten seconds of a core to import torch and Lightning; such a fork begins at once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import runpy
import sys
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


def run_script(path: Path, folder: Path, environment: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a script as `python path` does, except that the packages of `PRELOADED` are imported already.

    Args:
        path: the script.
        folder: where it runs.
        environment: all environment variables.
        seconds: longest time it may take.

    Returns:
        Its exit code, None where it was stopped after that time, and what it printed.
    """
    printed = folder.with_name(f"{folder.name}.txt")
    process = start(_run_script, (path, folder), environment, printed)
    try:
        process.join(seconds)
        return process.exitcode, printed.read_text(encoding="utf-8", errors="replace")
    finally:
        process.kill()


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


def _run_script(path: Path, folder: Path) -> None:
    os.chdir(folder)
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which the processes of multiprocessing leave out
