"""The engine that a study asks for: `study.engine=local` or `ray`."""

from __future__ import annotations

import os

import torch

from recipes.children import available_cores
from recipes.engine import Engine, LocalEngine, RayEngine
from recipes.study.cells import Study

__all__ = ["make_engine"]


def make_engine(study: Study) -> Engine:
    """Return the engine of a study, not started yet.

    Raises:
        RecipeError: The engine is not installed.
    """
    resources = study.resources
    if resources.engine == "ray":
        share = resources.gpus_per_run if study.uses_gpus else None
        folders = {str(cfg.paths.data_dir) for cell in study.cells for cfg in cell.arms.values()}
        return RayEngine(resources.address, resources.workers, share, sorted(folders))
    processes = resources.workers or available_cores()
    gpus = _gpus() if study.uses_gpus else []
    if gpus and resources.gpus_per_run is not None:
        processes = min(processes, max(1, int(len(gpus) / resources.gpus_per_run)))
    return LocalEngine(processes, gpus)


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` has."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]
