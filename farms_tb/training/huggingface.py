"""The callback for Hugging Face's Trainer: the options and guarantees of the Lightning one."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from farms_tb.balancing.balancer import LayerBalancer, StepGroup
from farms_tb.balancing.optimizer_checks import stepping_optimizers
from farms_tb.options import (
    AssignFunc,
    Esd,
    Fit,
    Kind,
    Metric,
    Norms,
    Precision,
    Solver,
    as_plain,
    check_bool,
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
from farms_tb.training.sinks import define_wandb_axes, tensorboard_media, wandb_values
from farms_tb.weights.layers import clean_name

try:
    from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
    from transformers.trainer_callback import (
        CallbackHandler,
        ExportableState,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
except ImportError as error:
    raise ImportError('FARMSTrainerCallback needs transformers: pip install "farms-tb[transformers]"') from error

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainingArguments

_REFUSED_BACKENDS = {
    "DEEPSPEED": "DeepSpeed: it keeps the parameters and the optimizer to itself",
    "FSDP": "FSDP1: it flattens the layers into one parameter",
    "MEGATRON_LM": "Megatron-LM: it keeps the optimizer to itself",
    "XLA": "XLA devices: they are not supported",
}
# Optimizers whose `step` does nothing: they move each parameter during the backward pass.
_REFUSED_OPTIMIZERS = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")


class FARMSTrainerCallback(TrainerCallback, ExportableState):
    """See how well each layer is trained, and balance the layers' learning rates, under Hugging Face's Trainer.

    `farms_tb.FARMSTempBalance` for `transformers.Trainer`: the same options, the same guarantees. Pass it in
    `callbacks`; model, optimizer, scheduler and `TrainingArguments` stay as they are.

    Logged at each measurement, with every reporter of the trainer (`report_to`) and in `state.log_history`:
    `farms/alpha/<layer>`, `farms/ratio/<layer>`, `farms/lr/<layer>`, `farms/alpha_mean`, `farms/alpha_std`, with
    `max_overhead` also `farms/interval` and `farms/overhead`. Like all of the trainer's figures they appear under
    `train/` in W&B and TensorBoard, there with the layers numbered by depth: `train/farms_alpha/03_<layer>`. When
    training is over a last row holds the alphas of the final weights, before `load_best_model_at_end` puts others
    in their place. The console gets the two aggregates only, and with more than 1000 layers so does everything
    else.

    A run resumed by `train(resume_from_checkpoint=...)` continues bit-identically, with or without
    `restore_callback_states_from_checkpoint`. That flag also brings back the options of the checkpoint, in a new
    callback that takes this one's place: look for it in `trainer.callback_handler.callbacks`.

    The Trainer does not tell callbacks of an error. After one, the next `train()` starts cleanly; to step the
    optimizer in any other way, call `detach()` first.

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
        exclude_last: leave the last matrix layer at ratio 1: of a language model, its head.
        exclude: shell-style patterns of layer names to leave at ratio 1, matched from any dot: `"attn.*"`.
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
        log: log to the trainer's reporters and to `state.log_history`.
        histogram_every_n: log the ESD of each layer, as a histogram of log10 of the eigenvalues, at every n-th
            measurement (W&B and TensorBoard).
        table_every_n: log the whole report as a table, and with matplotlib pictures of the run so far, at every
            n-th measurement and of the final weights (W&B, TensorBoard). In a resumed run, the pictures
            begin where it was resumed.
        x_axis: what W&B plots the curves against, `"epoch"` or `"step"`. By default epochs, and steps with
            `every_n_steps`.

    Attributes:
        report: the latest measurement; after training, of the final weights. None before training.
        ratios: learning-rate ratio in force for each layer by name; empty before training.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option unknown or out of range. At the start of `train`: a second callback of this class,
            DeepSpeed, FSDP1 or an optimizer that cannot have layer-wise learning rates, no layer to analyse, none
            of its parameters in the optimizer, a pattern of `exclude` that matches no layer.

    Example:
        >>> callback = FARMSTrainerCallback(every_n_steps=500, lr_min_ratio=0.7, lr_max_ratio=1.3)
        >>> callback.ratios  # until it has been in Trainer(..., callbacks=[callback]).train()
        {}
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
        log: bool = True,
        histogram_every_n: int | None = None,
        table_every_n: int | None = None,
        x_axis: XAxis | None = None,
    ) -> None:
        self._spectral, self._balance = collect_options(locals())
        self._schedule = Schedule(
            every_n_epochs, every_n_steps, histogram_every_n, table_every_n, max_overhead, timings_file
        )
        check_bool("log", log)
        self._run_log = RunLog(choose_x_axis(x_axis, every_n_steps))
        self._write = log
        self._balancer: LayerBalancer | None = None
        self._training = False
        self._epoch = -1
        self._restored: dict[str, Any] | None = None

    @property
    def report(self) -> Report | None:
        """The latest measurement; after training, of the final weights. None before training."""
        return None if self._balancer is None else self._balancer.report

    @property
    def ratios(self) -> dict[str, float]:
        """Learning-rate ratio in force for each layer by name; empty before training."""
        return {} if self._balancer is None else dict(self._balancer.ratios)

    def parameter_ratios(self, model: nn.Module) -> dict[str, float]:
        """Return the learning-rate ratio in force for each parameter of `model` by name.

        Raises:
            RuntimeError: before training.
        """
        ratios = self._started().parameter_ratios()
        return {name: ratios.get(clean_name(name), 1.0) for name, _ in model.named_parameters()}

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer`, say `trainer.optimizer`, really steps with.

        Raises:
            RuntimeError: before training.
            ValueError: the optimizer is not the one that is being balanced.
        """
        return self._started().param_groups(optimizer)

    def detach(self) -> None:
        """Leave the optimizer as it was found: needed only after an error in training. Safe to call twice."""
        self._training = False
        self._schedule.stop()
        if self._balancer is not None:
            self._balancer.detach()

    def state(self) -> dict[str, Any]:
        """Return options, ratios, report and clock as plain values, for `trainer_state.json`."""
        schedule = self._schedule
        options = {
            **as_plain(self._spectral, self._balance),
            "every_n_epochs": schedule.every_n_epochs,
            "every_n_steps": schedule.every_n_steps,
            "max_overhead": schedule.max_overhead,
            "timings_file": None if schedule.timings_file is None else os.fspath(schedule.timings_file),
            "log": self._write,
            "histogram_every_n": schedule.histogram_every_n,
            "table_every_n": schedule.table_every_n,
            "x_axis": self._run_log.x_axis,
        }
        progress = self._restored
        if self._balancer is not None and schedule.measurements:
            progress = {"balancer": self._balancer.state_dict(), **schedule.state_dict()}
        return {"args": options, "attributes": {"_restored": progress}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Refuse what cannot work before any time is spent."""
        _check_backend()
        return control

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Attach to the optimizer, which is set up and restored by now, and put restored ratios in force."""
        self.detach()
        _check_backend()
        optimizer = kwargs["optimizer"]
        _check_optimizer(optimizer)
        self._balancer = LayerBalancer(
            kwargs["model"], [optimizer], self._spectral, self._balance, share=args.world_size > 1
        )
        if self._write:
            warn_of_many_layers(len(self._balancer.layers), kwargs["model"])
        self._run_log = RunLog(self._run_log.x_axis)
        self._training = True
        self._schedule.reset()
        # `state.epoch` counts epochs in fractions of their steps: exact at their ends, but a dataset without a
        # length, or an epoch broken off, makes it useless between. So it says where to start, and no more.
        self._epoch = math.floor(state.epoch or 0) - 1
        try:
            if self._schedule.overhead is not None:
                self._schedule.overhead.start(
                    args.output_dir or ".",
                    args.device,
                    share=args.world_size > 1,
                    write=state.is_world_process_zero,
                )
            self._restore(state)
        except Exception:
            self.detach()
            raise
        return control

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure if it is time."""
        self._epoch += 1
        return self._measure_if_due(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure if it is time; the Trainer calls this once an optimizer step, whatever it accumulates."""
        return self._measure_if_due(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the final weights, once no step will follow.

        Not in `on_train_end`: by then the best model may have taken their place, and reporters have closed their
        files.
        """
        if control.should_training_stop:
            control = self._measure_final_weights(args, state, control, **kwargs)
        return control

    # After the evaluation that ends an epoch has stopped the training early.
    on_save = on_epoch_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Measure the final weights, where nothing was saved after that, when the Trainer logs its summary."""
        if "train_runtime" in (logs or {}):
            control = self._measure_final_weights(args, state, control, **kwargs)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the final weights, where a subclass of Trainer logs no summary, and let go of the optimizer."""
        control = self._measure_final_weights(args, state, control, **kwargs)
        self.detach()
        return control

    def _started(self) -> LayerBalancer:
        if self._balancer is None:
            raise RuntimeError("FARMSTrainerCallback has nothing to show before trainer.train")
        return self._balancer

    def _restore(self, state: TrainerState) -> None:
        """Put the ratios of the checkpoint in force, and the clock where it was.

        The Trainer hands callbacks their saved state only on `restore_callback_states_from_checkpoint`, but the
        whole checkpoint's `TrainerState` is at hand in any case.
        """
        name = type(self).__name__
        # Where the checkpoint was written without this callback, the Trainer's next save would miss its key.
        states: Any = state.stateful_callbacks
        saved = states.setdefault(name, self.state())
        if state.global_step > 0 and isinstance(saved, dict):
            self._restored = saved.get("attributes", {}).get("_restored")
        progress, self._restored = self._restored, None
        if progress is not None and self._started().load_state_dict(progress["balancer"]):
            self._schedule.load_state_dict(progress)

    def _measure_if_due(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not self._training or not self._schedule.is_due(self._epoch, state.global_step):
            return control
        if not self._schedule.claim(self._epoch, state.global_step):
            return control
        with self._schedule.timed(self._epoch, state.global_step):
            try:
                self._started().update(histogram=self._schedule.wants_histogram())
            except Exception:
                self.detach()
                raise
            table = self._schedule.wants_table()
            self._schedule.tick(self._epoch, state.global_step)
            return self._log(args, state, control, table, **kwargs)

    def _measure_final_weights(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not self._training:
            return control
        self._training = False
        self._schedule.stop()
        if state.global_step == self._schedule.step:
            return control
        self._started().measure()
        table = self._schedule.table_every_n is not None
        return self._log(args, state, control, table, final=True, **kwargs)

    def _log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        table: bool,
        final: bool = False,
        **kwargs: Any,
    ) -> TrainerControl:
        """Do what `Trainer.log` does, on rank zero: append to the history and call the other callbacks.

        It is not `Trainer.log` itself because subclasses override that, to add, and then forget, the metrics that
        they collected for the next row of their own (TRL's do).
        """
        if not self._write or not state.is_world_process_zero or self.report is None:
            return control
        balancer = self._started()
        # The final weights take no further step: a ratio or lr beside their alphas would be made up.
        figures = ({}, {}) if final else (balancer.ratios, balancer.layer_lrs())
        summary = self._schedule.summary if final else ratio_summary(balancer.summary) | self._schedule.summary
        measurement = Measurement(self.report, *figures, summary, state.epoch, state.global_step)
        row = measurement.row()
        state.log_history.append({**row, "step": state.global_step})
        if self._schedule.table_every_n is not None:
            self._run_log.add(measurement)
        others = [callback for callback in _callbacks_of_trainer() if callback is not self]
        table = table and any(isinstance(other, (WandbCallback, TensorBoardCallback)) for other in others)
        media = self._run_log.media(measurement) if table else None
        for callback in others:
            logs: dict[str, Any] = dict(row)
            if isinstance(callback, (ProgressCallback, PrinterCallback)):
                logs = {"epoch": state.epoch, **alpha_summary(self.report)}
            elif isinstance(callback, WandbCallback):
                logs = wandb_values(measurement, media)
                self._define_wandb_axes(logs)
            elif isinstance(callback, TensorBoardCallback):
                logs = dict(measurement.row(by_depth=True))
            control = callback.on_log(args, state, control, logs=logs, **kwargs) or control
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                tensorboard_media(callback.tb_writer, measurement, media, "train/")
        return control

    def _define_wandb_axes(self, keys: Iterable[str]) -> None:
        import wandb

        if wandb.run is not None:
            step_metric = "train/global_step" if self._run_log.x_axis == "step" else "train/epoch"
            define_wandb_axes(wandb.run, keys, self._run_log, step_metric, "train/")


def _callbacks_of_trainer() -> list[TrainerCallback]:
    """Return the callbacks of the trainer that is calling, in its order; none outside of a trainer.

    A callback is not told who else listens; they are found through the `CallbackHandler` that runs every event, up
    the stack. A reference to the trainer handed over by the user would do as well, but for two things: it is
    easily forgotten, and it is lost where the trainer makes the callback anew
    (`restore_callback_states_from_checkpoint`).
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return list(handler.callbacks)
        frame = frame.f_back
    return []


def _check_backend() -> None:
    """Raise under the ways of sharing a model that leave no layer to measure or no optimizer to balance."""
    from accelerate.state import AcceleratorState

    accelerator = AcceleratorState()
    backend = str(accelerator.distributed_type.value)
    # Attributes of this class raise where they are not set.
    plugin = accelerator._shared_state.get("fsdp_plugin")
    if backend == "FSDP" and getattr(plugin, "fsdp_version", 1) == 2:
        return
    if backend in _REFUSED_BACKENDS:
        raise ValueError(
            f"FARMSTrainerCallback does not work with {_REFUSED_BACKENDS[backend]}. Use one device, DDP or FSDP2"
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    for inner in stepping_optimizers(optimizer):
        for cls in type(inner).__mro__:
            if cls.__name__ in _REFUSED_OPTIMIZERS:
                raise ValueError(
                    f"FARMSTrainerCallback does not work with {cls.__name__}: it moves the layers during the "
                    "backward pass, not in step(). Choose another optim, such as adamw_torch"
                )
