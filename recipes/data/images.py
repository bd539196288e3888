"""Image classification as in the papers: images lie in memory as bytes and are augmented on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset

from recipes.data.augment import crop_and_flip, draw_crops
from recipes.data.image_sets import IMAGE_SETS
from recipes.data.loaders import SplitData
from recipes.errors import RecipeError
from recipes.values import Range

__all__ = ["ImageData", "Images"]

PADDING = 4


class Images(Dataset[tuple[torch.Tensor, ...]]):
    """Images, labels, and places, read a batch at a time.

    Args:
        images: uint8 (N, C, H, W), shared by all the splits that are cut from it.
        labels: int64 (N,).
        indices: Those that belong to this split, int64 (M,).
        with_places: Also return each sample's place in `indices`, int64.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, with_places: bool = False
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices
        self.with_places = with_places

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([place]))

    def __getitems__(self, places: list[int]) -> tuple[torch.Tensor, ...]:
        """Return the batch itself; torch's loader asks for one where a data set offers this."""
        chosen = torch.tensor(places)
        indices = self.indices[chosen]
        images, labels = self.images[indices], self.labels[indices]
        if self.with_places:
            return images, labels, chosen
        return images, labels


def _as_it_is(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the batch: `Images` hands out whole ones."""
    return batch


class ImageData(SplitData):
    """An image set, with random crops (padding 4) and flips for training.

    The whole set lies in memory as bytes; batches are cropped, mirrored and scaled once they are on the device.
    Training batches are pixels uint8 (B, C, H, W), labels (B,) and places in the training set (B,). Those for
    validation and test have no places, and are four times as large, as nothing is kept for gradients.

    What happens to an image in an epoch depends on `shuffle_seed`, the epoch and the image alone: a resumed run,
    and several processes, see the same.

    The papers train on all training images and choose the best epoch on the test set. Here the epoch is chosen on
    `val_size` training images held out, and the test set is seen once.

    Args:
        data_dir: Where the archives lie, or go on first use.
        dataset: "cifar10", "cifar100", "svhn", "tinyimagenet" or "fashion_mnist".
        val_size: Training images held out for validation; 0 trains on all of them and validates on none.
        batch_size: Images a batch.
        seed: Seed of the validation split and of the draw of `train_size` images.
        shuffle_seed: Seed of the order and the augmentation of the training images.
        download: Whether a missing archive may be downloaded.
        train_size: Train on so many of the other training images, with each class in its proportion, drawn by
            `seed`; None for all of them.

    Raises:
        ValueError: There is no such image set, `val_size` is negative, or `train_size` is below the number of
            classes.
    """

    kind = "images"
    collate_fn = staticmethod(_as_it_is)

    def __init__(
        self,
        data_dir: str | Path,
        dataset: str = "cifar10",
        val_size: int = 5000,
        batch_size: int = 128,
        seed: int = 0,
        shuffle_seed: int = 0,
        download: bool = True,
        train_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, shuffle_seed, evaluation_batch_size=4 * batch_size)
        if dataset not in IMAGE_SETS:
            raise ValueError(f"data.dataset must be one of {', '.join(IMAGE_SETS)}, got {dataset!r}")
        Range(0).check("data.val_size", val_size)
        self.image_set = IMAGE_SETS[dataset]
        if train_size is not None and train_size < self.image_set.classes:
            raise ValueError(
                f"data.train_size must be at least the number of classes, {self.image_set.classes}, "
                f"got {train_size}"
            )
        self.num_classes = self.image_set.classes
        self.sample_shape = self.image_set.shape
        self.data_dir = Path(data_dir)
        self.val_size = val_size
        self.train_size = train_size
        self.seed = seed
        self.download = download

    def prepare_data(self) -> None:
        """Download and unpack what is missing (once, on one process)."""
        self.image_set.prepare(self.data_dir, self.download)

    def make_splits(self) -> dict[str, Images]:
        """Read the images and split the training images."""
        images, labels = self.image_set.read(self.data_dir, train=True)
        if self.val_size >= len(images):
            raise RecipeError(f"data.val_size={self.val_size} leaves none of the {len(images)} images to train on")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        test = self.image_set.read(self.data_dir, train=False)
        return {
            "train": Images(images, labels, self._drawn(order[self.val_size :], labels), with_places=True),
            "val": Images(images, labels, order[: self.val_size]),
            "test": Images(*test, torch.arange(len(test[0]))),
        }

    def _drawn(self, indices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Draw `train_size` of the images that are not held out, int64 (M,), stratified by class, or all."""
        if self.train_size is None or self.train_size == len(indices):
            return indices
        try:
            drawn, _ = train_test_split(
                indices.numpy(),
                train_size=self.train_size,
                random_state=self.seed,
                stratify=labels[indices].numpy(),
            )
        except ValueError as error:
            raise RecipeError(
                f"data.train_size={self.train_size} of the {len(indices)} images that "
                f"data.val_size={self.val_size} leaves can't be drawn: {error}; choose another size"
            ) from error
        return torch.from_numpy(drawn)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:  # type: ignore[override]
        """Validation batches; none with `val_size=0`."""
        return super().val_dataloader() if self.val_size else []

    def on_before_batch_transfer(
        self, batch: tuple[torch.Tensor, ...], dataloader_idx: int
    ) -> tuple[torch.Tensor, ...]:
        """Look up what this epoch does to each training image.

        Returns:
            Pixels, labels and, of a training batch, crops int64 (B, 3).
        """
        if len(batch) == 2:
            return batch
        pixels, labels, places = batch
        return pixels, labels, self._crops()[places]

    def on_after_batch_transfer(
        self, batch: tuple[torch.Tensor, ...], dataloader_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment training images, and scale all images, on the device.

        Returns:
            Images, float (B, C, H, W), and labels (B,).
        """
        pixels, labels, *crops = batch
        if crops:
            pixels = crop_and_flip(pixels, crops[0], PADDING)
        return self._scaled(pixels), labels

    def _crops(self) -> torch.Tensor:
        """Draw what this epoch does to every training image, int64 (N, 3), from shuffle seed and epoch alone."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        seed = int(np.random.SeedSequence((self.shuffle_seed, epoch)).generate_state(1)[0])
        return draw_crops(len(self.datasets["train"]), PADDING, seed)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Standardise by the published numbers, in the precision that the trainer asks for."""
        mean, std = (torch.tensor(x).to(pixels.device)[:, None, None] for x in self.image_set.scaling)
        images = (pixels.float() / 255 - mean) / std
        if self.trainer is None:
            return images
        return torch.as_tensor(self.trainer.precision_plugin.convert_input(images))
