"""A callback that takes the process of a run along."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

from lightning import Callback


class Deadly(Callback):
    """Kills the process in which it is made, unless that is the one of the tests."""

    def __init__(self, **options: Any) -> None:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
