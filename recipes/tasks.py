"""What is trained and how it is scored: image classification and field-to-field regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["FieldRegression", "ImageClassification", "nrmse", "relative_l2"]

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


def nrmse(prediction: Tensor, target: Tensor) -> Tensor:
    """RMSE over space divided by the target's RMS, for each sample and channel, averaged (PDEBench).

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        One number.
    """
    error, size = (x.flatten(2).square().mean(-1).sqrt() for x in (prediction - target, target))
    return torch.mean(error / size)


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Norm of each sample's error divided by the norm of its target, over channels and space, averaged.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        One number.
    """
    error, size = (torch.linalg.vector_norm(x.flatten(1), dim=-1) for x in (prediction - target, target))
    return torch.mean(error / size)


class _Task(LightningModule):
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
        """Log means over the epoch; the first value, the one that matters most, shows beside the progress bar."""
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


class FieldRegression(_Task):
    """Field-to-field regression by mean squared error; scored by nRMSE and relative L2 error."""

    kind = "fields"

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the mean squared error of a batch of fields (B, C, H, W)."""
        loss = functional.mse_loss(self(batch[0]), batch[1])
        self._log_epoch("train", batch, loss=loss)
        return loss

    def _evaluate(self, stage: str, batch: Batch) -> None:
        prediction = self(batch[0])
        scores = {"nrmse": nrmse(prediction, batch[1]), "relative_l2": relative_l2(prediction, batch[1])}
        self._log_epoch(stage, batch, **scores, loss=functional.mse_loss(prediction, batch[1]))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a validation batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Score a test batch."""
        self._evaluate("test", batch)


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
