"""Warnings: once, on rank zero, pointing at the user's own line.

Everything in the package that warns does it by `warn_once`. Python's own registry shows a warning once for each
line of code; here the object that is warned about counts, so that a second model gets its own warnings, and the
second epoch of the first model none. Users filter these warnings as any other `UserWarning`, by message or module.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from weakref import WeakKeyDictionary

import torch.distributed as dist

from farms_tb.printable import printable

# Packages that call farms_tb, or call the user's code that does: a line in them tells the user nothing.
_LIBRARIES = {
    *("farms_tb", "torch", "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "accelerate"),
    *("hydra", "jsonargparse", "contextlib", "functools", "threading", "dataclasses"),
}

_said: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(message: str, about: object) -> None:
    r"""Warn on rank zero, unless the same message about the same object was given before.

    The warning points at the innermost line of the call stack that is outside farms_tb, torch and the trainers:
    the user's own line, `trainer.fit(...)` for example.

    Args:
        message: the warning. It may hold names that somebody else has made: characters that a terminal may take
            for a command are escaped, all but `"\n"`.
        about: an object or a class that can be weakly referenced; the same message about another one is another
            warning.
    """
    messages = _said.setdefault(about, set())
    if message in messages:
        return
    messages.add(message)
    message = printable(message, keep="\n")
    if _rank() > 0:
        return
    frame = _users_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        UserWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
    )


def _rank() -> int:
    """Return the rank of this process, 0 where training is not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return 0


def _users_frame(frame: FrameType) -> FrameType:
    """Return the innermost frame outside the libraries; the outermost one where every frame is in a library."""
    while frame.f_back is not None and _package(frame) in _LIBRARIES:
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    """Return the name of the top-level package whose code a frame runs."""
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
