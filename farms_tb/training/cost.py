"""One warning where measuring takes a noticeable share of the time of training.

The user decides how often layers are measured. Where that makes training noticeably slower, one warning says so
and names the options to change; no measurement is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from farms_tb.warnings import warn_once

MAX_SHARE = 0.05
"""Share of the time of training above which measuring is worth a warning."""
MIN_MEASUREMENTS = 3
MIN_SECONDS = 30.0
"""Shorter runs are trials, whose first measurements (imports, a trial of solvers) say little about long ones."""


class MeasuringCost:
    """Adds up how long training waits for measurements, and warns once a run where that is too long.

    The first measurement does not count. It is made however seldom layers are measured, and may take far longer
    than the later ones, since a map that compares layers with random ones measures these then.

    The clock decides about this warning and nothing else: runs stay reproducible. A `MeasuringCost` belongs to one
    run; the time of training counts from when it is made.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._measuring = 0.0
        self._measurements = 0

    @contextmanager
    def measurement(self) -> Iterator[None]:
        """Time the measurement made in this context, and warn if they take too long.

        Yields:
            None, once. The time of a measurement that raises is not counted.
        """
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Steps that are still queued on the GPU are training, not measuring.
            torch.cuda.synchronize()
        before = time.perf_counter()
        yield
        now = time.perf_counter()
        if self._measurements == 0:
            self._start += now - before  # counts neither as measuring nor as training
        else:
            self._measuring += now - before
        self._measurements += 1
        self._warn_if_slow(now - self._start)

    def _warn_if_slow(self, total: float) -> None:
        """Warn, once a run, where measurements have taken too much of `total` seconds of training."""
        is_trial = self._measurements < MIN_MEASUREMENTS or total < MIN_SECONDS
        if is_trial or self._measuring <= MAX_SHARE * total:
            return
        warn_once(
            f"measuring the layers has taken more than {MAX_SHARE:.0%} of the time of training: measure less "
            "often, with a larger every_n_epochs or every_n_steps",
            self,
        )
