"""Callbacks of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

__all__ = ["LastCheckpoint", "LastStepRates", "Progress"]


class LastCheckpoint(ModelCheckpoint):
    """Keep the state after the last epoch in `last.ckpt`, to resume from.

    `ModelCheckpoint(save_last=True)` does not: where it monitors a metric it writes `last.ckpt` when that has
    improved, and never after an epoch that was not validated. This is a class of its own because checkpoints tell
    the states of callbacks apart by class.

    Args:
        dirpath: The folder.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(dirpath, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


class Progress(RichProgressBar):
    """Lightning's rich progress bar without the logger's version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return what stands beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class LastStepRates(Callback):
    """Remember the learning rate and the layers' ratios of the last step.

    After training the rate can't be asked for any more: the scheduler has moved on, often to zero.

    Args:
        balancer: The FARMS callback, None where there is none.
    """

    def __init__(self, balancer: Any = None) -> None:
        self.balancer = balancer
        self.lr: float | None = None
        self.ratios: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the coming step will use."""
        self.lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        if self.balancer is not None:
            self.ratios = dict(self.balancer.ratios)

    def state_dict(self) -> dict[str, Any]:
        """Return the rates for the checkpoint: resuming a run that is over takes no step."""
        return {"lr": self.lr, "ratios": dict(self.ratios)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rates from a checkpoint."""
        self.lr, self.ratios = state_dict["lr"], dict(state_dict["ratios"])
