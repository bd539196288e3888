"""FashionMNIST (Xiao et al., 2017): 70,000 grey images of 28x28 pixels in 10 classes, read by torchvision's class.

Debian's package `dataset-fashion-mnist` holds the same images. Where it is installed, nothing is downloaded.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

from torchvision.datasets import FashionMNIST

from farms_tb.atomic_write import atomic_path

__all__ = ["ARCHIVES", "CLASSES", "DEBIAN", "SIDE", "prepare", "read"]

CLASSES = 10
SIDE = 28
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package has its files, which are named as those of the download."""

_RAW = "FashionMNIST/raw"  # torchvision's folder
ARCHIVES = tuple((FashionMNIST.mirrors[0] + name, f"{_RAW}/{name}", md5) for name, md5 in FashionMNIST.resources)
"""URL, name in the data folder and MD5 of what torchvision downloads."""


def prepare(data_dir: Path, download: bool) -> None:
    """Unpack the files of Debian's package, or download and unpack them.

    Args:
        data_dir: Gets the folder FashionMNIST/raw, 55 MB.
        download: Whether torchvision may download what Debian's package does not have here.

    Raises:
        OSError: A file can't be read, written or downloaded.
        RuntimeError: There are no images, and they may not be downloaded.
    """
    for name, _ in FashionMNIST.resources:
        _unpack(DEBIAN / name, data_dir / _RAW / Path(name).stem)
    FashionMNIST(str(data_dir), download=download)


def read(data_dir: Path, train: bool) -> tuple[Any, Any]:
    """Read one split.

    Args:
        data_dir: The data folder, after `prepare`.
        train: The 60,000 training images, else the 10,000 test images.

    Returns:
        Pixels, uint8 (N, 28, 28, 1), and labels, int64 (N,).
    """
    dataset = FashionMNIST(str(data_dir), train=train)
    return dataset.data[..., None].numpy(), dataset.targets


def _unpack(packed: Path, path: Path) -> None:
    """Write what a gzip file holds to `path`, unless there is no such file or `path` is there already."""
    if path.exists() or not packed.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(packed) as source, atomic_path(path) as part, part.open("wb") as target:
        shutil.copyfileobj(source, target)
