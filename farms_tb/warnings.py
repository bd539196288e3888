"""Warnings: each once, and where several processes train one model, by the first of them alone."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch.distributed as dist

_said: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(message: str, about: object, stacklevel: int = 2) -> None:
    """Warn on rank zero, unless the same was said before.

    Args:
        message: the warning.
        about: what it is about, an object or a class; the same message about another one is another warning.
        stacklevel: as of `warnings.warn`, counted from the caller.
    """
    messages = _said.setdefault(about, set())
    if message in messages:
        return
    messages.add(message)
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(message, stacklevel=stacklevel + 1)
