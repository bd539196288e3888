"""Several processes that train one model."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from recipes.errors import RecipeError

__all__ = ["check_processes", "process_rank"]


def process_rank() -> int:
    """Return which process this is, also before they have met; 0 for the first or only one."""
    return int(getattr(rank_zero_only, "rank", 0))


def check_processes(trainer: Trainer) -> None:
    """Refuse to start several processes from within a sweep: each would start the sweep again.

    Raises:
        RecipeError: This is such a sweep.
    """
    starts_some = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and not (
        trainer.strategy.launcher.cluster_environment.creates_processes_externally
    )
    swept = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if starts_some and swept and trainer.world_size > 1:
        raise RecipeError(
            f"a sweep can't start the {trainer.world_size} processes of trainer.devices by itself: start its "
            "runs one by one (seed=...), or let SLURM start all processes (hydra/launcher=slurm)"
        )
