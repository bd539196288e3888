"""What is trained and how it is scored: images to classes, fields to fields, forecasts of flows, text.

A task is a LightningModule around a network. It knows nothing of balancing: the callback attaches to the optimizer
that the task makes. What a task logs under `val/` can choose the best epoch (`task.monitor`), and what it logs
under `test/` stands in `summary.json`. Both are scores of each sample once, however many processes share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from recipes.errors import RecipeError
from recipes.metrics import FieldErrors, nrmse, relative_l2
from recipes.optimizers import OptimizerFactory, make_optimizer
from recipes.sharding import ShardedNet

__all__ = ["FieldRegression", "Forecast", "ImageClassification", "LanguageModel", "rollout"]

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


class _Task(ShardedNet):
    """A network with its optimizer and scheduler, both given as factories.

    Args:
        net: The network.
        optimizer: Makes the optimizer; see `recipes.optimizers.make_optimizer`.
        scheduler: Makes the scheduler from the optimizer, stepped by `interval`. None keeps the rate constant.

    Attributes:
        kind: What the network learns: "fields", "trajectories", "images" or "text". The data must be of the same
            kind.
        scores: What is logged of validation data, under `val/`.
        interval: The scheduler is stepped after each "epoch" or each "step".
        net: The network.
    """

    kind = ""
    scores: tuple[str, ...] = ("loss",)
    interval = "epoch"

    def __init__(
        self, net: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to a batch of inputs, (B, C, *space)."""
        return torch.as_tensor(self.net(x))

    def predict(self, batch: Batch) -> Tensor:
        """Return the prediction of the batch's target: what the network makes of the inputs."""
        prediction: Tensor = self(batch[0])
        return prediction

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the number to minimise, a scalar."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(self.predict(batch), batch[1])
        self._log_epoch("train", len(batch[0]), loss=loss)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the constructor's arguments that neuralop's models put among their weights.

        They hold functions and classes, which a checkpoint loaded with `weights_only` must not.
        """
        checkpoint["state_dict"].pop("_metadata", None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of all parameters and, where there is one, its scheduler."""
        optimizer = make_optimizer(self._make_optimizer, self.net)
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def _counted(self, stage: str, batch: Batch, batch_index: int) -> int:
        """Return how many samples of a batch count in the scores: all, or all but the last one.

        Where the number of processes does not divide a set, Lightning's sampler repeats samples of its start, so
        that all processes take as many steps: with fewer, one would wait for ever. A process that gets such a
        sample has it at its end.

        Args:
            stage: "val" or "test".
            batch: The batch, as it came from the loader.
            batch_index: Its place among those of this process.
        """
        size = len(batch[0])
        loader: Any = self.trainer.val_dataloaders if stage == "val" else self.trainer.test_dataloaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
            return size
        place_of_last = sampler.rank + (sampler.num_samples - 1) * sampler.num_replicas
        repeated = place_of_last >= len(sampler.dataset)  # type: ignore[arg-type]
        at_end = batch_index * loader.batch_size + size == sampler.num_samples
        return size - int(repeated and at_end)

    def _log_epoch(self, stage: str, samples: int, **values: Any) -> None:
        """Log means over the epoch; the first value, the one that matters most, shows at the progress bar.

        Args:
            stage: "train", "val" or "test".
            samples: How many samples the values are of, their weight in the mean.
            values: Numbers or metrics of torchmetrics, by name.
        """
        processes = self.trainer.world_size
        for position, (name, value) in enumerate(values.items()):
            if samples == 0 and isinstance(value, Tensor):
                value = torch.zeros_like(value)  # a mean over nothing is NaN, whatever its weight
            self.log(
                f"{stage}/{name}",
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=position == 0,
                # Lightning divides the sum of the weights by the processes, and cuts off what is left.
                batch_size=samples * processes,
                sync_dist=processes > 1,
            )


