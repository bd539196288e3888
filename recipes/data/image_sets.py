"""CIFAR-10, CIFAR-100 (Krizhevsky, 2009), SVHN (Netzer et al., 2011), Tiny ImageNet and FashionMNIST.

Each is read whole, as one array of uint8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from recipes.data import fashion, tinyimagenet
from recipes.errors import RecipeError

__all__ = ["IMAGE_SETS", "Archive", "ImageSet"]

Channels = tuple[float, ...]
"""A number for each channel."""


@dataclass(frozen=True)
class Archive:
    """A file that is downloaded.

    Attributes:
        url: Where from.
        name: File name in the data folder.
        md5: Its checksum.
    """

    url: str
    name: str
    md5: str

    def state(self, data_dir: Path) -> str:
        """Say how the file lies in the data folder: "missing", "whole", or "cut short or damaged"."""
        path = data_dir / self.name
        if not path.exists():
            return "missing"
        if not check_integrity(str(path), self.md5):
            return "cut short or damaged"
        return "whole"


@dataclass(frozen=True)
class ImageSet:
    """How to get and scale one set of square images.

    Attributes:
        title: Its name, for messages.
        classes: Number of classes.
        side: Height and width, pixels.
        scaling: Mean and standard deviation of the channels, pixels in [0, 1], as published.
        archives: What is downloaded.
        fetch: `fetch(data_dir, download)` makes the set ready; raises OSError or RuntimeError where it can't.
        open: `open(data_dir, train)` returns uint8 pixels (N, H, W, C) and labels (N,).
    """

    title: str
    classes: int
    side: int
    scaling: tuple[Channels, Channels]
    archives: tuple[Archive, ...]
    fetch: Callable[[Path, bool], None]
    open: Callable[[Path, bool], tuple[Any, Any]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (channels, height, width)."""
        return (len(self.scaling[0]), self.side, self.side)

    def prepare(self, data_dir: Path, download: bool) -> None:
        """Download and unpack what is missing; archives that lie there whole are unpacked in any case.

        Args:
            data_dir: Holds the archives and what is unpacked from them.
            download: Whether a missing or damaged archive may be downloaded.

        Raises:
            RecipeError: The images are not there and can't be had; the message names the files and the way out.
        """
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            archives_are_whole = all(archive.state(data_dir) == "whole" for archive in self.archives)
            self.fetch(data_dir, download or archives_are_whole)
        except (OSError, RuntimeError) as error:
            states = [f"{a.name} is {a.state(data_dir)} (from {a.url}, MD5 {a.md5})" for a in self.archives]
            tried = f"could not be downloaded ({error})" if download else "data.download=false forbids a download"
            raise RecipeError(
                f"{self.title} is not whole in {data_dir.resolve()} and {tried}: {'; '.join(states)}. Fetch the "
                "missing, delete the damaged, or choose another folder with paths.data_dir=..."
            ) from error

    def read(self, data_dir: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the training or the test images.

        Args:
            data_dir: The data folder, after `prepare`.
            train: Training images, else the test images.

        Returns:
            Pixels uint8 (N, C, H, W) and labels int64 (N,).

        Raises:
            RecipeError: The images or labels are not those of this set.
        """
        pixels, labels = self.open(data_dir, train)
        images = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2).contiguous()
        targets = torch.as_tensor(labels, dtype=torch.long)
        if images.shape[1:] != self.shape or images.dtype != torch.uint8:
            raise RecipeError(
                f"{self.title} in {data_dir} has images {tuple(images.shape[1:])} of {images.dtype}, "
                f"expected {self.shape} of torch.uint8; fetch it again"
            )
        if len(targets) == 0 or not 0 <= int(targets.min()) <= int(targets.max()) < self.classes:
            raise RecipeError(
                f"{self.title} in {data_dir}: it has labels outside 0 to {self.classes - 1}; fetch it again"
            )
        return images, targets


def _cifar(title: str, kind: type[datasets.CIFAR10], classes: int, scaling: tuple[Channels, Channels]) -> ImageSet:
    """Return CIFAR-10 or CIFAR-100; torchvision's class reads it, and knows the archive and its checksum."""

    def fetch(data_dir: Path, download: bool) -> None:
        kind(str(data_dir), download=download)  # downloads, checks and unpacks where that is needed

    def read(data_dir: Path, train: bool) -> tuple[Any, Any]:
        dataset = kind(str(data_dir), train=train)
        return dataset.data, dataset.targets

    archive = Archive(kind.url, kind.filename, kind.tgz_md5)
    return ImageSet(title, classes, 32, scaling, (archive,), fetch, read)


def _svhn() -> ImageSet:
    """Return SVHN without its extra training images, as the papers use it."""

    def fetch(data_dir: Path, download: bool) -> None:
        for split in ("train", "test"):
            datasets.SVHN(str(data_dir), split, download=download)

    def read(data_dir: Path, train: bool) -> tuple[Any, Any]:
        dataset = datasets.SVHN(str(data_dir), "train" if train else "test")
        return dataset.data.transpose(0, 2, 3, 1), dataset.labels  # torchvision has the channels first

    archives = tuple(Archive(*datasets.SVHN.split_list[split]) for split in ("train", "test"))
    scaling = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return ImageSet("SVHN", 10, 32, scaling, archives, fetch, read)


IMAGE_SETS = {
    "cifar10": _cifar("CIFAR-10", datasets.CIFAR10, 10, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    "cifar100": _cifar("CIFAR-100", datasets.CIFAR100, 100, ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "svhn": _svhn(),
    "tinyimagenet": ImageSet(
        "Tiny ImageNet",
        tinyimagenet.CLASSES,
        tinyimagenet.SIDE,
        scaling=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        archives=(Archive(tinyimagenet.URL, tinyimagenet.ARCHIVE, tinyimagenet.MD5),),
        fetch=tinyimagenet.prepare,
        open=tinyimagenet.read,
    ),
    "fashion_mnist": ImageSet(
        "FashionMNIST",
        fashion.CLASSES,
        fashion.SIDE,
        scaling=((0.2860,), (0.3530,)),
        archives=tuple(Archive(*archive) for archive in fashion.ARCHIVES),
        fetch=fashion.prepare,
        open=fashion.read,
    ),
}
