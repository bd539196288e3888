"""When a callback measures: the clock that the callbacks of all trainers share.

The clock counts epochs and optimizer steps and never looks at the time, so that two runs of one configuration
measure at the same steps and are bitwise identical. Its state is part of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farms_tb.options import LoggingOptions, ScheduleOptions
from farms_tb.warnings import warn_once

LONG_EPOCH = 1000
"""Optimizer steps after which a first epoch of unknown length may never end."""


@dataclass(frozen=True)
class Moment:
    """A moment of training.

    Attributes:
        epoch: epochs completed, for the schedule.
        step: optimizer steps done.
        logged_epoch: epochs completed as the trainer logs them; Hugging Face counts in fractions.
        logged_step: the step under which the trainer logs its own metrics.
    """

    epoch: int
    step: int
    logged_epoch: float
    logged_step: int


@dataclass
class Schedule:
    """By epochs or by optimizer steps, and when the last measurement was made.

    Attributes:
        options: when to measure.
        logging: how often histograms and tables are logged.
        epoch: epoch of the last measurement, -1 before the first.
        step: optimizer steps done at the last measurement, -1 before the first.
        measurements: number of measurements so far, without that of the final weights.
    """

    options: ScheduleOptions
    logging: LoggingOptions
    epoch: int = -1
    step: int = -1
    measurements: int = 0

    def is_due(self, epoch: int, step: int) -> bool:
        """Tell whether to measure now.

        By steps, a measurement is due once a multiple of `every_n_steps` has been passed since the last one, even
        if nobody asked at the multiple itself.

        Args:
            epoch: epochs completed.
            step: optimizer steps done.
        """
        if self.measurements == 0:
            return True
        every_n_steps = self.options.every_n_steps
        if every_n_steps is not None:
            return step // every_n_steps > self.step // every_n_steps
        is_new_epoch = epoch != self.epoch
        return is_new_epoch and epoch % self.options.every_n_epochs == 0

    def wants_histogram(self) -> bool:
        """Tell whether the next measurement counts the ESDs."""
        return self._is_nth(self.logging.histogram_every_n)

    def wants_table(self) -> bool:
        """Tell whether the next measurement is logged with table and pictures."""
        return self._is_nth(self.logging.table_every_n)

    def _is_nth(self, every: int | None) -> bool:
        """Tell whether the next measurement is one of every n, beginning with the first; None means never."""
        if every is None:
            return False
        return self.measurements % every == 0

    def tick(self, epoch: int, step: int) -> None:
        """Note that a measurement was made.

        Args:
            epoch: epochs completed.
            step: optimizer steps done.
        """
        self.epoch, self.step = epoch, step
        self.measurements += 1

    def warn_of_endless_epoch(self, about: object) -> None:
        """Warn, once a run, that a first epoch that may never end is measured at its start only.

        Args:
            about: the run, which tells one warning from another.
        """
        if self.options.every_n_steps is not None or self.measurements != 1:
            return
        warn_once(
            "layers are measured at the start of epochs, and this epoch, of unknown length, has been the only "
            "one so far: use every_n_steps to measure while it lasts",
            about,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the clock stands, for a checkpoint."""
        return {"epoch": self.epoch, "step": self.step, "measurements": self.measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to where a checkpoint says.

        Args:
            state: holds what `state_dict` returned; other keys are left alone.
        """
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.measurements = state["measurements"]


def check_saved_clock(state: object) -> None:
    """Check what a callback has saved alongside the state of its balancer.

    Raises:
        ValueError: not such a state, or a damaged one. The message names the entry.
    """
    if not isinstance(state, Mapping) or "balancer" not in state:
        raise _damaged("expected a dict with balancer, epoch, step and measurements")
    for name in ("epoch", "step", "measurements", "final_step"):
        # Checkpoints of earlier versions have no final_step.
        value = state.get(name, -1 if name == "final_step" else None)
        if not _is_step(value):
            raise _damaged(f"{name} must be an integer of at least -1, got {value!r:.60}")
    begun = state.get("begun", [0, False])
    if not isinstance(begun, (list, tuple)) or len(begun) != 2 or not _is_step(begun[0]):
        raise _damaged(f"begun must be a step and whether to log a table, got {begun!r:.60}")


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1


def _damaged(what: str) -> ValueError:
    return ValueError(f"the saved state of farms_tb is damaged: {what}. Resume from another checkpoint")
