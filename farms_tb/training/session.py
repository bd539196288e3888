"""What the callbacks of all trainers have in common, over all runs of training of one callback.

A callback says when something happens (`start`, `measure_if_due`, `finish`, `stop`), and logs the `Measurement`s
that are returned. A session keeps what outlives a run: options, the saved state, the last report and ratios. The
run itself is a `MeasuredRun`; which layers are balanced, and how, is decided in `farms_tb.balancing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.balancing.step_groups import StepGroup
from farms_tb.keywords import resolved
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions
from farms_tb.presets import Preset, described, with_preset
from farms_tb.report import Report
from farms_tb.training.handover import Handover, Results
from farms_tb.training.measured_run import MeasuredRun
from farms_tb.training.metrics import Measurement, warn_of_many_layers
from farms_tb.training.run import CallbackOptions, Run
from farms_tb.training.schedule import Moment, check_saved_clock
from farms_tb.training.sinks import warn_of_unseen_media
from farms_tb.weights.layers import unwrap
from farms_tb.weights.names import clean_name


class BalancingSession:
    """Measures and balances while a trainer trains.

    Pickling keeps options, saved state, report and ratios; model and optimizers stay behind.

    Args:
        options: the options of the callback.

    Attributes:
        options: the options of the callback.
        run: the run that is going on, or the last one; None before training and in a copy.
        running: whether a run of training is going on.
        restored: a saved state that waits for training to start; None where there is none.
    """

    def __init__(self, options: CallbackOptions) -> None:
        self.options = options
        self.run: MeasuredRun | None = None
        self.running = False
        self.restored: dict[str, Any] | None = None
        self._run_is_saved = False
        self._results: Results | None = None
        self._handover = Handover()

    @property
    def current(self) -> MeasuredRun:
        """The run that is going on, or the last one; there has to be one."""
        assert self.run is not None
        return self.run

    @property
    def logs(self) -> bool:
        """Whether this process logs; False before training."""
        return self.run is not None and self.run.logs

    def expect_run(self) -> None:
        """Forget the state of an earlier run, also one that was restored and never used; call it before restoring.

        The next run writes and reads checkpoints before it starts, where it looks for a learning rate, say. Report
        and ratios of the earlier one can still be shown.
        """
        self.restored, self._run_is_saved = None, False

    def start(self, run: Run) -> None:
        """Attach to the optimizers, which are set up and restored by now, and apply the restored ratios.

        Raises:
            ValueError: the model has no layer to balance, or the saved state is not one of this package.
        """
        self.stop()
        self.run = MeasuredRun(run, self.options)
        self._run_is_saved = True
        if self.logs:
            warn_of_many_layers(len(self.run.balancer.layers), run.model)
            warn_of_unseen_media(self.options.logging, run.loggers, self)
        self.running = True
        try:
            self.restore()
        except BaseException:
            self.stop()
            raise

    def measure_if_due(self, now: Moment) -> list[Measurement]:
        """Measure and balance if it is time, see `MeasuredRun.measure_if_due`; nothing outside of a run."""
        return self.current.measure_if_due(now) if self.running else []

    def finish(self, now: Moment, *, anew: bool = False) -> list[Measurement]:
        """Measure the final weights, see `MeasuredRun.finish`, and hand the results to a parent that waits."""
        found = self.current.finish(now, anew=anew)
        if self.current.run.is_rank_zero:
            self._handover.send(self.current.results())
        return found

    def stop(self) -> None:
        """Leave the optimizers as they were found; reports and ratios stay. Safe to call twice."""
        self.running = False
        if self.run is not None:
            self.run.balancer.detach()

    def restore(self) -> None:
        """Apply the saved ratios that wait for training, and set the clock to where it was.

        Raises:
            ValueError: the saved state is damaged. Nothing of it was applied.
        """
        state, self.restored = self.restored, None
        if state is not None:
            check_saved_clock(state)
        self.current.load_state_dict(state)

    def state_dict(self) -> dict[str, Any] | None:
        """Return ratios, report and clock as plain values; the state that waits, before the first measurement."""
        if self.restored is None and self._run_is_saved and self.run is not None and self.run.is_measured:
            return self.run.state_dict()
        return self.restored

    def settle(self) -> None:
        """Wait for a measurement in the background, on every process, so that one alone can save its state."""
        if self.run is not None:
            self.run.settle()

    def shown(self) -> LayerBalancer | Results | None:
        """Return what has report and ratios; after training in child processes, theirs. None before training."""
        received = None if self.running else self._handover.receive()
        if received is not None:
            self.run, self._results = None, received
        if self.run is not None:
            return self.run.balancer
        return self._results

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, the optimizers and what is attached to them."""
        self.shown()
        results = self._results
        if self.run is not None:
            results = self.run.results()
        return {**self.__dict__, "run": None, "running": False, "_results": results}


