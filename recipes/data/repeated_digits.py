"""The digits, with epochs of many passes, for training of very many short steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from recipes.data.digits import DigitsData
from recipes.data.loaders import epoch_generator
from recipes.values import Range

__all__ = ["RepeatedDigits"]


class _ShuffledPasses(Sampler[list[int]]):
    """Shuffle each pass over the samples by (seed, epoch, pass); whole batches as lists of indices.

    Args:
        size: Number of samples.
        batch_size: Samples a batch.
        passes: Passes an epoch.
        seed: Seed of the shuffles.
    """

    def __init__(self, size: int, batch_size: int, passes: int, seed: int) -> None:
        self.size, self.batch_size, self.passes, self.seed = size, batch_size, passes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffles of the epoch that comes; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.passes * -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = epoch_generator(self.seed, self.epoch)
        for _ in range(self.passes):
            order = torch.randperm(self.size, generator=generator).tolist()
            for start in range(0, self.size, self.batch_size):
                yield order[start : start + self.batch_size]


class RepeatedDigits(DigitsData):
    """The digits as image classification; an epoch is a number of passes over the training images.

    What happens once an epoch (validation, a measurement of the layers, checkpoints, a row of metrics) then
    happens once in so many passes.

    Args:
        passes: Passes an epoch.
        **options: Those of `DigitsData`.

    Raises:
        ValueError: `passes` is below 1, or as `DigitsData` raises.
    """

    def __init__(self, passes: int = 1, **options: Any) -> None:
        super().__init__(**options)
        Range(1).check("data.passes", passes)
        self.passes = passes

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, `passes` over the images an epoch."""
        dataset = self.datasets["train"]
        batches = _ShuffledPasses(len(dataset), self.batch_size, self.passes, self.shuffle_seed)
        # A TensorDataset takes the indices of a whole batch at once, many times faster than one by one.
        return DataLoader(dataset, sampler=batches, batch_size=None)
