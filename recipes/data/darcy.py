"""Darcy flow, made on the spot: -div(a grad u) = beta on the unit square, u = 0 on its boundary.

The elliptic problem is solved directly (cell-centred finite volumes, sparse LU), not marched to a steady state.
Coefficient families: a Gaussian random field thresholded at zero, as in Li et al., "Fourier Neural Operator for
Parametric Partial Differential Equations" (ICLR 2021), and the thresholded sum of Gaussian bumps of PDEBench
(Takamoto et al., NeurIPS 2022).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from rich.progress import track
from scipy import sparse
from scipy.sparse.linalg import splu
from torch.utils.data import DataLoader, TensorDataset

from recipes.data.cache import Arrays, load_or_make
from recipes.data.loaders import evaluation_loader, training_loader

__all__ = ["FAMILIES", "DarcyData", "DarcySpec", "bumps", "gaussian_field", "generate", "sample", "solve_darcy"]

SPLITS = ("train", "val", "test")


def cell_centres(n: int) -> np.ndarray:
    """Centres of n equal cells of [0, 1], shape (n,)."""
    return (np.arange(n) + 0.5) / n


def gaussian_field(rng: np.random.Generator, n: int, modes: int = 32, tau: float = 3.0) -> np.ndarray:
    """Draw from N(0, (-Laplace + tau^2)^-2) with zero normal derivative at the boundary.

    The draw is a cosine series with a fixed number of modes, so one seed is one function at every resolution.

    Args:
        rng: Source of the coefficients.
        n: Cells per side.
        modes: Cosine modes per side.
        tau: Inverse length scale.

    Returns:
        Field at the cell centres, shape (n, n).
    """
    k = np.arange(modes)
    cosines = np.cos(np.pi * np.outer(cell_centres(n), k)) * np.where(k == 0, 1.0, np.sqrt(2.0))
    amplitude = 1.0 / (np.pi**2 * (k[:, None] ** 2 + k**2) + tau**2)
    amplitude[0, 0] = 0.0  # zero mean: both values of the coefficient occur in every sample
    field = cosines @ (amplitude * rng.standard_normal((modes, modes))) @ cosines.T
    return np.asarray(field)


def bumps(rng: np.random.Generator, n: int, count: int = 5) -> np.ndarray:
    """Sum of Gaussian bumps exp(-r^2/s), centres U(0,1)^2, s ~ U(0, 0.5), minus its mean: PDEBench's family.

    Returns:
        Field at the cell centres, shape (n, n).
    """
    centres, scales = rng.random((count, 2)), 0.5 * (1.0 - rng.random(count))
    x = cell_centres(n)
    along = [np.exp(-((x[:, None] - centres[:, axis]) ** 2) / scales) for axis in (0, 1)]
    field = along[0] @ along[1].T
    return np.asarray(field - field.mean())


FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {"grf": gaussian_field, "bumps": bumps}


def _operator(a: np.ndarray) -> sparse.csc_matrix:
    """Finite-volume matrix of -div(a grad .), times the cell area, for `a` of shape (n, n)."""
    n = len(a)
    down = 2 * a[:-1] * a[1:] / (a[:-1] + a[1:])
    right = 2 * a[:, :-1] * a[:, 1:] / (a[:, :-1] + a[:, 1:])
    diagonal = np.zeros_like(a)
    diagonal[:-1] += down
    diagonal[1:] += down
    diagonal[:, :-1] += right
    diagonal[:, 1:] += right
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        diagonal[edge] += 2 * a[edge]  # the wall is half a cell away
    below = -down.ravel()
    beside = -np.pad(right, ((0, 0), (0, 1))).ravel()[:-1]
    bands = [below, beside, diagonal.ravel(), beside, below]
    return sparse.diags(bands, offsets=[-n, -1, 0, 1, n], format="csc")


def solve_darcy(a: np.ndarray, source: float | np.ndarray = 1.0) -> np.ndarray:
    """Solve -div(a grad u) = source on the unit square with u = 0 on the boundary.

    Args:
        a: Positive coefficient at the cell centres, shape (n, n) with n >= 2.
        source: Right-hand side, a number or an array of shape (n, n).

    Returns:
        Solution at the cell centres, shape (n, n), second-order accurate for smooth `a`.

    Raises:
        ValueError: `a` is not a square of positive, finite numbers.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ValueError(f"the coefficient must have shape (n, n) with n >= 2, got {a.shape}")
    if not (np.isfinite(a).all() and (a > 0).all()):
        raise ValueError("the coefficient must be positive and finite everywhere")
    right_side = np.broadcast_to(np.asarray(source, dtype=float) / a.size, a.shape).ravel()
    factors = splu(_operator(a), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    return np.asarray(factors.solve(right_side)).reshape(a.shape)


@dataclass(frozen=True)
class DarcySpec:
    """Which Darcy problem a sample is drawn from.

    Attributes:
        family: Coefficient family, one of `FAMILIES`.
        resolution: Cells per side.
        low: Coefficient where the field is negative.
        high: Coefficient elsewhere.
        beta: Constant source.
        seed: Root of every sample's own seed.
    """

    family: str = "grf"
    resolution: int = 32
    low: float = 0.1
    high: float = 1.0
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"data.family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.resolution < 2:
            raise ValueError(f"data.resolution must be at least 2, got {self.resolution}")
        if not 0 < self.low <= self.high:
            raise ValueError(f"data.low and data.high need 0 < low <= high, got {self.low} and {self.high}")


def sample(spec: DarcySpec, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Make one sample; it depends on nothing but its arguments.

    The seed is child (split, index) of `spec.seed`, so splits are disjoint streams, and a sample stays the same
    however many others are made, and in whichever order.

    Returns:
        Coefficient and solution, both float32 of shape (n, n).
    """
    seed = np.random.SeedSequence(spec.seed, spawn_key=(SPLITS.index(split), index))
    field = FAMILIES[spec.family](np.random.default_rng(seed), spec.resolution)
    a = np.where(field < 0, spec.low, spec.high)
    return a.astype(np.float32), solve_darcy(a, spec.beta).astype(np.float32)


def generate(spec: DarcySpec, split: str, count: int, workers: int = 1) -> Arrays:
    """Make `count` samples of a split under a progress bar.

    Args:
        spec: The problem.
        split: "train", "val" or "test".
        count: Number of samples.
        workers: Threads (the sparse solver runs outside Python's lock).

    Returns:
        Arrays "a" and "u", float32 of shape (count, n, n).
    """
    with ThreadPoolExecutor(workers) as pool:
        pairs = pool.map(lambda index: sample(spec, split, index), range(count))
        made = list(track(pairs, description=f"Darcy {split} data", total=count))
    return {"a": np.stack([a for a, _ in made]), "u": np.stack([u for _, u in made])}


class DarcyData(LightningDataModule):
    """Darcy flow as a field-to-field regression: coefficient in, solution out.

    Inputs are standardised, targets divided by their root mean square, both with the numbers of the training set;
    nRMSE and relative L2 do not notice the scaling of the target.

    Args:
        data_dir: Where the cache files live.
        family: Coefficient family, "grf" or "bumps".
        resolution: Cells per side.
        low: Lower value of the coefficient.
        high: Higher value of the coefficient.
        beta: Constant source.
        train_size: Training samples.
        val_size: Validation samples.
        test_size: Test samples.
        batch_size: Samples a batch.
        seed: Seed of the data.
        shuffle_seed: Seed of the order of the training samples.
        workers: Threads that make the data.
        num_workers: Processes that load batches; 0 suits data in memory.
    """

    kind = "fields"

    def __init__(
        self,
        data_dir: str | Path,
        family: str = "grf",
        resolution: int = 32,
        low: float = 0.1,
        high: float = 1.0,
        beta: float = 1.0,
        train_size: int = 400,
        val_size: int = 100,
        test_size: int = 100,
        batch_size: int = 20,
        seed: int = 0,
        shuffle_seed: int = 0,
        workers: int = 2,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.spec = DarcySpec(family, resolution, low, high, beta, seed)
        self.sizes = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"data.{split}_size must be at least 1, got {size}")
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.workers = workers
        self.num_workers = num_workers
        self.datasets: dict[str, TensorDataset] = {}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one input, (channels, height, width)."""
        return (1, self.spec.resolution, self.spec.resolution)

    def _load(self, split: str) -> Arrays:
        description: dict[str, Any] = {
            **asdict(self.spec),
            "split": split,
            "count": self.sizes[split],
            "version": 1,
        }
        tag = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:10]
        name = f"{self.spec.family}_{self.spec.resolution}_{split}_{self.sizes[split]}_{tag}.npz"
        make = lambda: generate(self.spec, split, self.sizes[split], self.workers)  # noqa: E731
        return load_or_make(self.data_dir / "darcy" / name, description, make)

    def prepare_data(self) -> None:
        """Make what the cache lacks (once, on one process)."""
        for split in SPLITS:
            self._load(split)

    def setup(self, stage: str) -> None:
        """Load and scale all three splits."""
        if self.datasets:
            return
        raw = {split: {k: torch.from_numpy(v)[:, None] for k, v in self._load(split).items()} for split in SPLITS}
        mean, std = raw["train"]["a"].mean(), raw["train"]["a"].std().clamp_min(1e-6)
        scale = raw["train"]["u"].square().mean().sqrt()
        self.datasets = {s: TensorDataset((r["a"] - mean) / std, r["u"] / scale) for s, r in raw.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches: inputs and targets, both (B, 1, n, n)."""
        return training_loader(self.datasets["train"], self.batch_size, self.shuffle_seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return evaluation_loader(self.datasets["val"], self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return evaluation_loader(self.datasets["test"], self.batch_size, self.num_workers)
