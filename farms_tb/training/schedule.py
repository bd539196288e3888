"""When a callback measures: the clock that the callbacks of all trainers share.

The clock counts epochs and optimizer steps and never looks at the time, so that two runs of one configuration
measure at the same steps and are bitwise identical. Its state is part of each checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farms_tb.balancing.state import damaged_state
from farms_tb.options import LoggingOptions, ScheduleOptions, Time, as_plain, check_integer, parsed_time
from farms_tb.warnings import warn_once

LONG_EPOCH = 1000
"""Optimizer steps after which a first epoch of unknown length may never end."""

_PHASES = ("start", "until", "ramp_steps")
"""Options that say in which part of a run ratios apply, and are measured: a change is worth a warning."""


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


@dataclass(frozen=True)
class RunLength:
    """How long a run of training is, as far as the trainer knows.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch; None where it is unknown.
        steps: optimizer steps of the whole run; None where it is unknown.
    """

    steps_per_epoch: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Period:
    """The part of a run in which layers are balanced.

    Attributes:
        start: when ratios begin to apply.
        until: when the last measurement may be made.
        length: how long the run is.
    """

    start: Time
    until: Time
    length: RunLength

    def check(self) -> None:
        """Check that the length of the run is known where it is needed, and that the end is after the start.

        Raises:
            ValueError: it is not.
        """
        for argument, time in (("start", self.start), ("until", self.until)):
            if time.unit == "fraction" and 0 < time.amount < 1 and self.length.steps is None:
                raise ValueError(
                    f"{argument}={time.amount} is a fraction of a run whose length the trainer does not know: "
                    "give it as '2 epochs' or '500 steps'"
                )
        if self.start.unit == self.until.unit:
            return  # compared when the options were made; a run of one step has all fractions on it
        first, last = self._in_steps(self.start), self._in_steps(self.until)
        if first is not None and last is not None and first >= last:
            raise ValueError(
                f"until must be later than start, got start={self.start}, which is step {first}, and "
                f"until={self.until}, which is step {last}"
            )

    def reached(self, time: Time, epoch: int, step: int) -> bool:
        """Return whether `start` or `until` has come when so many epochs and optimizer steps are done."""
        if time.unit == "epochs":
            return epoch >= time.amount
        at = self._in_steps(time)
        return at is not None and step >= at

    def _in_steps(self, time: Time) -> int | None:
        """Return a point of time in optimizer steps; None where it is unknown, or the end of the run."""
        if time.unit == "steps" or time.amount == 0:
            return int(time.amount)
        if time.unit == "epochs":
            per_epoch = self.length.steps_per_epoch
            return None if per_epoch is None else int(time.amount) * per_epoch
        if time.amount == 1 or self.length.steps is None:
            return None
        return math.ceil(time.amount * self.length.steps)


@dataclass
class Schedule:
    """The clock of a run: when the last measurement was made, and whether the next one is due.

    Attributes:
        options: when to measure.
        logging: how often histograms and tables are logged.
        length: how long the run is.
        epoch: epoch of the last measurement, -1 before the first.
        step: optimizer steps done at the last measurement, -1 before the first.
        measurements: number of measurements so far, without that of the final weights.
        started: optimizer steps done when ratios began to apply, -1 before.
        anew: whether to measure at the next chance, as layers are others since the last measurement.

    Raises:
        ValueError: `start`, `until` or `measurements_per_epoch` need a length that the trainer does not know, or
            `until` is not later than `start`.
    """

    options: ScheduleOptions
    logging: LoggingOptions
    length: RunLength = RunLength()
    epoch: int = -1
    step: int = -1
    measurements: int = 0
    started: int = -1
    anew: bool = False

    def __post_init__(self) -> None:
        start, until = parsed_time("start", self.options.start), parsed_time("until", self.options.until)
        self._period = Period(start, until, self.length)
        self._period.check()
        # The `start` that `started` follows from: that of the checkpoint, until this run takes its first step.
        self._start = self.options.start
        if self.options.measurements_per_epoch is not None and self.length.steps_per_epoch is None:
            raise ValueError(
                "measurements_per_epoch needs epochs of a known length: use every_n_steps to measure by steps"
            )

    def advance(self, epoch: int, step: int) -> float:
        """Follow training to where it stands now.

        Args:
            epoch: epochs completed.
            step: optimizer steps done.

        Returns:
            The strength s of the next step's ratios, 1 + s (r - 1): 0 before `start`, then growing to 1 over
            `ramp_steps` steps.
        """
        if self._period.reached(self._period.start, epoch, step):
            if self.started < 0:
                self.started = step
        elif not self._is_still("start", self._start):
            # Ratios that had begun to apply go on, unless this run is to begin later.
            self.started = -1
        self._start = self.options.start
        if self.started < 0:
            return 0.0
        if self.options.ramp_steps == 0:
            return 1.0
        return min(1.0, (step - self.started + 1) / self.options.ramp_steps)

    def is_due(self, epoch: int, step: int) -> bool:
        """Return whether to measure now.

        The first measurement is made in any case, and one when ratios begin to apply; none after `until`,
        but for that of the final weights, which is not asked for here.

        By steps, a measurement is due once a point of the grid has been passed since the last one, even if nobody
        asked at the point itself: every `every_n_steps` steps, or `measurements_per_epoch` points an epoch.

        Args:
            epoch: epochs completed.
            step: optimizer steps done.
        """
        if self.measurements == 0:
            return True
        if self._period.reached(self._period.until, epoch, step):
            return False
        if self.anew or self.step < self.started:
            return True
        if self.options.by_steps:
            return self._points(step) > self._points(self.step)
        is_new_epoch = epoch != self.epoch
        return is_new_epoch and epoch % self.options.every_n_epochs == 0

    def _points(self, step: int) -> int:
        """Return how many points of the grid of measurements lie between the first step and this one."""
        if self.options.every_n_steps is not None:
            return step // self.options.every_n_steps
        assert self.options.measurements_per_epoch is not None
        assert self.length.steps_per_epoch is not None
        return step * self.options.measurements_per_epoch // self.length.steps_per_epoch

    def wants_histogram(self) -> bool:
        """Return whether the next measurement counts the ESDs."""
        return self._is_nth(self.logging.histogram_every_n)

    def wants_table(self) -> bool:
        """Return whether the next measurement is logged with table and pictures."""
        return self._is_nth(self.logging.table_every_n)

    def _is_nth(self, every: int | None) -> bool:
        """Return whether the next measurement is one of every n, beginning with the first; None means never."""
        if every is None:
            return False
        return self.measurements % every == 0

    def tick(self, epoch: int, step: int) -> None:
        """Note that a measurement was made when so many epochs and optimizer steps were done."""
        self.epoch, self.step = epoch, step
        self.measurements += 1
        self.anew = False

    def warn_of_endless_epoch(self, about: object) -> None:
        """Warn, once for each run, that a first epoch that may never end is measured at its start only."""
        if self.options.by_steps or self.measurements != 1:
            return
        warn_once(
            "layers are measured at the start of epochs, and this epoch, of unknown length, has been the only "
            "one so far: use every_n_steps to measure while it lasts",
            about,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the clock stands, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "measurements": self.measurements,
            "started": self.started,
            "start": self._start,
            "until": self.options.until,
            "ramp_steps": self.options.ramp_steps,
        }

    def changes(self, state: Mapping[str, Any]) -> list[str]:
        """Say which of `start`, `until` and `ramp_steps` were others in a run that was saved.

        Args:
            state: holds what `state_dict` returned, in this version or an earlier one.
        """
        saved = _phases_of(state, self.options)
        return [
            f"{name} was {saved[name]!r} and is {getattr(self.options, name)!r}"
            for name in _PHASES
            if not self._is_still(name, saved[name])
        ]

    def load_started(self, state: Mapping[str, Any]) -> None:
        """Continue with ratios that have begun to apply, as far as the present `start` lets them.

        Args:
            state: holds what `state_dict` returned; other keys are left alone.
        """
        # Up to version 0.1 ratios applied from the beginning.
        self.started = state.get("started", 0)
        self._start = _phases_of(state, self.options)["start"]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to where a checkpoint says."""
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.measurements = state["measurements"]
        self.load_started(state)

    def _is_still(self, name: str, saved: Any) -> bool:
        """Return whether an option of `_PHASES` is what it was; "1 epoch" and "1 epochs" are one time."""
        present = getattr(self.options, name)
        if name == "ramp_steps":
            return bool(present == saved)
        return parsed_time(name, present) == parsed_time(name, saved)


