"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, bundled, nothing to download."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import TensorDataset

from recipes.data.loaders import SplitData
from recipes.values import Range

__all__ = ["DigitsData"]

TOTAL = 1797
CLASSES = 10


class DigitsData(SplitData):
    """The digits as image classification, split by class-balanced sampling into train, validation and test.

    Batches are images (B, 1, H, W) and labels (B,).

    Args:
        train_size: Training images; what is left after all three splits is not used.
        val_size: Validation images.
        test_size: Test images.
        image_size: Side of the images; larger than 8 enlarges them by bilinear interpolation.
        batch_size: Images a batch.
        seed: Seed of the split. The test set does not depend on the other sizes.
        shuffle_seed: Seed of the order of the training images.
        num_workers: Processes that load batches; 0 suits data in memory.

    Raises:
        ValueError: A split has fewer images than classes, or there are not so many images.
    """

    kind = "images"
    num_classes = CLASSES

    def __init__(
        self,
        train_size: int = 1000,
        val_size: int = 297,
        test_size: int = 500,
        image_size: int = 8,
        batch_size: int = 64,
        seed: int = 0,
        shuffle_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, shuffle_seed, num_workers, evaluation_batch_size=256)
        sizes = (train_size, val_size, test_size)
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            Range(CLASSES).check(f"data.{split}_size", size)
        if sum(sizes) > TOTAL:
            raise ValueError(
                f"data.train_size, val_size and test_size must sum to at most {TOTAL}, got "
                f"{train_size} + {val_size} + {test_size}"
            )
        self.train_size, self.val_size, self.test_size = sizes
        self.image_size = image_size
        self.seed = seed

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one input, (channels, height, width)."""
        return (1, self.image_size, self.image_size)

    def _images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images, float32 (1797, 1, side, side) in [0, 1], and labels, int64 (1797,)."""
        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
        if self.image_size != 8:
            images = functional.interpolate(images, size=(self.image_size, self.image_size), mode="bilinear")
        return images, torch.as_tensor(digits.target, dtype=torch.long)

    def make_splits(self) -> dict[str, TensorDataset]:
        """Split the images and standardise them with the training images' mean and deviation."""
        images, labels = self._images()
        rest, test = self._split(labels, range(TOTAL), self.test_size)
        rest, val = self._split(labels, rest, self.val_size)
        train = rest[: self.train_size]  # in random order
        if len(rest) - self.train_size >= CLASSES:
            _, train = self._split(labels, rest, self.train_size)
        mean, deviation = images[train].mean(), images[train].std()
        return {
            name: TensorDataset((images[indices] - mean) / deviation, labels[indices])
            for name, indices in (("train", train), ("val", val), ("test", test))
        }

    def _split(self, labels: torch.Tensor, indices: Any, size: int) -> tuple[list[int], list[int]]:
        """Take `size` of the images, with the classes in equal shares; return those that are left, and these."""
        indices = list(indices)
        rest, taken = train_test_split(indices, test_size=size, random_state=self.seed, stratify=labels[indices])
        return rest, taken
