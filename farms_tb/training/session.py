"""What the callbacks of all trainers have in common: one run of training, from the first measurement to the last.

A callback says when something happens (`start`, `measure_if_due`, `finish`, `stop`), and logs the `Measurement`s
that are returned. Which layers are balanced, and how, is decided in `farms_tb.balancing`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer, StepGroup
from farms_tb.report import Report
from farms_tb.training.cost import MeasuringCost
from farms_tb.training.handover import Handover, Results
from farms_tb.training.metrics import Measurement, RunLog, choose_x_axis, warn_of_many_layers
from farms_tb.training.run import Attachment, CallbackOptions, Run
from farms_tb.training.schedule import LONG_EPOCH, Moment, Schedule, check_saved_clock
from farms_tb.training.sinks import warn_of_unseen_media
from farms_tb.weights.layers import clean_name


class BalancingSession:
    """Measures and balances while a trainer trains.

    Pickling keeps options, saved state, report and ratios; model and optimizers stay behind.

    Args:
        options: the options of the callback.

    Attributes:
        attachment: the balancer and what it is attached to; None before training and in a copy.
        run_log: what the run remembers for its logs.
        running: whether a run of training is going on.
        restored: a saved state that waits for training to start; None where there is none.
    """

    def __init__(self, options: CallbackOptions) -> None:
        self.options = options
        self.attachment: Attachment | None = None
        self.run_log = self._new_run_log()
        self.running = False
        self.restored: dict[str, Any] | None = None
        self._schedule = Schedule(options.schedule, options.logging)
        self._cost = MeasuringCost()
        # Of a measurement in the background: the step at which the weights were read, and whether to log a table.
        self._background: tuple[int, bool] | None = None
        # Optimizer steps done when the final weights were measured, -1 before.
        self._final_step = -1
        self._results: Results | None = None
        self._handover = Handover()

    def _new_run_log(self) -> RunLog:
        return RunLog(choose_x_axis(self.options.logging.x_axis, self.options.schedule.every_n_steps))

    def start(self, run: Run) -> None:
        """Attach to the optimizers, which are set up and restored by now, and apply the restored ratios."""
        self.stop()
        self.attachment = Attachment(run)
        if self.logs:
            warn_of_many_layers(len(self._balancer.layers), run.model)
            warn_of_unseen_media(self.options.logging, run.loggers, self)
        self.run_log = self._new_run_log()
        self._cost = MeasuringCost()
        self._final_step = -1
        self._schedule.reset()
        self.running = True
        try:
            self.restore()
        except Exception:
            self.stop()
            raise

    @property
    def logs(self) -> bool:
        """Whether this process logs."""
        return self.options.logging.log and self.attachment is not None and self.attachment.run.is_rank_zero

    @property
    def _attached(self) -> Attachment:
        assert self.attachment is not None
        return self.attachment

    @property
    def _balancer(self) -> LayerBalancer:
        return self._attached.balancer

    def measure_if_due(self, now: Moment) -> list[Measurement]:
        """Measure and balance if it is time, and apply what a measurement in the background has found.

        Returns:
            What there is to log, in this order; empty where it is not time.
        """
        if not self.running:
            return []
        self._attached.follow_optimizers()
        if now.step >= LONG_EPOCH:
            self._warn_of_endless_epoch()
        found = self._finish_background(now)
        if not self._schedule.is_due(now.epoch, now.step):
            return found
        found += self._finish_background(now, wait=True)
        histogram, table = self._schedule.wants_histogram(), self._schedule.wants_table()
        if self.options.schedule.lag_steps > 0 and self._schedule.measurements > 0:
            self._balancer.begin_update(histogram=histogram)
            self._background = now.step, table
        else:
            with self._cost.measurement():
                self._balancer.update(histogram=histogram)
            found.append(self._measurement(now, table))
        self._schedule.tick(now.epoch, now.step)
        return found

    def _finish_background(self, now: Moment, wait: bool = False) -> list[Measurement]:
        """Apply what was measured in the background, if its time has come or it is waited for."""
        if self._background is None:
            return []
        step, table = self._background
        if not wait and now.step < step + self.options.schedule.lag_steps:
            return []
        self._background = None
        with self._cost.measurement():
            self._balancer.finish_update()
        return [self._measurement(now, table)]

    def _measurement(self, now: Moment, table: bool) -> Measurement:
        measurement = self._attached.measurement(now, table=table, lrs=self.logs)
        self._remember(measurement)
        return measurement

    def _remember(self, measurement: Measurement) -> None:
        """Keep a measurement for the pictures of the run, where there are any."""
        if self.logs and self.options.logging.table_every_n is not None:
            self.run_log.add(measurement)

    def _warn_of_endless_epoch(self) -> None:
        if not self._attached.run.known_length:
            self._schedule.warn_of_endless_epoch(self._cost)

    def finish(self, now: Moment) -> list[Measurement]:
        """Measure the final weights, after the last step.

        Returns:
            What there is to log; empty where the final weights were measured before.
        """
        found = self._finish_background(now, wait=True)
        if now.step not in (self._schedule.step, self._final_step):
            self._balancer.measure()
            table = self.options.logging.table_every_n is not None
            measurement = self._attached.measurement(now, table=table, lrs=False)
            # The final weights take no further step: ratios logged with them would be made up.
            found.append(replace(measurement, ratios={}, summary={}))
            self._remember(found[-1])
        self._final_step = now.step
        self._warn_of_endless_epoch()
        if self._attached.run.is_rank_zero:
            self._handover.send(self._attached.results())
        return found

    def stop(self) -> None:
        """Leave the optimizers as they were found; reports and ratios stay. Safe to call twice."""
        self.running = False
        if self.attachment is not None:
            self.attachment.detach()

    def restore(self) -> None:
        """Apply the saved ratios that wait for training, and set the clock to where it was.

        Raises:
            ValueError: the saved state is damaged. Nothing of it was applied.
        """
        state, self.restored = self.restored, None
        self._background = None
        if state is None:
            return
        check_saved_clock(state)
        if not self._balancer.load_state_dict(state["balancer"]):
            return
        self._schedule.load_state_dict(state)
        self._final_step = state.get("final_step", -1)
        if "begun" in state:
            step, table = state["begun"]
            self._background = step, table

    def state_dict(self) -> dict[str, Any] | None:
        """Return ratios, report and clock as plain values; the state that waits, before training."""
        if self.attachment is None or self._schedule.measurements == 0:
            return self.restored
        state = {
            "balancer": self._balancer.state_dict(),
            **self._schedule.state_dict(),
            "final_step": self._final_step,
        }
        return state if self._background is None else {**state, "begun": list(self._background)}

    def settle(self) -> None:
        """Wait for a measurement in the background, on every process, so that one alone can save its state."""
        if self._background is not None:
            self._balancer.state_dict()

    def missed_final_weights(self, step: int) -> bool:
        """Tell whether a run was interrupted after its last step and before its final weights were measured.

        Args:
            step: optimizer steps done, by the trainer's count.
        """
        return not self.running and self.restored is not None and self.restored.get("final_step", -1) != step

    def shown(self) -> LayerBalancer | Results | None:
        """Return what has report and ratios; after training in child processes, theirs. None before training."""
        received = None if self.running else self._handover.receive()
        if received is not None:
            self.attachment, self._results = None, received
        return self._results if self.attachment is None else self._balancer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, the optimizers and what is attached to them."""
        self.shown()
        results = self._results if self.attachment is None else self.attachment.results()
        left_behind: dict[str, Any] = {"attachment": None, "running": False, "_background": None}
        return {**self.__dict__, **left_behind, "_results": results}


