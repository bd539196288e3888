"""A real run in a folder, for the tests of what reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from farms_tb import FARMSTempBalance
from tests.helpers import Module, fit


def train_run(folder: Path, **options: Any) -> Module:
    """Train three epochs with Lightning's own CSVLogger and checkpoints, and return the trained module."""
    module = Module()
    logger = CSVLogger(folder, name="", flush_logs_every_n_steps=1)
    checkpoint = ModelCheckpoint(Path(logger.log_dir) / "checkpoints", save_last=True)
    callbacks = [FARMSTempBalance(**{"assign_func": "tb_linear_map", **options}), checkpoint]
    fit(module, callbacks, logger=logger, enable_checkpointing=True)
    return module