class _FieldTask(_Task):
    """A task whose outputs are fields: a few scores at validation, all of PDEBench's at the test."""

    scores = ("nrmse", "relative_l2", "loss")

    def __init__(
        self, net: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.test_errors = FieldErrors()

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error; prediction and target have the same shape."""
        return functional.mse_loss(prediction, target)

    def _channels(self, fields: Tensor) -> Tensor:
        """Return fields as (B, C, *space), the layout of the scores."""
        return fields

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log nRMSE, relative L2 error and loss of a validation batch."""
        counted = self._counted("val", batch, batch_index)
        prediction, target = self.predict(batch)[:counted], batch[1][:counted]
        fields, true_fields = self._channels(prediction), self._channels(target)
        self._log_epoch(
            "val",
            counted,
            nrmse=nrmse(fields, true_fields),
            relative_l2=relative_l2(fields, true_fields),
            loss=self.loss(prediction, target),
        )

    def on_test_epoch_start(self) -> None:
        """Forget the scores of a test before, finished or not."""
        self.test_errors.reset()

    def test_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Score a test batch and return its prediction, for the pictures."""
        prediction, target = self.predict(batch), batch[1]
        counted = self._counted("test", batch, batch_index)
        self.test_errors.update(self._channels(prediction), self._channels(target), counted)
        self._log_epoch("test", counted, loss=self.loss(prediction[:counted], target[:counted]))
        return prediction

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole test set."""
        scores = {f"test/{name}": value for name, value in self.test_errors.compute().items()}
        self.log_dict(scores, sync_dist=self.trainer.world_size > 1)  # the same on every process already


class FieldRegression(_FieldTask):
    """Field-to-field regression by mean squared error, such as from Darcy's coefficient to its solution.

    Batches are pairs of fields, inputs (B, C_in, *space) and targets (B, C_out, *space). The network maps inputs
    to targets. The arguments are those of `_Task`.
    """

    kind = "fields"


def rollout(net: nn.Module, history: Tensor, steps: int, graded: int | None = None) -> Tensor:
    """Forecast frame by frame, each from the frames before it, forecast ones among them.

    Args:
        net: Maps (B, T * C, *space), the last T frames from old to new, to the next frame (B, C, *space).
        history: The first T frames, (B, T, C, *space).
        steps: Number of frames to forecast.
        graded: Gradients flow through this many frames at the end, and nothing is kept for those before. None for
            all.

    Returns:
        The forecast, (B, steps, C, *space).

    Raises:
        RecipeError: The network takes another number of channels, or returns another shape than that of a frame.
    """
    _check_history(net, history)
    window = history.flatten(1, 2)
    frame_shape = history[:, 0].shape
    channels = frame_shape[1]
    first_graded = 0 if graded is None else steps - graded
    training = torch.is_grad_enabled()
    frames = []
    for step in range(steps):
        with torch.set_grad_enabled(training and step >= first_graded):
            frame = net(window)
            if frame.shape != frame_shape:
                raise RecipeError(
                    f"the network must map {tuple(window.shape)} to the next frame {tuple(frame_shape)}, not to "
                    f"{tuple(frame.shape)}; set task.out_channels={channels}"
                )
            frames.append(frame)
            window = torch.cat([window[:, channels:], frame], dim=1)
    return torch.stack(frames, dim=1)


def _check_history(net: nn.Module, history: Tensor) -> None:
    """Compare the channels of a history (B, T, C, *space) with `net.in_channels`, where the network has that."""
    frames, channels = history.shape[1:3]
    taken = getattr(net, "in_channels", frames * channels)
    if taken != frames * channels:
        raise RecipeError(
            f"the network takes {taken} channels, but {frames} frames of {channels} channels are "
            f"{frames * channels}; set task.in_channels={frames * channels}"
        )


class Forecast(_FieldTask):
    """Autoregressive forecast of a time-dependent flow, as in PDEBench.

    Batches are pairs of trajectories, history (B, T_in, C, *space) and future (B, T_out, C, *space). The network
    maps the last T_in frames, stacked as channels, to the next one. Scores are those of the forecast that starts
    from the history and sees nothing of the future.

    The loss is the mean squared error of each frame, summed over the frames. Fields are those of the data, not
    normalised: PDEBench trains on raw fields, so the channel of the largest scale (pressure) dominates the loss.

    Args:
        net: Maps (B, T_in * C, *space) to (B, C, *space); coordinates are its own affair.
        optimizer: Makes the optimizer; see `recipes.optimizers.make_optimizer`.
        scheduler: Makes the scheduler from the optimizer; stepped once an epoch. None keeps the rate constant.
        unroll_steps: In training, the loss counts the last so many frames and gradients flow through them alone
            (PDEBench's pushforward, with which it trains its UNet). None for all frames (its FNO).
        teacher_forcing: In training, forecast each frame from the true frames before it.

    Raises:
        ValueError: `unroll_steps` is below 1, or given together with `teacher_forcing`.
    """

    kind = "trajectories"

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        unroll_steps: int | None = None,
        teacher_forcing: bool = False,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        if unroll_steps is not None and unroll_steps < 1:
            raise ValueError(f"model.unroll_steps must be null or at least 1, got {unroll_steps}")
        if unroll_steps is not None and teacher_forcing:
            raise ValueError(
                "model.unroll_steps is for rollouts, and model.teacher_forcing=true makes none; set one of them"
            )
        self.unroll_steps = unroll_steps
        self.teacher_forcing = teacher_forcing

    def predict(self, batch: Batch) -> Tensor:
        """Forecast the whole future from the history; of the future only the number of frames is used."""
        history, future = batch
        return rollout(self.net, history, steps=future.shape[1])

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of each frame, summed over the frames."""
        return functional.mse_loss(prediction, target) * target.shape[1]

    def _channels(self, fields: Tensor) -> Tensor:
        """Return trajectories (B, T, C, *space) as (B, T * C, *space): each frame's channels are scored alone."""
        return fields.flatten(1, 2)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch, over the frames that count."""
        history, future = batch
        if self.teacher_forcing:
            prediction = self._forecast_from_truth(history, future)
        else:
            prediction = rollout(self.net, history, future.shape[1], self.unroll_steps)
        if self.unroll_steps is not None:
            prediction = prediction[:, -self.unroll_steps :]
            future = future[:, -self.unroll_steps :]
        loss = self.loss(prediction, future)
        self._log_epoch("train", len(batch[0]), loss=loss)
        return loss

    def _forecast_from_truth(self, history: Tensor, future: Tensor) -> Tensor:
        """Forecast each frame of the future from the true frames before it, never from forecast ones."""
        given = history.shape[1]
        truth = torch.cat([history, future], dim=1)
        frames = []
        for step in range(future.shape[1]):
            window = truth[:, step : step + given]
            frames.append(rollout(self.net, window, steps=1))
        return torch.cat(frames, dim=1)


class ImageClassification(_Task):
    """Image classification by cross-entropy; scored by accuracy.

    Batches are images (B, C, H, W), float32 and normalised, and labels (B,), int64.

    Args:
        net: Maps images to logits (B, num_classes).
        num_classes: Number of classes.
        optimizer: Makes the optimizer; see `recipes.optimizers.make_optimizer`.
        scheduler: Makes the scheduler from the optimizer; stepped once an epoch. None keeps the rate constant.
    """

    kind = "images"
    scores = ("accuracy", "loss")

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits (B, num_classes) and labels (B,)."""
        return functional.cross_entropy(prediction, target)

    def _evaluate(self, stage: str, batch: Batch, batch_index: int, accuracy: MulticlassAccuracy) -> None:
        """Log accuracy and loss of a batch; `accuracy` counts over the whole set, on all processes together."""
        counted = self._counted(stage, batch, batch_index)
        logits, labels = self.predict(batch)[:counted], batch[1][:counted]
        if counted > 0:  # torchmetrics refuses an empty batch
            accuracy(logits, labels)
        self._log_epoch(stage, counted, accuracy=accuracy, loss=self.loss(logits, labels))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a validation batch."""
        self._evaluate("val", batch, batch_index, self.val_accuracy)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Score a test batch."""
        self._evaluate("test", batch, batch_index, self.test_accuracy)


class LanguageModel(_Task):
    """Prediction of the next token by cross-entropy, scored by the mean loss of a token, in nats.

    Batches are tokens and the tokens after them, int64 (B, length) each. The network maps tokens to logits
    (B, length, num_tokens). The arguments are those of `_Task`; the scheduler is stepped after each step, unlike
    those of other tasks.
    """

    kind = "text"
    interval = "step"

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of the next tokens, from logits (B, T, num_tokens) and tokens (B, T)."""
        return functional.cross_entropy(prediction.flatten(0, 1), target.flatten())

    def _evaluate(self, stage: str, batch: Batch, batch_index: int) -> None:
        """Log the loss of a batch."""
        counted = self._counted(stage, batch, batch_index)
        self._log_epoch(stage, counted, loss=self.loss(self.predict(batch)[:counted], batch[1][:counted]))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a validation batch."""
        self._evaluate("val", batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Score a test batch."""
        self._evaluate("test", batch, batch_index)
