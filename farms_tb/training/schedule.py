"""When a callback measures: the clock that the callbacks of all trainers share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from farms_tb.options import check_integer
from farms_tb.training.overhead import MeasurementKind, Overhead


@dataclass
class Schedule:
    """By epochs or by optimizer steps, and when the last measurement was.

    Attributes:
        every_n_epochs: measure at the start of every n-th epoch.
        every_n_steps: measure every n optimizer steps instead.
        histogram_every_n: count the ESDs at every n-th measurement; None for never.
        table_every_n: log table and pictures at every n-th measurement; None for never.
        max_overhead: let pass the times for which measuring would take more than this share of training; None
            measures at all of them.
        timings_file: timings to take instead of the clock's, see `farms_tb.training.overhead`.
        epoch: epoch of the last measurement, -1 before the first.
        step: optimizer steps done at the last measurement, -1 before the first.
        measurements: number of measurements so far.
        passed: epoch and step of the last time to measure, whether it was measured or not.
        overhead: what measuring takes; None without `max_overhead`.
        summary: with `max_overhead`, what was chosen, by the name it is logged under: `farms/interval`, the epochs
            (with `every_n_steps` the steps) since the measurement before, and `farms/overhead`, the share of
            training that measuring took until then.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    histogram_every_n: int | None = None
    table_every_n: int | None = None
    max_overhead: float | None = None
    timings_file: str | os.PathLike[str] | None = None
    epoch: int = -1
    step: int = -1
    measurements: int = 0
    passed: tuple[int, int] = (-1, -1)
    overhead: Overhead | None = field(default=None, init=False)
    summary: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_integer("every_n_epochs", self.every_n_epochs, at_least=1)
        if self.every_n_steps is not None:
            check_integer("every_n_steps", self.every_n_steps, at_least=1)
        for option in ("histogram_every_n", "table_every_n"):
            if getattr(self, option) is not None:
                check_integer(option, getattr(self, option), at_least=1)
        if self.max_overhead is not None:
            self.overhead = Overhead(self.max_overhead, self.timings_file)
        elif self.timings_file is not None:
            raise ValueError(f"timings_file={str(self.timings_file)!r} is for max_overhead, which is None")

    def is_due(self, epoch: int, step: int) -> bool:
        """Tell whether this epoch, after this many optimizer steps, is a configured time to measure."""
        if self.measurements == 0:
            return True
        passed_epoch, passed_step = self.passed
        if self.every_n_steps is not None:
            return step // self.every_n_steps > passed_step // self.every_n_steps
        return epoch != passed_epoch and epoch % self.every_n_epochs == 0

    def claim(self, epoch: int, step: int) -> bool:
        """Ask `max_overhead` for the time of the measurement that is due, on all processes.

        Returns:
            Whether to measure now; if not, wait until the next one is due.
        """
        if self.overhead is None or self.measurements == 0:
            return True
        self.overhead.note_training(epoch, step)
        final: MeasurementKind = "plain" if self.table_every_n is None else "table"
        if self.overhead.has_measured and not self.overhead.affords(self._kind(), final):
            self.passed = epoch, step
            return False
        interval = epoch - self.epoch if self.every_n_steps is None else step - self.step
        self.summary = {"farms/interval": interval, **self._share()}
        return True

    @contextmanager
    def timed(self, epoch: int, step: int) -> Iterator[None]:
        """Time a measurement and all that comes of it, for `max_overhead`."""
        if self.overhead is None:
            yield
            return
        kind, start = self._kind(), self.overhead.now()
        yield
        self.overhead.note_measurement(kind, epoch, step, self.overhead.now() - start)

    def _kind(self) -> MeasurementKind:
        if self.overhead is None or not self.overhead.has_measured:
            return "first"
        return "table" if self.wants_table() else "histogram" if self.wants_histogram() else "plain"

    def _share(self) -> dict[str, float]:
        share = None if self.overhead is None else self.overhead.share
        return {} if share is None else {"farms/overhead": share}

    def wants_histogram(self) -> bool:
        """Tell whether the next measurement counts the ESDs."""
        return self.histogram_every_n is not None and self.measurements % self.histogram_every_n == 0

    def wants_table(self) -> bool:
        """Tell whether the next measurement is logged with table and pictures."""
        return self.table_every_n is not None and self.measurements % self.table_every_n == 0

    def tick(self, epoch: int, step: int) -> None:
        """Note a measurement."""
        self.epoch, self.step = self.passed = epoch, step
        self.measurements += 1

    def stop(self) -> None:
        """Stop timing: training is over, or interrupted."""
        if self.overhead is not None:
            self.overhead.stop()
            self.summary = self._share()

    def reset(self) -> None:
        """Set the clock back to before the first measurement."""
        self.epoch, self.step = self.passed = -1, -1
        self.measurements = 0
        self.summary = {}
        if self.overhead is not None:
            self.overhead.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return where the clock stands, for a checkpoint."""
        state: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "measurements": self.measurements}
        if self.overhead is not None:
            state |= {"passed": list(self.passed), "overhead": self.overhead.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to where a checkpoint says."""
        self.epoch, self.step, self.measurements = state["epoch"], state["step"], state["measurements"]
        epoch, step = state.get("passed", (self.epoch, self.step))
        self.passed = epoch, step
        if self.overhead is not None and "overhead" in state:
            self.overhead.load_state_dict(state["overhead"])
