"""Settings of toy size, and a reader of W&B's offline files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from recipes.train import CONFIG_DIR

TINY_DARCY = (
    *("data.resolution=16", "data.train_size=12", "data.val_size=4", "data.test_size=4", "data.batch_size=4"),
    *("data.workers=1", "trainer=cpu", "trainer.log_every_n_steps=1"),
)
TINY_UNET = (*TINY_DARCY, "trainer.max_epochs=2", "model.net.width=4")


def wandb_records(path: Path) -> Iterator[Any]:
    """Read a `.wandb` file: LevelDB's log format (blocks of 32 KiB, records that may span them) behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position < len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def compose_settings(*overrides: str) -> DictConfig:
    """Compose the settings as the command line does."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