class ShowsResults:
    """The options of a callback, and what it shows of its session; the base of the trainers' callbacks.

    Attributes:
        options: what the callback was asked for.
        preset: the published method that was asked for by name; None without one.
        _session: the callback's session.
        _how_to_begin: what to call before there is anything to show, for the error message.
    """

    options: CallbackOptions
    preset: Preset | None
    _session: BalancingSession
    _how_to_begin: str

    def _set_up(self, preset: Preset | None, keywords: Mapping[str, Any], **objects: Any) -> None:
        """Make options and session out of what a user gave: a preset, options by name, and objects of options.

        The objects go by the names that `CallbackOptions` has for them; None stands for the defaults.
        """
        named = with_preset(preset, objects, keywords)
        self.preset = preset
        self.options = CallbackOptions(
            resolved(SpectrumOptions, objects["spectrum"], named),
            resolved(RatioOptions, objects["ratios"], named),
            resolved(ScheduleOptions, objects["schedule"], named),
            resolved(LoggingOptions, objects["logging"], named),
        )
        self._session = BalancingSession(self.options)

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

    def settings(self) -> str:
        """Return which options are active and where they come from, to be printed.

        Returns:
            A line for the preset and its paper, and one for each option that is not at its default, or that the
            preset sets.
        """
        options = self.options
        return described(self.preset, options.spectrum, options.ratios, options.schedule, options.logging)

    def parameter_ratios(self, model: nn.Module) -> dict[str, float]:
        """Return the active learning-rate ratio of each parameter of `model` by name.

        Args:
            model: the model that was trained, or one with the same names of parameters; a model compiled by
                `torch.compile` or wrapped by DDP counts as itself.

        Returns:
            Names as `model.named_parameters()` gives them, to ratios; 1 for parameters that no ratio applies to.

        Raises:
            RuntimeError: before training.
        """
        shown = self._session.shown()
        if shown is None:
            raise self._nothing_to_show()
        ratios = shown.parameter_ratios()
        # In the same order, with the wrapper and without it.
        inner = [clean_name(name) for name, _ in unwrap(model).named_parameters()]
        return {name: ratios.get(own, 1.0) for (name, _), own in zip(model.named_parameters(), inner, strict=True)}

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with: their layers, parameters, ratio and lr.

        Args:
            optimizer: one of the trainer's optimizers.

        Returns:
            A `StepGroup` for each learning rate of each of the optimizer's own groups. After training, when the
            optimizer steps without ratios, one of ratio 1 for each group; `parameter_ratios` has the last ones.

        Raises:
            RuntimeError: before training, and in a copy of the callback, which has no optimizer.
            ValueError: the optimizer is not one that is being balanced.
        """
        run = self._session.run
        if run is None:
            raise self._nothing_to_show()
        return run.balancer.param_groups(optimizer)

    def _nothing_to_show(self) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__} has nothing to show before training: {self._how_to_begin}")
