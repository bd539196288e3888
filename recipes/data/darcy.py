"""Darcy flow, made on the spot by `recipes.generate.darcy` and kept in a cache."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.utils.data import TensorDataset

from recipes.data.cache import Arrays, load_or_make
from recipes.data.loaders import SplitData
from recipes.generate.darcy import SPLITS, DarcySpec, sample
from recipes.values import Range

__all__ = ["DarcyData", "generate"]


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


class DarcyData(SplitData):
    """Darcy flow as a field-to-field regression: coefficient in, solution out.

    Inputs are standardised, targets divided by their root mean square, both with the numbers of the training set;
    nRMSE and relative L2 do not notice the scaling of the target.

    Batches are inputs and targets, both (B, 1, n, n).

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

    Raises:
        ValueError: An argument is out of range.
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
        super().__init__(batch_size, shuffle_seed, num_workers)
        Range(2).check("data.resolution", resolution)
        try:
            self.spec = DarcySpec(family, resolution, low, high, beta, seed)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        self.sizes = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        for split, size in self.sizes.items():
            Range(1).check(f"data.{split}_size", size)
        self.data_dir = Path(data_dir)
        self.workers = workers

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one input, (channels, height, width)."""
        return (1, self.spec.resolution, self.spec.resolution)

    def _load(self, split: str) -> Arrays:
        """Read one split from its cache file, whose name stands for all settings of its data, or make it."""
        count = self.sizes[split]
        description: dict[str, Any] = {**asdict(self.spec), "split": split, "count": count, "version": 1}
        tag = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:10]
        name = f"{self.spec.family}_{self.spec.resolution}_{split}_{count}_{tag}.npz"
        make = partial(generate, self.spec, split, count, self.workers)
        return load_or_make(self.data_dir / "darcy" / name, description, make)

    def prepare_data(self) -> None:
        """Make what the cache lacks (once, on one process)."""
        for split in SPLITS:
            self._load(split)

    def make_splits(self) -> dict[str, TensorDataset]:
        """Load and scale all three splits."""
        arrays = {split: self._load(split) for split in SPLITS}
        fields = {split: [torch.from_numpy(own[name])[:, None] for name in "au"] for split, own in arrays.items()}
        coefficient, solution = fields["train"]
        mean, deviation = coefficient.mean(), coefficient.std().clamp_min(1e-6)  # they may all have one value
        scale = solution.square().mean().sqrt()
        return {split: TensorDataset((a - mean) / deviation, u / scale) for split, (a, u) in fields.items()}