def _phases_of(state: Mapping[str, Any], present: ScheduleOptions) -> dict[str, Any]:
    """Return the options of `_PHASES` that a saved clock had.

    Version 0.1 had none of them, which is what their defaults say. Where a later clock does not know them, the
    present ones are assumed.
    """
    unknown = as_plain(present if "started" in state else ScheduleOptions())
    return {name: state.get(name, unknown[name]) for name in _PHASES}


def check_saved_clock(state: object) -> None:
    """Check what a callback has saved alongside the state of its balancer.

    Raises:
        ValueError: not such a state, or a damaged one. The message names the entry.
    """
    if not isinstance(state, Mapping) or "balancer" not in state:
        raise damaged_state("expected a dict with balancer, epoch, step and measurements")
    # Checkpoints of earlier versions do not have these two.
    clock = {"final_step": -1, "started": -1, **state}
    for name in ("epoch", "step", "measurements", "final_step", "started"):
        value = clock.get(name)
        if not _is_step(value):
            raise damaged_state(f"{name} must be an integer of at least -1, got {value!r:.60}")
    phases = _phases_of(state, ScheduleOptions())
    try:
        parsed_time("start", phases["start"])
        parsed_time("until", phases["until"])
        check_integer("ramp_steps", phases["ramp_steps"], at_least=0)
    except (TypeError, ValueError) as error:
        raise damaged_state(str(error)) from None
    begun = state.get("begun", [0, False])
    if not isinstance(begun, (list, tuple)) or len(begun) != 2 or not _is_step(begun[0]):
        raise damaged_state(f"begun must be a step and whether to log a table, got {begun!r:.60}")


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1
