"""What each of two processes runs in `test_recipe_processes.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from recipes.train import train
from tests.recipes.recipe_runs import compose_settings


def train_in_pair(rank: int, port: int, folder: Path, runs: dict[str, tuple[str, ...]]) -> None:
    """Train one run after the other, as one of two processes that something else has started."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(world)
    torch.set_num_threads(1)
    with (folder / f"{rank}.log").open("w", encoding="utf-8") as log:
        sys.stdout = sys.stderr = log
        for name, overrides in runs.items():
            train(compose_settings(f"paths.run_dir={folder / name}", f"paths.data_dir={folder}/data", *overrides))
