"""The Lightning callback: measures at the start of epochs, balances the optimizers' steps, logs, resumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from farms_tb.balancing.balancer import LayerBalancer, StepGroup
from farms_tb.options import (
    AssignFunc,
    Esd,
    Fit,
    Kind,
    Metric,
    Norms,
    Precision,
    Solver,
    check_bool,
    check_integer,
    collect_options,
)
from farms_tb.report import Report
from farms_tb.training.metrics import (
    Measurement,
    RunLog,
    XAxis,
    alpha_summary,
    choose_x_axis,
    ratio_summary,
    warn_of_many_layers,
)
from farms_tb.training.schedule import Schedule
from farms_tb.training.sinks import log_measurement

if TYPE_CHECKING:
    from torch.optim import Optimizer

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed keeps the parameters and the optimizer to itself",
    "FSDPStrategy": "FSDP1 flattens the layers into one parameter",
    "XLAStrategy": "XLA devices are not supported",
    "XLAFSDPStrategy": "XLA devices are not supported",
    "DataParallelStrategy": "data parallelism in one process is not supported",
}


class FARMSTempBalance(Callback):
    """See how well each layer is trained, and balance the layers' learning rates.

    At the start of training and of every epoch the callback measures the power-law exponent alpha of each
    layer's weights, maps the alphas to learning-rate ratios, and logs both. At any step a parameter's learning
    rate is what the scheduler says, times its layer's ratio. The module, the optimizers and the schedulers stay
    as they are: `optimizer.param_groups` never changes, and with ratios of 1 training is bit-identical to
    training without the callback. Its state is saved in checkpoints, and a resumed run continues as if it had
    not stopped.

    Logged at each measurement, with every logger of the trainer: `farms/alpha/<layer>`, `farms/ratio/<layer>`,
    `farms/lr/<layer>`, `farms/alpha_mean`, `farms/alpha_std`, `farms/ratio_mean`, and `epoch`, the number of
    completed epochs; with the noise-aware map also `farms/z/<layer>` and `farms/lambda`, with `max_overhead` also
    `farms/interval` and `farms/overhead`. After training a last row holds the alphas of the final weights. Of a
    model of more than 1000 layers the aggregates alone are logged. In W&B and TensorBoard, which sort by name, the
    keys of a layer are `farms_alpha/03_<layer>` and so on: a section for each figure, in order of depth.
    `farms/alpha_mean` and `farms/alpha_std` can be monitored by other callbacks.

    Args:
        esd: `"farms"` measures windows of one fixed aspect ratio, `"full"` whole weight matrices (TempBalance).
        fit: where the power-law tail begins: `"median"`, `"goodness-of-fit"` or `"xmin_peak"`.
        aspect_ratio: columns / rows of a window.
        window: rows of a window of a linear layer.
        windows_per_dim: start positions of windows along each dimension of a linear layer.
        window_step: a fixed distance between start positions instead.
        xmin_pos: the median fit's tail starts at index int(N / xmin_pos) of N eigenvalues.
        filter_zeros: drop eigenvalues below 1e-5 (the papers' rule).
        relative_cutoff: drop eigenvalues below this fraction of the largest one.
        min_eigenvalues: samples with fewer eigenvalues have no alpha.
        precision: `"auto"` solves in single precision where alpha stays within 5e-5 of itself, `"float64"` never.
        solver: what solves on a GPU: `"torch"`, `"cupy"`, `"cpu"`, or `"auto"` for the fastest of them in a trial.
        memory_mb: megabytes (MiB) that solving may take at a time, beside the model.
        threads: threads of the CPU that solve at a time; None for as many as torch may use.
        assign_func: the map from alphas to ratios: `"tb_linear_map"`, `"tb_sqrt"`, `"tb_log2"`, `"tb_step"`,
            `"tb_sigmoid"` or `"noise_aware"`; see `farms_tb.lr_ratios`.
        lr_min_ratio: ratio of the layer with the smallest alpha.
        lr_max_ratio: ratio of the layer with the largest alpha. With both at 1 nothing is balanced, only measured.
        sigmoid_min: strength of the sigmoid map at or below the mean alpha.
        sigmoid_max: strength of the sigmoid map above it.
        sigmoid_tau: steepness of the sigmoid map.
        ratio_levels: round the ratios to this many values, so that a step has few different learning rates.
        metric: the figure that is mapped; `"alpha"` in the papers.
        exclude_first: leave the first matrix layer, in order of registration, at ratio 1.
        exclude_last: leave the last matrix layer at ratio 1.
        exclude: shell-style patterns of layer names to leave at ratio 1, matched from any dot: `"lifting.*"`.
        balance: kinds of layers that are balanced, each within itself: `"real"`, `"spectral"` (complex weights).
            The others are measured and logged.
        norms: `"follow"` gives a normalisation layer the ratio of the layer that feeds it, `"base"` ratio 1.
        every_n_epochs: measure at the start of every n-th epoch.
        every_n_steps: measure every n optimizer steps instead of by epochs.
        max_overhead: the share of the time of training that measuring may take, 0.02 for 2 %. Of the times that
            `every_n_epochs` or `every_n_steps` say, those are left out that would take more. The first
            measurement and that of the final weights are always made, and count. None: measure at all of them.
        timings_file: with `max_overhead`, the `farms_timings.csv` of an earlier run, to measure at exactly the
            same times again.
        lag_steps: let a GPU measure beside training, on streams of its own: what it finds in the weights is put in
            force this many optimizer steps later, always, so that runs stay reproducible. The first measurement
            and that of the final weights are waited for. It takes memory for a copy of the layers' weights; models
            on the CPU are measured at once, with the same results. 0 waits at each measurement.
        log: log to the trainer's loggers.
        histogram_every_n: log the ESD of each layer, as a histogram of log10 of the eigenvalues, at every n-th
            measurement (W&B and TensorBoard).
        table_every_n: log the whole report as a table, and with matplotlib pictures of the run so far, at every
            n-th measurement and of the final weights (W&B, TensorBoard, MLflow). In a resumed run, the pictures
            begin where it was resumed.
        x_axis: what W&B plots the curves against, `"epoch"` or `"step"`. By default epochs, and steps with
            `every_n_steps`.

    Attributes:
        report: the latest measurement; after training, of the final weights. None before training.
        ratios: learning-rate ratio in force for each layer by name; empty before training.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option unknown or out of range. At the start of `fit`: a second callback of this class, a
            strategy or an optimizer that cannot have layer-wise learning rates, no layer to analyse, none of its
            parameters in an optimizer, a pattern of `exclude` that matches no layer.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FARMSTempBalance()], logger=False)
    """

    def __init__(
        self,
        *,
        esd: Esd = "farms",
        fit: Fit = "median",
        aspect_ratio: float = 1.0,
        window: int = 100,
        windows_per_dim: int = 9,
        window_step: int | None = None,
        xmin_pos: float = 2.0,
        filter_zeros: bool = False,
        relative_cutoff: float = 0.0,
        min_eigenvalues: int = 5,
        precision: Precision = "auto",
        solver: Solver = "auto",
        memory_mb: int = 512,
        threads: int | None = None,
        assign_func: AssignFunc = "tb_linear_map",
        lr_min_ratio: float = 0.5,
        lr_max_ratio: float = 1.5,
        sigmoid_min: float = 0.5,
        sigmoid_max: float = 0.5,
        sigmoid_tau: float = 10.0,
        ratio_levels: int | None = None,
        metric: Metric = "alpha",
        exclude_first: bool = True,
        exclude_last: bool = True,
        exclude: Sequence[str] = (),
        balance: Sequence[Kind] = ("real",),
        norms: Norms = "follow",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        max_overhead: float | None = None,
        timings_file: str | os.PathLike[str] | None = None,
        lag_steps: int = 0,
        log: bool = True,
        histogram_every_n: int | None = None,
        table_every_n: int | None = None,
        x_axis: XAxis | None = None,
    ) -> None:
        super().__init__()
        self._spectral, self._balance = collect_options(locals())
        self._schedule = Schedule(
            every_n_epochs, every_n_steps, histogram_every_n, table_every_n, max_overhead, timings_file
        )
        check_integer("lag_steps", lag_steps, at_least=0)
        if lag_steps and max_overhead is not None:
            raise ValueError(
                "lag_steps and max_overhead cannot be combined: what is measured beside training has no time of "
                "its own. Choose one"
            )
        self._lag_steps = lag_steps
        check_bool("log", log)
        self._run_log = RunLog(choose_x_axis(x_axis, every_n_steps))
        self._write = log  # not `log`: Lightning puts a method of that name on every callback
        self._balancer: LayerBalancer | None = None
        self._training = False
        self._restored: dict[str, Any] | None = None
        # Of a measurement that is made beside training: the step of its weights, and whether to log a table.
        self._begun: tuple[int, bool] | None = None

    @property
    def state_key(self) -> str:
        """A fixed name, so that a checkpoint finds the callback whatever its options."""
        return "FARMSTempBalance"

    @property
    def report(self) -> Report | None:
        """The latest measurement; after training, of the final weights. None before training."""
        return None if self._balancer is None else self._balancer.report

    @property
    def ratios(self) -> dict[str, float]:
        """Learning-rate ratio in force for each layer by name; empty before training."""
        return {} if self._balancer is None else dict(self._balancer.ratios)

    def parameter_ratios(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the learning-rate ratio in force for each parameter of `pl_module` by name.

        Raises:
            RuntimeError: before training.
        """
        ratios = self._started().parameter_ratios()
        return {name: ratios.get(name.replace("_orig_mod.", ""), 1.0) for name, _ in pl_module.named_parameters()}

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with: their layers, parameters, ratio and lr.

        Raises:
            RuntimeError: before training.
            ValueError: the optimizer is not one that is being balanced.
        """
        return self._started().param_groups(optimizer)

    def _started(self) -> LayerBalancer:
        if self._balancer is None:
            raise RuntimeError("FARMSTempBalance has nothing to show before training: call trainer.fit first")
        return self._balancer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any time is spent."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if isinstance(callback, FARMSTempBalance)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise ValueError("the trainer has two FARMSTempBalance callbacks: keep one")
        for cls in type(trainer.strategy).__mro__:
            if cls.__name__ in _REFUSED_STRATEGIES:
                raise ValueError(
                    f"FARMSTempBalance does not work with {cls.__name__}: {_REFUSED_STRATEGIES[cls.__name__]}. "
                    "Use one device, DDP or FSDP2 (ModelParallelStrategy)"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which are set up and restored by now, and put restored ratios in force."""
        self._release()
        self._balancer = self._make_balancer(trainer, pl_module)
        if self._write:
            warn_of_many_layers(len(self._balancer.layers), pl_module)
        self._run_log = RunLog(self._run_log.x_axis)
        self._training = True
        self._schedule.reset()
        if self._schedule.overhead is not None:
            # Every process has to ask for `log_dir`.
            folder = trainer.log_dir or trainer.default_root_dir
            self._schedule.overhead.start(
                folder, pl_module.device, share=trainer.world_size > 1, write=trainer.is_global_zero
            )
        self._restore()
        # The rest of an epoch resumed in its middle may be monitored too.
        self._publish(trainer, pl_module)

    def _make_balancer(self, trainer: Trainer, pl_module: LightningModule) -> LayerBalancer:
        """Attach to the trainer's optimizers; the place for a subclass with rules of its own."""
        return LayerBalancer(
            pl_module, trainer.optimizers, self._spectral, self._balance, share=trainer.world_size > 1
        )

    def _restore(self) -> None:
        """Put the restored ratios in force, and the clock where it was."""
        assert self._balancer is not None
        state, self._restored = self._restored, None
        self._begun = None
        if state is not None and self._balancer.load_state_dict(state["balancer"]):
            self._schedule.load_state_dict(state)
            if "begun" in state:
                step, table = state["begun"]
                self._begun = step, table

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it is time."""
        self._measure_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time: a run resumed from the last batch of an epoch skips `on_train_epoch_start`."""
        self._measure_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, for the report and the loggers, and let go of the optimizers."""
        self._schedule.stop()
        self._finish_if_due(trainer, pl_module, now=True)
        if self._balancer is not None and trainer.global_step != self._schedule.step:
            self._balancer.measure()
            self._log(trainer, table=self._schedule.table_every_n is not None, final=True)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return ratios, report and clock as plain values, for the checkpoint."""
        if self._balancer is None or self._schedule.measurements == 0:
            return {} if self._restored is None else self._restored
        state = {"balancer": self._balancer.state_dict(), **self._schedule.state_dict()}
        return state if self._begun is None else {**state, "begun": list(self._begun)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; take it at once while training (a finder puts the run back)."""
        self._restored = state_dict or None
        if self._training:
            self._restore()

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        self._finish_if_due(trainer, pl_module)
        if self._balancer is None or not self._schedule.is_due(epoch, step):
            return
        self._finish_if_due(trainer, pl_module, now=True)
        if not self._schedule.claim(epoch, step):
            return
        with self._schedule.timed(epoch, step):
            beside = self._lag_steps > 0 and self._schedule.measurements > 0
            begin = self._balancer.begin_update if beside else self._balancer.update
            begin(histogram=self._schedule.wants_histogram())
            table = self._schedule.wants_table()
            self._schedule.tick(epoch, step)
            if beside:
                self._begun = step, table
            else:
                self._log(trainer, table)
                self._publish(trainer, pl_module)

    def _finish_if_due(self, trainer: Trainer, pl_module: LightningModule, now: bool = False) -> None:
        """Put the ratios of the measurement that was begun in force, if their time has come."""
        if self._balancer is None or self._begun is None:
            return
        step, table = self._begun
        if now or trainer.global_step >= step + self._lag_steps:
            self._begun = None
            self._balancer.finish_update()
            self._log(trainer, table)
            self._publish(trainer, pl_module)

    def _log(self, trainer: Trainer, table: bool, final: bool = False) -> None:
        if not self._write or not trainer.is_global_zero or self.report is None:
            return
        balancer = self._started()
        # The final weights take no further step: a ratio or lr beside their alphas would be made up.
        figures = ({}, {}) if final else (balancer.ratios, balancer.layer_lrs())
        summary = self._schedule.summary if final else ratio_summary(balancer.summary) | self._schedule.summary
        # The step that LearningRateMonitor uses: it counts batches that stepped, as the user's own curves do.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        measurement = Measurement(self.report, *figures, summary, trainer.current_epoch, step)
        if self._schedule.table_every_n is not None:
            self._run_log.add(measurement)
        log_measurement(trainer.loggers, measurement, self._run_log, table=table)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the aggregates to callbacks that monitor a metric.

        Not by `pl_module.log`: what it logs at the start of an epoch is out of reach for the validation of that
        epoch, where checkpoints and early stopping look.
        """
        if self.report is not None:
            summary = alpha_summary(self.report).items()
            trainer.callback_metrics.update({k: torch.tensor(v, device=pl_module.device) for k, v in summary})

    def _release(self) -> None:
        self._training = False
        self._schedule.stop()
        if self._balancer is not None:
            self._balancer.detach()
