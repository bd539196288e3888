"""The callback that draws predictions at the end of a test, from batches as they pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from recipes.metrics import nrmse_by_channel
from recipes.plots import channel_names, plot_error_growth, plot_fields, plot_flow_1d, plot_flow_2d

__all__ = ["PredictionPictures"]

SAMPLES = 3
"""Samples that are shown of static fields."""


class PredictionPictures(Callback):
    """Draw `predictions.png` at the end of a test, and for flows `error_growth.png`.

    Static fields are drawn in two dimensions of space, flows in one or two; nothing is for anything else. The
    first samples of the test set are shown; the error's growth is that of the whole set (of a distributed run:
    of the first process's part). W&B gets the pictures too, where it is among the loggers.

    Args:
        folder: Where the pictures go; it must be there.
        title: Their heading.
    """

    def __init__(self, folder: str | Path, title: str = "") -> None:
        self.folder = Path(folder)
        self.title = title
        self._forget()

    def _forget(self) -> None:
        """Keep nothing of the batches that have passed."""
        self._shown: tuple[Tensor, Tensor, Tensor] | None = None
        self._samples = 0
        self._errors: Tensor | float = 0.0
        self._baseline: Tensor | float = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the test before."""
        self._forget()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples, and add up errors by time.

        Args:
            trainer: The trainer.
            pl_module: The task; its `kind` says whether the fields are those of a flow.
            outputs: The predictions, if the test step returns them.
            batch: Inputs and targets.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        flow = getattr(pl_module, "kind", "") == "trajectories"
        if not _can_be_drawn(flow, outputs, batch):
            return
        inputs, targets = batch
        if self._shown is None:
            self._shown = _first(inputs), _first(targets), _first(outputs)
        if flow:
            self._samples += len(targets)
            self._errors = self._errors + _error_by_time(outputs, targets)
            self._baseline = self._baseline + _error_by_time(inputs[:, -1:].expand_as(targets), targets)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, save and log, on the first process alone."""
        if self._shown is None or not trainer.is_global_zero:
            return
        draw = self._draw_fields
        if self._samples:
            draw = self._draw_flow
        pictures = draw(*self._shown)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for picture in pictures:
                    logger.log_image(f"pictures/{picture.stem}", [str(picture)])
        self._forget()

    def _draw_fields(self, inputs: Tensor, targets: Tensor, predictions: Tensor) -> list[Path]:
        """Draw the first channel of static fields.

        Args:
            inputs: Coefficients, (B, C, X, Y).
            targets: Solutions, (B, C, X, Y).
            predictions: The network's solutions, likewise.

        Returns:
            The picture made.
        """
        picture = self.folder / "predictions.png"
        plot_fields(inputs[:, 0], targets[:, 0], predictions[:, 0], picture, title=self.title)
        return [picture]

    def _draw_flow(self, inputs: Tensor, targets: Tensor, predictions: Tensor) -> list[Path]:
        """Draw the first trajectory, and the errors of all by time.

        Args:
            inputs: The frames that are known, (B, T, C, *space); they are not drawn.
            targets: The frames that follow, (B, T, C, *space).
            predictions: The network's, likewise.

        Returns:
            The pictures made.
        """
        pictures = [self.folder / "predictions.png", self.folder / "error_growth.png"]
        draw = {4: plot_flow_1d, 5: plot_flow_2d}[targets.ndim]
        draw(targets[0], predictions[0], pictures[0], title=self.title)
        errors = torch.as_tensor(self._errors).cpu() / self._samples
        baseline = torch.as_tensor(self._baseline).cpu() / self._samples
        names = channel_names(targets.shape[2], targets.ndim - 3)
        plot_error_growth(errors, baseline, pictures[1], names=names, title=self.title)
        return pictures


def _can_be_drawn(flow: bool, outputs: Any, batch: Any) -> bool:
    """Return whether a test step returned fields (B, C, X, Y), or of a flow (B, T, C, *space), as the target's.

    Tasks and data of the user's own may return anything else, of which nothing is drawn.

    Args:
        flow: Whether the fields are those of a flow.
        outputs: What the test step returned.
        batch: What the loader gave.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    target = batch[1]
    if not isinstance(outputs, Tensor) or not isinstance(target, Tensor):
        return False
    dimensions = (4, 5) if flow else (4,)
    return outputs.shape == target.shape and outputs.ndim in dimensions


def _first(fields: Tensor) -> Tensor:
    """Return the first samples of a batch, on the CPU: the rest of the batch can be freed."""
    return fields[:SAMPLES].float().cpu()


def _error_by_time(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum the nRMSE of trajectories over the samples.

    Args:
        prediction: The network's frames, or others to compare with, (B, T, C, *space).
        target: The frames of the data, likewise.

    Returns:
        The sums by time and channel, (T, C).
    """
    errors = nrmse_by_channel(prediction.flatten(1, 2), target.flatten(1, 2))
    return errors.sum(0).reshape(target.shape[1:3])
