"""Data loaders shuffled by seed and epoch alone, so that a resumed run sees the same batches.

A shuffle that draws from torch's global generator depends on all that was drawn before. Here the order of an epoch
is a function of (seed, epoch), whatever the network, the arm or an interruption have drawn: runs of one seed are
paired batch by batch. `SplitData` is what data with such loaders have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["EpochShuffle", "SplitData", "epoch_generator", "training_loader"]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator whose draws depend on seed and epoch alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class EpochShuffle(Sampler[int]):
    """Shuffle indices 0..size-1 by (seed, epoch).

    Lightning calls `set_epoch` before each epoch and, where processes share the samples,
    `recipes.callbacks.EpochOrder` does.

    Args:
        size: Number of samples.
        seed: Seed of the shuffles.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the epoch that comes; epochs are counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=epoch_generator(self.seed, self.epoch)).tolist()


def training_loader(
    dataset: Dataset[Any],
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return a loader of shuffled batches; a last batch of a single sample is dropped, for BatchNorm's sake.

    Args:
        dataset: The training samples.
        batch_size: Samples a batch.
        seed: Seed of the order.
        num_workers: Processes that read samples; with 0 the training process reads them itself.
        collate_fn: Makes a batch from a list of samples; None for torch's own.
    """
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochShuffle(size, seed),
        drop_last=size > batch_size and size % batch_size == 1,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class SplitData(LightningDataModule, ABC):
    """Data in three splits that are made once, and loaders of their batches.

    Args:
        batch_size: Samples a training batch.
        shuffle_seed: Seed of the order of the training samples.
        num_workers: Processes that load batches; with 0 the training process loads them itself.
        evaluation_batch_size: Samples a validation or test batch; None for as many as in training.

    Attributes:
        datasets: The splits, under "train", "val" and "test"; empty before `setup`.
        collate_fn: Makes a batch from a list of samples; None for torch's own. Classes may have another.
    """

    collate_fn: Callable[[Any], Any] | None = None

    def __init__(
        self, batch_size: int, shuffle_seed: int, num_workers: int = 0, evaluation_batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.num_workers = num_workers
        self.evaluation_batch_size = evaluation_batch_size or batch_size
        self.datasets: dict[str, Any] = {}  # Any: torch's Dataset has no length

    @abstractmethod
    def make_splits(self) -> dict[str, Any]:
        """Return the data sets of the splits, under "train", "val" and "test"."""

    def setup(self, stage: str) -> None:
        """Make the splits, once: Lightning calls this before training and again before the test."""
        if not self.datasets:
            self.datasets = self.make_splits()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        loader = training_loader(
            self.datasets["train"], self.batch_size, self.shuffle_seed, self.num_workers, self.collate_fn
        )
        if self.trainer is not None and isinstance(loader.sampler, EpochShuffle):
            # Processes that load data begin with the first epoch of a resumed run before any callback is called.
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            loader.sampler.set_epoch(progress.processed)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        """Return the batches of a split in order, the last one as small as it comes."""
        return DataLoader(
            self.datasets[split],
            batch_size=self.evaluation_batch_size,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