class ShowsResults:
    """What a callback shows of its session; the base of the trainers' callbacks."""

    _session: BalancingSession
    _how_to_begin = "train first"

    @property
    def report(self) -> Report | None:
        """The latest measurement; after training, of the final weights. None before training."""
        shown = self._session.shown()
        return None if shown is None else shown.report

    @property
    def ratios(self) -> dict[str, float]:
        """Active learning-rate ratio of each layer by name; empty before training."""
        shown = self._session.shown()
        return {} if shown is None else dict(shown.ratios)

    def parameter_ratios(self, model: nn.Module) -> dict[str, float]:
        """Return the active learning-rate ratio of each parameter of `model` by name.

        Raises:
            RuntimeError: before training.
        """
        shown = self._session.shown()
        if shown is None:
            raise self._nothing_to_show()
        ratios = shown.parameter_ratios()
        return {name: ratios.get(clean_name(name), 1.0) for name, _ in model.named_parameters()}

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with: their layers, parameters, ratio and lr.

        Raises:
            RuntimeError: before training, and in a copy of the callback, which has no optimizer.
            ValueError: the optimizer is not one that is being balanced.
        """
        attachment = self._session.attachment
        if attachment is None:
            raise self._nothing_to_show()
        return attachment.balancer.param_groups(optimizer)

    def _nothing_to_show(self) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__} has nothing to show before training: {self._how_to_begin}")
