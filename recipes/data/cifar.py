"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision, with the papers' augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from recipes.data.loaders import evaluation_loader, training_loader
from recipes.errors import RecipeError

__all__ = ["CIFARData"]


class _Variant(NamedTuple):
    dataset: type[datasets.CIFAR10]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


VARIANTS = {
    10: _Variant(datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: _Variant(datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class CIFARData(LightningDataModule):
    """CIFAR with random crops (padding 4) and flips for training.

    The papers train on all 50 000 training images and choose the best epoch on the test set; here the epoch is
    chosen on `val_size` training images held out, and the test set is seen once.

    Args:
        data_dir: Where torchvision keeps the archive; downloaded there on first use.
        num_classes: 10 or 100.
        val_size: Training images held out for validation.
        batch_size: Images a batch.
        seed: Seed of the validation split.
        shuffle_seed: Seed of the order of the training images.
        download: Whether a missing archive may be downloaded.
        num_workers: Processes that load batches.
    """

    kind = "images"
    sample_shape = (3, 32, 32)

    def __init__(
        self,
        data_dir: str | Path,
        num_classes: int = 10,
        val_size: int = 5000,
        batch_size: int = 128,
        seed: int = 0,
        shuffle_seed: int = 0,
        download: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        if num_classes not in VARIANTS:
            raise ValueError(f"data.num_classes must be 10 or 100, got {num_classes}")
        if val_size < 1:
            raise ValueError(f"data.val_size must be at least 1 (the best epoch is chosen on it), got {val_size}")
        self.variant = VARIANTS[num_classes]
        self.data_dir = Path(data_dir)
        self.val_size = val_size
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.seed = seed
        self.download = download
        self.num_workers = num_workers
        self.subsets: dict[str, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """Download and unpack the archive where it is missing.

        Raises:
            RecipeError: The archive is neither there nor to be had; the message names folder and file.
        """
        try:
            self._open(train=True, transform=None, download=self.download)
        except (OSError, RuntimeError) as error:
            kind = self.variant.dataset
            raise RecipeError(
                f"{kind.__name__} is not in {self.data_dir.resolve()} and could not be downloaded ({error}). "
                f"Fetch {kind.filename} from {kind.url} on a machine with a network and put it "
                f"(MD5 {kind.tgz_md5}), or the folder {kind.base_folder} unpacked from it, there; "
                "or choose another folder with paths.data_dir=..."
            ) from error

    def _open(self, train: bool, transform: Any, download: bool = False) -> datasets.CIFAR10:
        return self.variant.dataset(str(self.data_dir), train=train, transform=transform, download=download)

    def setup(self, stage: str) -> None:
        """Open the splits; validation and test images are not augmented."""
        if self.subsets:
            return
        plain = [transforms.ToTensor(), transforms.Normalize(self.variant.mean, self.variant.std)]
        augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
        train = self._open(train=True, transform=transforms.Compose(augmented))
        held_out = self._open(train=True, transform=transforms.Compose(plain))
        if self.val_size >= len(train):
            raise RecipeError(f"data.val_size={self.val_size} leaves none of the {len(train)} images to train on")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.subsets = {
            "train": Subset(train, order[self.val_size :]),
            "val": Subset(held_out, order[: self.val_size]),
            "test": self._open(train=False, transform=transforms.Compose(plain)),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented batches: images (B, 3, 32, 32) and labels (B,)."""
        return training_loader(self.subsets["train"], self.batch_size, self.shuffle_seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return evaluation_loader(self.subsets["val"], 4 * self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return evaluation_loader(self.subsets["test"], 4 * self.batch_size, self.num_workers)
