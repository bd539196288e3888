"""When a callback measures: the clock that the callbacks of all trainers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farms_tb.options import check_integer


@dataclass
class Schedule:
    """By epochs or by optimizer steps, and when the last measurement was.

    Attributes:
        every_n_epochs: measure at the start of every n-th epoch.
        every_n_steps: measure every n optimizer steps instead.
        histogram_every_n: count the ESDs at every n-th measurement; None for never.
        table_every_n: log table and pictures at every n-th measurement; None for never.
        epoch: epoch of the last measurement, -1 before the first.
        step: optimizer steps done at the last measurement, -1 before the first.
        measurements: number of measurements so far.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    histogram_every_n: int | None = None
    table_every_n: int | None = None
    epoch: int = -1
    step: int = -1
    measurements: int = 0

    def __post_init__(self) -> None:
        check_integer("every_n_epochs", self.every_n_epochs, at_least=1)
        if self.every_n_steps is not None:
            check_integer("every_n_steps", self.every_n_steps, at_least=1)
        for option in ("histogram_every_n", "table_every_n"):
            if getattr(self, option) is not None:
                check_integer(option, getattr(self, option), at_least=1)

    def is_due(self, epoch: int, step: int) -> bool:
        """Tell whether to measure at this epoch, after this many optimizer steps."""
        if self.measurements == 0:
            return True
        if self.every_n_steps is not None:
            return step // self.every_n_steps > self.step // self.every_n_steps
        return epoch != self.epoch and epoch % self.every_n_epochs == 0

    def wants_histogram(self) -> bool:
        """Tell whether the next measurement counts the ESDs."""
        return self.histogram_every_n is not None and self.measurements % self.histogram_every_n == 0

    def wants_table(self) -> bool:
        """Tell whether the next measurement is logged with table and pictures."""
        return self.table_every_n is not None and self.measurements % self.table_every_n == 0

    def tick(self, epoch: int, step: int) -> None:
        """Note a measurement."""
        self.epoch, self.step = epoch, step
        self.measurements += 1

    def reset(self) -> None:
        """Set the clock back to before the first measurement."""
        self.epoch = self.step = -1
        self.measurements = 0

    def state_dict(self) -> dict[str, int]:
        """Return where the clock stands, for a checkpoint."""
        return {"epoch": self.epoch, "step": self.step, "measurements": self.measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to where a checkpoint says."""
        self.epoch, self.step, self.measurements = state["epoch"], state["step"], state["measurements"]
