"""What every command that starts processes of its own needs: how many, and that none outlives the command.

Imports nothing heavy, since the processes import it too.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

__all__ = ["available_cores", "end_with_parent"]


def available_cores() -> int:
    """Return how many cores this process may use; on a cluster these may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Let this process end when its parent is gone, even one that was killed and could not say so.

    Call it once, at the start of a process that `multiprocessing` has started.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    """Wait until the parent ends, and end this process with status 1, whatever its other threads do."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
