"""What interrupts a training run at a chosen moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO


class StopInEpoch(Callback):
    """Stop after the first batch of an epoch, as Ctrl-C does.

    Args:
        epoch: The epoch, from 0.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it is time."""
        if trainer.current_epoch == self.epoch:
            for logger in trainer.loggers:
                logger.save()
            raise SystemExit("stopped")


class FullDisk(TorchCheckpointIO):
    """Write half of each checkpoint after the first, then fail."""

    def __init__(self) -> None:
        self.count = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint, or half of it."""
        super().save_checkpoint(checkpoint, path, storage_options)
        self.count += 1
        if self.count > 1:
            file = Path(path)
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            raise OSError(28, "No space left on device", str(path))
