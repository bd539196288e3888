"""Small files in PDEBench's layout, and what a batch of them must hold, found by loading everything."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from recipes.data.download import FILES, FOLDER

FLOW_KEYS = {1: ("density", "pressure", "Vx"), 2: ("density", "pressure", "Vx", "Vy")}


def write_darcy(path: Path, samples: int = 40, side: int = 16, beta: float = 1.0) -> Path:
    """Write random fields as in `2D_DarcyFlow_beta*_Train.hdf5`."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["tensor"] = rng.standard_normal((samples, 1, side, side), dtype=np.float32)
        file["nu"] = np.where(rng.random((samples, side, side)) < 0.5, 0.1, 1.0).astype(np.float32)
        for axis in "xy":
            file[f"{axis}-coordinate"] = ((np.arange(side) + 0.5) / side).astype(np.float32)
        file.attrs["beta"] = beta
    return path


def write_flow(path: Path, dimensions: int, samples: int = 40, frames: int = 21, side: int = 16) -> Path:
    """Write random trajectories as in `1D_CFD_*.hdf5` or `2D_CFD_*.hdf5`."""
    rng = np.random.default_rng(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key in FLOW_KEYS[dimensions]:
            file[key] = rng.standard_normal((samples, frames, *[side] * dimensions), dtype=np.float32)
        for axis in "xy"[:dimensions]:
            file[f"{axis}-coordinate"] = ((np.arange(side) + 0.5) / side).astype(np.float32)
        file["t-coordinate"] = np.linspace(0, 1, frames + 1, dtype=np.float32)
        file.attrs["eta"] = file.attrs["zeta"] = 0.01
        if dimensions == 2:
            file.attrs["M"] = 0.1
    return path


def write_sparse_flow(path: Path, shape: tuple[int, ...]) -> Path:
    """Write a file of the full size whose fields take no place on disk: holes that read as zeros."""
    with h5py.File(path, "w") as file:
        for key in FLOW_KEYS[len(shape) - 2]:
            creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, key.encode(), h5py.h5t.NATIVE_FLOAT, space, creation)
    return path


def write_published(folder: Path, samples: int = 20) -> Path:
    """Write every published file, with all its frames, on the smallest grids that the UNet takes once thinned."""
    for file in FILES.values():
        path = folder / FOLDER / file.file_name
        if path.name.startswith("1D_CFD"):
            write_flow(path, 1, samples, frames=101, side=128)
        elif path.name.startswith("2D_CFD"):
            write_flow(path, 2, samples, frames=21, side=32)
        else:
            write_darcy(path, samples, side=16)
    return folder
