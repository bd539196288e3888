"""The Lightning callback: measures at the start of epochs, balances the optimizers' steps, logs, resumes.

Everything that does not depend on the trainer is in `farms_tb.training.session`. What does is here: which events
Lightning calls in a resumed run, which strategies leave nothing to balance, and how other callbacks find the
metrics they monitor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.keywords import CallbackKeywords, takes_options
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions
from farms_tb.presets import Preset
from farms_tb.training.metrics import Measurement
from farms_tb.training.run import Run
from farms_tb.training.schedule import Moment, RunLength
from farms_tb.training.session import ShowsResults
from farms_tb.training.sinks import log_measurement

if TYPE_CHECKING:
    from typing_extensions import Unpack

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed keeps the parameters and the optimizer to itself",
    "FSDPStrategy": "FSDP1 flattens the layers into one parameter",
    "XLAStrategy": "XLA devices are not supported",
    "XLAFSDPStrategy": "XLA devices are not supported",
    "DataParallelStrategy": "data parallelism in one process is not supported",
}
_AVERAGING_CALLBACKS = ("StochasticWeightAveraging", "WeightAveraging")


@takes_options(SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions)
class FARMSTempBalance(ShowsResults, Callback):
    """See how well each layer is trained, and balance the layers' learning rates.

    At the start of training and of every epoch the callback measures the power-law exponent alpha of each
    layer's weights, maps the alphas to learning-rate ratios, and logs both. The default map compares each layer
    with random ones of its shape, and measures these once, at the start; `preset="farms"` is the papers' method.
    At any step a parameter's learning rate is the scheduler's, times its layer's ratio. The module, the optimizers
    and the schedulers stay as they are: `optimizer.param_groups` never changes, and with ratios of 1 training is
    bitwise identical to training without the callback. Its state is saved in checkpoints, and a resumed run
    continues as if it had not stopped.

    Logged at each measurement, with every logger of the trainer: `farms/alpha/<layer>`, `farms/ratio/<layer>`,
    `farms/lr/<layer>`, `farms/rank_share/<layer>`, `farms/alpha_mean` and `farms/alpha_std` over the layers that
    are trained, `farms/ratio_mean`, and `epoch`, the number of completed epochs; where layers are compared with
    random ones, by the default map or `verdicts=True`, also `farms/effect/<layer>`, `farms/z/<layer>` and shares
    of verdicts, `farms/share_random` and so on. Layers with adapters have `farms/adapter_change/<layer>`. The
    default map adds `farms/tau` and `farms/mean_weight`, the noise-aware one `farms/lambda`. After training a last
    row holds the metrics of the final weights. Models of more than 900 layers log the aggregates only. In W&B and
    TensorBoard, which sort by name, the keys of a layer are `farms_alpha/03_<layer>` and so on: each metric has a
    section, in order of depth. `farms/alpha_mean` and `farms/alpha_std` can be monitored by other callbacks.

    A callback that has been used can be pickled, with report and ratios, without model and optimizers. Where the
    strategy trains in child processes (`ddp_spawn`, `ddp_notebook`), report and ratios come back from rank zero.

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
        ValueError: an option out of range. At the start of `fit`: a second callback of this class, a strategy or
            an optimizer that cannot have layer-wise learning rates, no layer to analyse, none of its parameters in
            an optimizer, a pattern of `exclude` that matches no layer.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FARMSTempBalance()], logger=False)
    """

    _how_to_begin = "call trainer.fit first"

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
        super().__init__()
        self._set_up(preset, options, spectrum=spectrum, ratios=ratios, schedule=schedule, logging=logging)

    @property
    def state_key(self) -> str:
        """A fixed name, so that a checkpoint finds the callback whatever its options."""
        return "FARMSTempBalance"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any time is spent.

        Raises:
            ValueError: a second callback of this class, or a strategy that cannot have layer-wise learning rates.
        """
        if stage != "fit":
            return
        self._session.expect_run()
        if sum(isinstance(callback, FARMSTempBalance) for callback in _callbacks(trainer)) > 1:
            raise ValueError("the trainer has two FARMSTempBalance callbacks: keep one")
        for cls in type(trainer.strategy).__mro__:
            reason = _REFUSED_STRATEGIES.get(cls.__name__)
            if reason is not None:
                raise ValueError(
                    f"FARMSTempBalance does not work with {cls.__name__}: {reason}. "
                    "Use one device, DDP or FSDP2 (ModelParallelStrategy)"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which are set up and restored by now, and apply restored ratios."""
        self._session.start(self._run(trainer, pl_module))
        # The rest of an epoch resumed in its middle may be monitored too.
        self._publish(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it is time."""
        self._measure_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time: a run resumed from the last batch of an epoch skips `on_train_epoch_start`."""
        self._measure_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, for the report and the loggers, and detach from the optimizers."""
        if self._session.running and not _weights_change_later(trainer, self):
            self._finish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure final weights that could not be measured before.

        Those that a later callback has averaged in its `on_train_end`, and those of a run that was killed, and
        resumed, after its last step: Lightning then finds nothing left to train, and calls no event of training.
        Where they were measured before the checkpoint, its report and ratios are shown.
        """
        if not trainer.limit_train_batches:
            return
        averaged = self._session.running and _weights_change_later(trainer, self)
        if self._session.restored is not None:
            self.on_train_start(trainer, pl_module)
        if self._session.running:
            self._finish(trainer, anew=averaged)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach from the optimizers."""
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizers."""
        self._stop(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return ratios, report and clock as plain values, for the checkpoint.

        The values are those that `torch.load(weights_only=True)` reads. Empty before the first measurement.
        """
        return self._session.state_dict() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; take it at once while training (a finder puts the run back)."""
        self._session.restored = state_dict or None
        if self._session.running:
            self._session.restore()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model's `log` and `log_dict`, which Lightning sets on every callback."""
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Run:
        spectrum, ratios, share = self.options.spectrum, self.options.ratios, trainer.world_size > 1
        return Run(
            model=pl_module,
            optimizers=lambda: trainer.optimizers,
            attach=lambda: LayerBalancer(pl_module, trainer.optimizers, spectrum, ratios, share=share),
            loggers=trainer.loggers,
            is_rank_zero=trainer.is_global_zero,
            known_length=not math.isinf(trainer.num_training_batches),
            length=lambda: _length(trainer),
        )

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self._session.measure_if_due(_moment(trainer))
        if found:
            self._log(trainer, found)
            self._publish(trainer, pl_module)

    def _finish(self, trainer: Trainer, *, anew: bool = False) -> None:
        """Measure the final weights, log them, and detach from the optimizers."""
        self._log(trainer, self._session.finish(_moment(trainer), anew=anew))
        self._session.stop()

    def _stop(self, trainer: Trainer) -> None:
        """Detach where training ends; another trainer may validate with the same callbacks meanwhile."""
        if trainer.state.fn == "fit":
            self._session.stop()

    def _log(self, trainer: Trainer, measurements: list[Measurement]) -> None:
        if not self._session.logs:
            return
        for measurement in measurements:
            log_measurement(trainer.loggers, measurement, self._session.current.run_log)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the aggregates to callbacks that monitor a metric.

        Not by `pl_module.log`: what is logged that way at the start of an epoch is not available in the validation
        of that epoch, where checkpoints and early stopping look. Where no layer has an alpha they get NaN, and not
        what was measured before.
        """
        none = {"farms/alpha_mean": math.nan, "farms/alpha_std": math.nan}
        for name, value in (self._session.current.alpha_summary() or none).items():
            trainer.callback_metrics[name] = torch.tensor(value, device=pl_module.device)


def _length(trainer: Trainer) -> RunLength:
    """Return how many steps of the clock an epoch and the run have, as far as the trainer knows."""
    if _any_is(_callbacks(trainer), "GradientAccumulationScheduler"):
        return RunLength()  # epochs of different lengths
    batches, steps = trainer.num_training_batches, trainer.estimated_stepping_batches
    per_epoch = None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    if not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1:
        return RunLength(per_epoch)  # max_steps counts the steps of every optimizer, the clock counts batches
    if per_epoch is not None and trainer.max_epochs is not None and _adds_an_epoch(trainer):
        steps = min(steps, per_epoch * (trainer.max_epochs - 1))
    return RunLength(per_epoch, None if math.isinf(steps) or steps <= 0 else int(steps))


def _adds_an_epoch(trainer: Trainer) -> bool:
    """Return whether averaged weights get an epoch without steps at the end, for the statistics of batch norms."""
    if trainer.max_epochs == -1:
        return False
    averaging = [callback for callback in _callbacks(trainer) if _any_is([callback], "StochasticWeightAveraging")]
    return any(getattr(callback, "_model_contains_batch_norm", False) for callback in averaging)


def _moment(trainer: Trainer) -> Moment:
    """Return where training stands, by the trainer's counts."""
    # LearningRateMonitor and the user's own metrics are logged under this step, which counts batches that stepped.
    logged_step = trainer.fit_loop.epoch_loop._batches_that_stepped
    # With manual optimization any number of optimizers step in a batch, any number of times: nobody knows how many
    # steps an epoch has, but how many batches.
    step = trainer.global_step if trainer.lightning_module.automatic_optimization else logged_step
    return Moment(trainer.current_epoch, step, trainer.current_epoch, logged_step)


def _weights_change_later(trainer: Trainer, callback: Callback) -> bool:
    """Return whether a callback that comes later in the list puts averages into the module when training ends."""
    callbacks = _callbacks(trainer)
    later = callbacks[callbacks.index(callback) :] if callback in callbacks else []
    return _any_is(later, *_AVERAGING_CALLBACKS)


def _callbacks(trainer: Trainer) -> list[Callback]:
    """Return all callbacks of a trainer, in its order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _any_is(callbacks: list[Callback], *names: str) -> bool:
    """Return whether a callback is of a class of such a name, in `lightning` or in `pytorch_lightning`."""
    return any(cls.__name__ in names for callback in callbacks for cls in type(callback).__mro__)
