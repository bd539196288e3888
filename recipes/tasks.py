"""What is trained and how it is scored: image classification, field-to-field regression, forecasts of flows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from recipes.errors import RecipeError
from recipes.metrics import FieldErrors, nrmse, relative_l2
from recipes.sharding import ShardedNet

__all__ = ["FieldRegression", "Forecast", "ImageClassification", "nrmse", "relative_l2", "rollout"]

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


class _Task(ShardedNet):
    """A network with its optimizer and scheduler, both given as factories.

    Args:
        net: The network.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the scheduler from the optimizer; stepped once an epoch. None keeps the rate constant.
    """

    kind = ""

    def __init__(
        self, net: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        return torch.as_tensor(self.net(x))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the constructor's arguments that neuralop's models put among their weights.

        They hold functions and classes, which a checkpoint loaded with `weights_only` must not.
        """
        checkpoint["state_dict"].pop("_metadata", None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make optimizer and scheduler."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

    def _log_epoch(self, stage: str, batch: Batch, **values: Any) -> None:
        """Log means over the epoch; the first value, the one that matters most, shows at the progress bar."""
        for position, (name, value) in enumerate(values.items()):
            self.log(
                f"{stage}/{name}",
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=position == 0,
                batch_size=len(batch[0]),
                sync_dist=self.trainer.world_size > 1,
            )


class _FieldTask(_Task):
    """A task whose outputs are fields: a few scores at validation, all of PDEBench's at the test."""

    def __init__(
        self, net: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.test_errors = FieldErrors()

    def predict(self, batch: Batch) -> Tensor:
        """Return the prediction of the batch's target, in its shape."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the number to minimise."""
        return functional.mse_loss(prediction, target)

    def _channels(self, fields: Tensor) -> Tensor:
        """Return fields as (B, C, *space), the layout of the scores."""
        return fields

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(self.predict(batch), batch[1])
        self._log_epoch("train", batch, loss=loss)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a validation batch."""
        prediction = self.predict(batch)
        fields = self._channels(prediction), self._channels(batch[1])
        scores = {"nrmse": nrmse(*fields), "relative_l2": relative_l2(*fields)}
        self._log_epoch("val", batch, **scores, loss=self.loss(prediction, batch[1]))

    def on_test_epoch_start(self) -> None:
        """Forget the scores of a test before, finished or not."""
        self.test_errors.reset()

    def test_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Score a test batch and return its prediction, for the pictures."""
        prediction = self.predict(batch)
        self.test_errors.update(self._channels(prediction), self._channels(batch[1]))
        self._log_epoch("test", batch, loss=self.loss(prediction, batch[1]))
        return prediction

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole test set."""
        scores = {f"test/{name}": value for name, value in self.test_errors.compute().items()}
        self.log_dict(scores, sync_dist=self.trainer.world_size > 1)  # the same on every process already


class FieldRegression(_FieldTask):
    """Field-to-field regression by mean squared error; batches are pairs of fields (B, C, *space)."""

    kind = "fields"

    def predict(self, batch: Batch) -> Tensor:
        """Apply the network to the inputs."""
        return self.forward(batch[0])


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
    window, frame_shape = history.flatten(1, 2), history[:, 0].shape
    if getattr(net, "in_channels", window.shape[1]) != window.shape[1]:
        raise RecipeError(
            f"the network takes {net.in_channels} channels, but {history.shape[1]} frames of {history.shape[2]} "
            f"channels are {window.shape[1]}; set task.in_channels={window.shape[1]}"
        )
    first_graded = 0 if graded is None else steps - graded
    frames = []
    for step in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= first_graded):
            frame = net(window)
            if frame.shape != frame_shape:
                raise RecipeError(
                    f"the network must map {tuple(window.shape)} to the next frame {tuple(frame_shape)}, not to "
                    f"{tuple(frame.shape)}; set task.out_channels={frame_shape[1]}"
                )
            frames.append(frame)
            window = torch.cat([window[:, frame_shape[1] :], frame], dim=1)
    return torch.stack(frames, dim=1)


class Forecast(_FieldTask):
    """Autoregressive forecast of a time-dependent flow, as in PDEBench.

    Batches are pairs of trajectories, history (B, T_in, C, *space) and future (B, T_out, C, *space). The network
    maps the last T_in frames, stacked as channels, to the next one. Scores are those of the forecast that starts
    from the history and sees nothing of the future.

    The loss is the mean squared error of each frame, summed over the frames. Fields are those of the data, not
    normalised: PDEBench trains on raw fields, so the channel of the largest scale (pressure) dominates the loss.

    Args:
        net: Maps (B, T_in * C, *space) to (B, C, *space); coordinates are its own affair.
        optimizer: Makes the optimizer from the parameters.
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
        """Forecast the whole future from the history."""
        return rollout(self.net, batch[0], steps=batch[1].shape[1])

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of each frame, summed over the frames."""
        return functional.mse_loss(prediction, target) * target.shape[1]

    def _channels(self, fields: Tensor) -> Tensor:
        return fields.flatten(1, 2)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        history, future = batch
        steps = future.shape[1]
        if self.teacher_forcing:
            truth = torch.cat([history, future], dim=1)
            windows = (truth[:, step : step + history.shape[1]] for step in range(steps))
            prediction = torch.cat([rollout(self.net, window, steps=1) for window in windows], dim=1)
        else:
            prediction = rollout(self.net, history, steps, self.unroll_steps)
        counted = steps if self.unroll_steps is None else min(steps, self.unroll_steps)
        loss = self.loss(prediction[:, -counted:], future[:, -counted:])
        self._log_epoch("train", batch, loss=loss)
        return loss


class ImageClassification(_Task):
    """Image classification by cross-entropy; scored by accuracy.

    Args:
        net: Maps images to logits.
        num_classes: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the scheduler from the optimizer; stepped once an epoch. None keeps the rate constant.
    """

    kind = "images"

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

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the cross-entropy of a batch of images (B, C, H, W) and labels (B,)."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self._log_epoch("train", batch, loss=loss)
        return loss

    def _evaluate(self, stage: str, batch: Batch, accuracy: MulticlassAccuracy) -> None:
        logits = self(batch[0])
        accuracy(logits, batch[1])
        self._log_epoch(stage, batch, accuracy=accuracy, loss=functional.cross_entropy(logits, batch[1]))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a validation batch."""
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Score a test batch."""
        self._evaluate("test", batch, self.test_accuracy)
