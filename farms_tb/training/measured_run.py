"""The measurements of one run of training: when they are made, where, and what a checkpoint keeps of them.

A run is measured when it begins, whenever the schedule says, and once more when its weights are final. A
`MeasuredRun` lives as long as the run does; what a callback keeps from one run to the next is in
`farms_tb.training.session`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.training.cost import MeasuringCost
from farms_tb.training.handover import Results
from farms_tb.training.metrics import Measurement, RunLog, alpha_summary, summary_row
from farms_tb.training.run import CallbackOptions, Run
from farms_tb.training.schedule import LONG_EPOCH, Moment, RunLength, Schedule


@dataclass(frozen=True)
class Background:
    """A measurement that was begun in the background and has not been applied yet.

    Attributes:
        step: optimizer steps done when the weights were read.
        table: whether it is logged with table and pictures.
    """

    step: int
    table: bool


class MeasuredRun:
    """Measures the layers of one run of training, and balances its optimizers.

    Making the object attaches to the optimizers; nothing is measured before `measure_if_due`.

    Args:
        run: the run that begins.
        options: the options of the callback.

    Attributes:
        run: the run.
        balancer: what measures and balances; it is attached until its `detach`.
        run_log: what the run remembers for its logs.
        logs: whether this process logs.
    """

    def __init__(self, run: Run, options: CallbackOptions) -> None:
        # Asked for only where it is needed: some trainers cannot tell.
        length = run.length() if options.schedule.needs_length else RunLength()
        self._schedule = Schedule(options.schedule, options.logging, length)
        self.run_log = RunLog(options.logging.x_axis or ("step" if options.schedule.by_steps else "epoch"))
        self.logs = options.logging.log and run.is_rank_zero
        self.run, self._options = run, options
        self._has_tables = options.logging.table_every_n is not None
        self._cost = MeasuringCost()
        self._background: Background | None = None
        # Optimizer steps done when the final weights were measured, -1 before.
        self._final_step = -1
        self._attach()

    def _attach(self) -> None:
        """Make the balancer, and note which optimizers it is attached to."""
        self._optimizers: list[Optimizer] = list(self.run.optimizers())
        self.balancer: LayerBalancer = self.run.attach()
        if self._options.logging.verdicts:
            self.balancer.compare_with_random()

    def _attach_anew_if_exchanged(self) -> None:
        """Attach to the optimizers that train now, with the same ratios, where they are others.

        Callbacks of the user may exchange a trainer's optimizers in the middle of a run, and layers with them.
        Where layers are others, what was begun to be measured is given up, and the present ones are measured next.
        """
        current = [id(optimizer) for optimizer in self.run.optimizers()]
        attached = [id(optimizer) for optimizer in self._optimizers]
        if current == attached:
            return
        state = self.balancer.state_dict()
        self.balancer.detach()
        self._attach()
        if not self.balancer.load_state_dict(state, changed="layers were exchanged with their optimizer"):
            self._background = None
            self._schedule.anew = True

    def measure_if_due(self, now: Moment) -> list[Measurement]:
        """Measure and balance if it is time, and apply what a measurement in the background has found.

        The first measurement is never made in the background: the first step already needs its ratios.

        Args:
            now: when, before the next batch.

        Returns:
            What there is to log, in this order; empty where it is not time.
        """
        self._attach_anew_if_exchanged()
        self.balancer.set_strength(self._schedule.advance(now.epoch, now.step))
        if now.step >= LONG_EPOCH:
            self._warn_of_endless_epoch()
        found: list[Measurement] = []
        lag_steps = self._options.schedule.lag_steps
        if self._background is not None and now.step >= self._background.step + lag_steps:
            found += self._apply_background(now)
        if not self._schedule.is_due(now.epoch, now.step):
            return found
        # Of two measurements in the background the earlier one is applied before the later one begins.
        found += self._apply_background(now)
        if lag_steps > 0 and self.is_measured:
            self.balancer.begin_update(histogram=self._schedule.wants_histogram())
            self._background = Background(now.step, self._schedule.wants_table())
        else:
            found.append(self._measure_now(now))
        self._schedule.tick(now.epoch, now.step)
        return found

    def finish(self, now: Moment, *, anew: bool = False) -> list[Measurement]:
        """Measure the final weights, after the last step.

        Args:
            now: when training ended.
            anew: also where weights were measured after the last step: they may be others since.

        Returns:
            What there is to log; empty where the final weights were measured before.
        """
        # No step follows that could take the ratios of a measurement in the background. It stays begun, for a run
        # that goes on from here. All processes wait for it, where one alone saves the state.
        self.settle()
        is_measured = now.step == self._schedule.step and self._background is None
        found: list[Measurement] = []
        if anew or not (is_measured or now.step == self._final_step):
            found.append(self._measure_final_weights(now))
        self._final_step = now.step
        self._warn_of_endless_epoch()
        return found

    def settle(self) -> None:
        """Wait for a measurement in the background, on every process, so that one alone can save its state."""
        if self._background is not None:
            self.balancer.state_dict()

    @property
    def is_measured(self) -> bool:
        """Whether there has been a measurement, so that there is something to save."""
        return self._schedule.measurements > 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values.

        Returns:
            `balancer`: the state of the `LayerBalancer`, with ratios and report; `epoch`, `step`, `measurements`:
            the clock; `final_step`: when the final weights were measured; while a measurement runs in the
            background also `begun`: its step, and whether it is logged with a table.
        """
        state = {
            "balancer": self.balancer.state_dict(),
            **self._schedule.state_dict(),
            "final_step": self._final_step,
        }
        if self._background is not None:
            state["begun"] = [self._background.step, self._background.table]
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Apply saved ratios at once, and set the clock to where it was.

        Args:
            state: what `state_dict` returned, in this version or an earlier one. With None, and with a state of
                other options or layers, the next chance to measure is taken. Ratios that have begun to apply go on
                in any case, where the present options do not have a later `start`.
        """
        self._background = None
        if state is None:
            return
        fits = self.balancer.load_state_dict(state["balancer"], others=self._schedule.changes(state))
        self._schedule.load_started(state)
        if not fits:
            return
        self._schedule.load_state_dict(state)
        # Version 0.1 did not save it.
        self._final_step = state.get("final_step", -1)
        if "begun" in state:
            step, table = state["begun"]
            self._background = Background(step, table)

    def results(self) -> Results:
        """Return report and ratios without the model, to be pickled or handed to another process."""
        return Results(self.balancer.report, dict(self.balancer.ratios), self.balancer.parameter_ratios())

    def alpha_summary(self) -> dict[str, float]:
        """Return mean and standard deviation of alpha over the trained layers; empty before a measurement."""
        report = self.balancer.report
        if report is None:
            return {}
        return alpha_summary(report, frozenset(self.balancer.trained_layers()))

    def _measure_now(self, now: Moment) -> Measurement:
        with self._cost.measurement():
            self.balancer.update(histogram=self._schedule.wants_histogram())
        return self._measurement(now, table=self._schedule.wants_table())

    def _apply_background(self, now: Moment) -> list[Measurement]:
        """Wait for the measurement in the background, if there is one, and apply its ratios."""
        if self._background is None:
            return []
        table, self._background = self._background.table, None
        with self._cost.measurement():
            self.balancer.finish_update()
        return [self._measurement(now, table=table)]

    def _measure_final_weights(self, now: Moment) -> Measurement:
        self.balancer.measure()
        return self._measurement(now, table=self._has_tables, final=True)

    def _measurement(self, now: Moment, *, table: bool, final: bool = False) -> Measurement:
        """Describe the latest measurement for the logs, and keep it for the pictures of the run.

        The final weights take no further step: ratios logged with them would be made up.
        """
        balancer = self.balancer
        assert balancer.report is not None
        measurement = Measurement(
            balancer.report,
            ratios={} if final else dict(balancer.ratios),
            lrs=balancer.layer_lrs() if self.logs and not final else {},
            summary={} if final else summary_row(balancer.summary),
            epoch=now.logged_epoch,
            step=now.logged_step,
            trained=frozenset(balancer.trained_layers()),
            table=table,
        )
        if self.logs and self._has_tables:
            self.run_log.add(measurement)
        return measurement

    def _warn_of_endless_epoch(self) -> None:
        if not self.run.known_length:
            self._schedule.warn_of_endless_epoch(self)
