"""What is common to all engines: a task, its outcome, and how a task is run where it is run."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Engine", "Outcome", "call", "look_around"]


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        task: Its name.
        result: What the function returned; None where it failed.
        failure: Why there is no result; empty where there is one.
        died: Whether the process died rather than the function raised: another try may succeed.
    """

    task: Hashable
    result: Any = None
    failure: str = ""
    died: bool = False


class Engine(Protocol):
    """Runs functions elsewhere, several at a time."""

    @property
    def slots(self) -> int:
        """Number of tasks that can run at the same time, at least 1."""

    @property
    def tasks(self) -> set[Hashable]:
        """Names of the tasks that are going on."""

    def submit(self, task: Hashable, function: Callable[[Any], Any], argument: Any) -> None:
        """Begin a task; call it only while fewer are going on than there are slots.

        Args:
            task: Its name, by which `finished` tells of it.
            function: Of a module, so that other processes can import it, or a method of what can be pickled.
            argument: A value that can be pickled.
        """

    def finished(self, timeout: float) -> Iterator[Outcome]:
        """Wait until a task is done, or `timeout` seconds, and yield the outcome of each that is done."""

    def __enter__(self) -> Engine:
        """Get ready."""

    def __exit__(self, *error: object) -> None:
        """Stop what is going on, and leave no process behind."""


def call(function: Callable[[Any], Any], argument: Any) -> tuple[Any, str]:
    """Return what a function returns, and why it failed: not every exception can be pickled, but a text can."""
    try:
        return function(argument), ""
    except Exception as error:
        from recipes.command import sentence  # brings Hydra, for what rarely fails

        return None, sentence(error) or traceback.format_exc()


def look_around(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the version of the package where this is called, and which of some paths are not there."""
    return version("farms-tb"), [path for path in paths if not Path(path).exists()]
