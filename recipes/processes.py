"""Several processes that train one model (DDP, FSDP), started by Lightning, torchrun or SLURM."""

from __future__ import annotations

import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from recipes.errors import RecipeError

__all__ = ["check_processes", "process_rank"]


def process_rank() -> int:
    """Return which process this is, also before they have met; 0 for the first or only one.

    Lightning reads it when it is imported, or from the trainer; what starts the processes may set it in between.
    """
    known = int(getattr(rank_zero_only, "rank", 0))
    return known or int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def check_processes(trainer: Trainer) -> None:
    """Refuse to start several processes from within a sweep: each would start the sweep again.

    Args:
        trainer: The trainer, before training.

    Raises:
        RecipeError: This is such a sweep.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or trainer.world_size == 1:
        return
    if launcher.cluster_environment.creates_processes_externally:
        return
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise RecipeError(
            f"a sweep can't start the {trainer.world_size} processes of trainer.devices by itself: start its "
            "runs one by one (seed=...), or let SLURM start all processes (hydra/launcher=slurm)"
        )
