"""The callback for Hugging Face's Trainer: the options and guarantees of the Lightning one.

Everything that does not depend on the trainer is in `farms_tb.training.session`. What does is here: when the
Trainer calls which event, how it counts epochs, where its checkpoints keep the state of callbacks, how its
reporters want their rows, and which of its backends and optimizers leave nothing to balance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.balancing.optimizer_checks import stepping_optimizers
from farms_tb.keywords import CallbackKeywords, takes_options
from farms_tb.missing import cannot_import
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions
from farms_tb.presets import Preset
from farms_tb.training.metrics import Measurement, Media, RunLog
from farms_tb.training.run import CallbackOptions, Run
from farms_tb.training.schedule import Moment, RunLength
from farms_tb.training.session import ShowsResults
from farms_tb.training.sinks import (
    define_wandb_axes,
    media_to_show,
    tensorboard_media,
    wandb_values,
    with_media_if_written,
)

try:
    from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
    from transformers.trainer import Trainer
    from transformers.trainer_callback import (
        CallbackHandler,
        ExportableState,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
    from transformers.trainer_utils import has_length
except ImportError as error:
    remedy = 'pip install "farms-tb[transformers]"'
    raise ImportError(cannot_import("FARMSTrainerCallback", error, remedy)) from error

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainingArguments
    from typing_extensions import Unpack

T = TypeVar("T")

_REFUSED_BACKENDS = {
    "DEEPSPEED": "DeepSpeed: it keeps the parameters and the optimizer to itself",
    "FSDP": "FSDP1: it flattens the layers into one parameter",
    "MEGATRON_LM": "Megatron-LM: it keeps the optimizer to itself",
    "XLA": "XLA devices: they are not supported",
}
# Optimizers whose `step` does nothing: they move each parameter during the backward pass.
_REFUSED_OPTIMIZERS = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")


@takes_options(SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions)
class FARMSTrainerCallback(ShowsResults, TrainerCallback, ExportableState):
    """See how well each layer is trained, and balance the layers' learning rates, under Hugging Face's Trainer.

    `farms_tb.FARMSTempBalance` for `transformers.Trainer`: the same options with the same defaults, the same
    guarantees. Pass it in `callbacks`; model, optimizer, scheduler and `TrainingArguments` stay as they are.

    Logged at each measurement, with every reporter of the trainer (`report_to`) and in `state.log_history`:
    `farms/alpha/<layer>`, `farms/ratio/<layer>`, `farms/lr/<layer>`, `farms/rank_share/<layer>`,
    `farms/alpha_mean` and `farms/alpha_std` over the layers that are trained, `farms/ratio_mean`; where layers
    are compared with random ones, by the default map or `verdicts=True`, also `farms/effect/<layer>`,
    `farms/z/<layer>` and the share of layers with each verdict. Like
    all metrics of the trainer they appear under `train/` in W&B and TensorBoard, there with the layers numbered by
    depth: `train/farms_alpha/03_<layer>`. When training is over a last row holds the alphas of the final weights,
    before `load_best_model_at_end` puts others in their place. The console gets the mean and the standard
    deviation of alpha only, and with more than 900 layers the other reporters get the aggregates only.

    A run resumed by `train(resume_from_checkpoint=...)` continues bitwise identically, with or without
    `restore_callback_states_from_checkpoint`. That flag also brings back the options of the checkpoint, in a new
    callback that takes this one's place: look for it in `trainer.callback_handler.callbacks`.

    The Trainer does not tell callbacks of an error. After one, the next `train()` with this callback starts
    cleanly. Before you remove the callback, put another one in its place or step the optimizer yourself, call
    `detach()`: until then every step of the optimizer has the last ratios.

    Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359; FARMS, Hu et al., ICML 2025,
    arXiv 2506.06280.

    Args:
        preset: a published method by name, see `farms_tb.presets`; options given by name override it.
        spectrum: the options of `SpectrumOptions` below as one object; an option given by name overrides its
            field.
        ratios: the options of `RatioOptions` below as one object, likewise.
        schedule: the options of `ScheduleOptions` below as one object, likewise.
        logging: the options of `LoggingOptions` below as one object, likewise.

    Attributes:
        preset: the published method that was asked for by name; None without one.
        options: what the callback was asked for.
        report: the latest measurement; after training, of the final weights. None before training.
        ratios: active learning-rate ratio of each layer by name; empty before training.

    Raises:
        TypeError: an option unknown or of the wrong type.
        ValueError: an option out of range. At the start of `train`: a second callback of this class, DeepSpeed,
            FSDP1 or an optimizer that cannot have layer-wise learning rates, no layer to analyse, none of its
            parameters in the optimizer, a pattern of `exclude` that matches no layer.

    Example:
        >>> callback = FARMSTrainerCallback(every_n_steps=500, lr_min_ratio=0.7, lr_max_ratio=1.3)
        >>> callback.ratios  # until it has been in Trainer(..., callbacks=[callback]).train()
        {}
    """

    _how_to_begin = "call trainer.train first"

    def __init__(
        self,
        *,
        preset: Preset | None = None,
        spectrum: SpectrumOptions | None = None,
        ratios: RatioOptions | None = None,
        schedule: ScheduleOptions | None = None,
        logging: LoggingOptions | None = None,
        **options: Unpack[CallbackKeywords],
    ) -> None:
        self._set_up(preset, options, spectrum=spectrum, ratios=ratios, schedule=schedule, logging=logging)
        self._epoch = -1
        # Whether the final weights were measured, because the Trainer was about to stop.
        self._is_finished = False

    def detach(self) -> None:
        """Leave the optimizer as it was found: needed only after an error in training. Safe to call twice."""
        self._is_finished = False
        self._session.stop()

    def state(self) -> dict[str, Any]:
        """Return options, ratios, report and clock as plain values, for `trainer_state.json`.

        Returns:
            `args`, from which the Trainer makes the callback anew on request; `attributes`, which it then sets.
        """
        attributes = {"preset": self.preset, "_restored": self._session.state_dict()}
        return {"args": self.options.as_plain(), "attributes": attributes}

    @property
    def _restored(self) -> dict[str, Any] | None:
        """The saved state; the Trainer sets this attribute, by the name it has in checkpoints."""
        return self._session.restored

    @_restored.setter
    def _restored(self, state: dict[str, Any] | None) -> None:
        self._session.restored = state

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Refuse what cannot work before any time is spent.

        Raises:
            ValueError: DeepSpeed, FSDP1, Megatron-LM or XLA.
        """
        _check_backend()
        return control

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Attach to the optimizer, which is set up and restored by now, and apply restored ratios.

        Raises:
            ValueError: the trainer has a second callback of this class, the optimizer cannot have layer-wise
                learning rates, the model has no layer to balance, or the saved state is not one of this package.
        """
        self.detach()
        _check_backend()
        _check_only_one()
        # `state.epoch` is fractional: exact at the ends of epochs, but useless between them where the dataset has
        # no length or an epoch was broken off. So it only tells in which epoch to start.
        self._epoch = math.floor(state.epoch or 0) - 1
        self._take_saved_state(state)
        self._session.start(_run(self.options, args, state, **kwargs))
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Wait for a measurement in the background before a checkpoint, which rank zero saves alone."""
        if control.should_save or control.should_evaluate:
            self._session.settle()
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the final weights, once no step will follow.

        Not in `on_train_end`: by then the best model may have taken their place, and reporters have closed their
        files.
        """
        if control.should_training_stop:
            return self._measure_final_weights(args, state, control, **kwargs)
        return self.on_step_end(args, state, control, **kwargs)

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
        is_summary = logs is not None and "train_runtime" in logs
        if is_summary:
            control = self._measure_final_weights(args, state, control, **kwargs)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the final weights, where a subclass of Trainer logs no summary, and detach."""
        control = self._measure_final_weights(args, state, control, **kwargs)
        self.detach()
        return control

    def _take_saved_state(self, state: TrainerState) -> None:
        """Find the state that a checkpoint holds.

        The Trainer hands callbacks their saved state only on `restore_callback_states_from_checkpoint`, but the
        checkpoint's whole `TrainerState` is available in any case.
        """
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__)
        resumed = state.global_step > 0 and isinstance(saved, dict)
        self._session.restored = saved.get("attributes", {}).get("_restored") if resumed else None
        # Where the checkpoint was written without this callback, the Trainer's next save would miss its key.
        states.setdefault(type(self).__name__, self.state())

    def _measure_if_due(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure if it is time, and log."""
        if self._is_finished:  # another callback has taken the stop back: a step follows
            self._is_finished, self._session.running = False, True
        with self._detached_after_error():
            found = self._session.measure_if_due(self._moment(state))
        for measurement in found:
            control = self._log(args, state, control, measurement, **kwargs)
        return control

    def _measure_final_weights(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure and log once after the last step, at the first of the events that may be the last."""
        if not self._session.running:
            return control
        # What is logged below calls `on_log` of this callback too.
        self._is_finished, self._session.running = True, False
        with self._detached_after_error():
            found = self._session.finish(self._moment(state))
        for measurement in found:
            control = self._log(args, state, control, measurement, **kwargs)
        return control

    @contextmanager
    def _detached_after_error(self) -> Iterator[None]:
        """Detach after an error or Ctrl-C, of which no event of the Trainer tells."""
        try:
            yield
        except BaseException:
            self.detach()
            raise

    def _moment(self, state: TrainerState) -> Moment:
        """Return where training stands, by this callback's count of epochs and the Trainer's of steps."""
        return Moment(self._epoch, state.global_step, state.epoch or 0.0, state.global_step)

    def _log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        measurement: Measurement,
        **kwargs: Any,
    ) -> TrainerControl:
        """Do what `Trainer.log` does, on rank zero: append to the history and call the other callbacks.

        It is not `Trainer.log` itself because subclasses override that, to add, and then forget, the metrics that
        they collected for the next row of their own (TRL's do).
        """
        if not self._session.logs:
            return control
        run_log = self._session.current.run_log
        state.log_history.append({**measurement.row(), "step": state.global_step})
        others = [callback for callback in _callbacks_of_trainer() if callback is not self]
        media = media_to_show(others, measurement, run_log)

        def tell(callback: TrainerCallback, media: Media | None) -> TrainerControl:
            logs = _logs_for(callback, state, measurement, media)
            if isinstance(callback, WandbCallback):
                _define_wandb_axes(logs, run_log)
            changed: TrainerControl | None = callback.on_log(args, state, control, logs=logs, **kwargs)
            return changed or control

        for callback in others:
            to_file = media if isinstance(callback, WandbCallback) else None
            control = with_media_if_written(callback, to_file, partial(tell, callback))
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                tensorboard_media(callback.tb_writer, measurement, media, "train/")
        return control


