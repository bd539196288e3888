"""Processes of their own for tests: forks of one that has imported the slow packages once.

A new interpreter needs four to ten seconds of a core to import torch and Lightning; such a fork begins at once.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRELOADED = ["lightning.pytorch", "recipes.train", "tests.helpers"]
WAYS = multiprocessing.get_all_start_methods()


def child_processes() -> Any:
    """Return the context whose processes begin as forks; new interpreters where a system has no forks."""
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in WAYS else "spawn")
    if "forkserver" in WAYS:
        context.set_forkserver_preload(
            PRELOADED
        )  # of no effect once the first process has begun: one list for all
    return context


def run_script(path: Path, folder: Path, environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run a script as `python path` does, in `folder`.

    Args:
        path: the script.
        folder: where it runs, which is empty and takes what is printed.
        environment: all environment variables.
        seconds: longest time it may take.

    Returns:
        Its exit code, and what it printed.
    """
    process = child_processes().Process(target=_script, args=(path, folder, dict(environment)))
    process.start()
    try:
        process.join(seconds)
        finished = process.exitcode
    finally:
        process.kill()
    said = _printed(folder).read_text(encoding="utf-8", errors="replace")
    return (-1, f"{said}\nnot done after {seconds:g} s") if finished is None else (finished, said)


def _script(path: Path, folder: Path, environment: dict[str, str]) -> None:
    with _printed(folder).open("wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # chosen anew, by the environment
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _printed(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.txt")
