"""The image sets of the papers as tiny files of the layout in which they ship."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

TRAIN, TEST = 40, 16


def write_cifar(folder: Path) -> None:
    """CIFAR-10 and CIFAR-100 of forty random images, unpacked as torchvision expects them."""
    rng = np.random.default_rng(0)

    def images(count: int, classes: int, labels: str) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, labels: rng.integers(0, classes, count).tolist()}

    files: dict[str, dict[str, Any]] = {
        "cifar-100-python/train": images(TRAIN, 100, "fine_labels"),
        "cifar-100-python/test": images(TEST, 100, "fine_labels"),
        "cifar-100-python/meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
        "cifar-10-batches-py/test_batch": images(TEST, 10, "labels"),
        "cifar-10-batches-py/batches.meta": {"label_names": [f"class {i}" for i in range(10)]},
    }
    for index in range(1, 6):
        files[f"cifar-10-batches-py/data_batch_{index}"] = images(TRAIN // 5, 10, "labels")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))


def write_svhn(folder: Path) -> None:
    """SVHN's MATLAB files; as there, the digit 0 has label 10."""
    rng = np.random.default_rng(1)
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": np.arange(count)[:, None] % 10 + 1})


def write_fashion_mnist(folder: Path, packed: bool = True) -> None:
    """FashionMNIST's four IDX files, packed by gzip or not; labels take turns."""
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], dtype=">i4").tobytes()  # 8: unsigned bytes
            content = head + array.tobytes()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def colour(label: int) -> tuple[int, int, int]:
    """Colour of the fake Tiny ImageNet's images of a class."""
    return label % 16 * 16, label // 16 * 16, 128


def write_tiny_imagenet(folder: Path) -> Path:
    """Tiny ImageNet of one training image a class and sixteen validation images, each of one colour."""
    root = folder / "tiny-imagenet-200"
    names = [f"n{(label * 7919) % 10_000:08d}" for label in range(200)]  # in no order, as there
    (root / "val/images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for label, name in enumerate(names):
        images = root / "train" / name / "images"
        images.mkdir(parents=True)
        Image.new("RGB", (64, 64), colour(label)).save(images / f"{name}_0.JPEG")
    rows = []
    for index in range(TEST):
        label = index * 12
        Image.new("RGB", (64, 64), colour(label)).save(root / f"val/images/val_{index}.JPEG")
        rows.append(f"val_{index}.JPEG\t{names[label]}\t0\t0\t63\t63\n")
    (root / "val/val_annotations.txt").write_text("".join(rows), encoding="utf-8")
    return root