def _logs_for(
    callback: TrainerCallback, state: TrainerState, measurement: Measurement, media: Media | None
) -> dict[str, Any]:
    """Return what a reporter is given of a measurement: the console the aggregates, W&B everything."""
    if isinstance(callback, (ProgressCallback, PrinterCallback)):
        return {"epoch": state.epoch, **measurement.aggregates()}
    if isinstance(callback, WandbCallback):
        return wandb_values(measurement, media)
    if isinstance(callback, TensorBoardCallback):
        return dict(measurement.row(by_depth=True))
    return dict(measurement.row())


def _define_wandb_axes(keys: Iterable[str], run_log: RunLog) -> None:
    """Tell the W&B run of the trainer what the keys are plotted against; nothing where W&B has no run."""
    import wandb

    if wandb.run is None:
        return
    step_metric = "train/epoch"
    if run_log.x_axis == "step":
        step_metric = "train/global_step"
    define_wandb_axes(wandb.run, keys, run_log, step_metric, "train/")


def _run(options: CallbackOptions, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> Run:
    """Describe the run that begins, from the objects that the Trainer passes to every event."""
    model, first, loader = kwargs["model"], kwargs["optimizer"], kwargs.get("train_dataloader")

    def optimizers() -> list[Optimizer]:
        # The Trainer keeps giving the first one to callbacks where its own was exchanged during training.
        trainer = _calling(Trainer)
        if trainer is None or trainer.optimizer is None:
            return [first]
        return [trainer.optimizer]

    def attach() -> LayerBalancer:
        if not options.ratios.only_measures:
            for optimizer in optimizers():
                _check_optimizer(optimizer)
        return LayerBalancer(model, optimizers(), options.spectrum, options.ratios, share=args.world_size > 1)

    return Run(
        model=model,
        optimizers=optimizers,
        attach=attach,
        loggers=_callbacks_of_trainer(),
        is_rank_zero=state.is_world_process_zero,
        known_length=loader is None or has_length(loader),
        length=lambda: _length(args, state, loader),
    )


def _length(args: TrainingArguments, state: TrainerState, loader: Any) -> RunLength:
    """Return how many optimizer steps an epoch and the run have, as far as the Trainer knows."""
    per_epoch = None
    if loader is not None and has_length(loader):
        per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    return RunLength(per_epoch, state.max_steps if state.max_steps > 0 else None)


def _callbacks_of_trainer() -> list[TrainerCallback]:
    """Return the callbacks of the trainer that is calling, in its order; none outside of a trainer."""
    handler = _calling(CallbackHandler)
    if handler is None:
        return []
    return list(handler.callbacks)


def _calling(cls: type[T]) -> T | None:
    """Return the object of a class whose method is calling, from however far up the stack; None without one.

    A callback is not told which other callbacks there are, nor who the trainer is; both are found up the stack. A
    reference to the trainer from the user would do as well, but is easily forgotten, and lost where the trainer
    makes the callback anew (`restore_callback_states_from_checkpoint`).
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, cls):
            return owner
        frame = frame.f_back
    return None


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


def _check_only_one() -> None:
    """Raise where the trainer that is calling has two of these callbacks, whose rows and states would mix."""
    others = [callback for callback in _callbacks_of_trainer() if isinstance(callback, FARMSTrainerCallback)]
    if len(others) > 1:
        raise ValueError("the trainer has two FARMSTrainerCallback callbacks: keep one")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raise for an optimizer that moves the parameters outside of `step`, where no ratio would reach them."""
    for inner in stepping_optimizers(optimizer):
        names = {cls.__name__ for cls in type(inner).__mro__}
        for refused in names.intersection(_REFUSED_OPTIMIZERS):
            raise ValueError(
                f"FARMSTrainerCallback does not work with {refused}: it moves the layers during the backward "
                "pass, not in step(). Choose another optim, such as adamw_torch"
            )
