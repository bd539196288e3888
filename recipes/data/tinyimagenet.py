"""Tiny ImageNet (200 classes of 500 images of 64x64 pixels), read from the folder it ships as.

The labels of its test images are not public: its validation images are the test set here, as in the papers.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from recipes.data.cache import Arrays, load_or_make
from recipes.errors import RecipeError

__all__ = ["ARCHIVE", "CLASSES", "FOLDER", "MD5", "SIDE", "URL", "prepare", "read", "samples"]

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CLASSES = 200
SIDE = 64
VERSION = 1  # of the cached arrays
_SPLITS = {True: "train", False: "val"}
"""Names of the splits: of the training images and of the others."""


def prepare(data_dir: Path, download: bool) -> None:
    """Make sure that the images are there as arrays; fetch, unpack and decode what is missing.

    Args:
        data_dir: Holds, or gets, the archive, the folder unpacked from it and the arrays.
        download: Whether a missing or damaged archive may be downloaded.

    Raises:
        OSError: There is no network, or no room.
        RuntimeError: The archive is missing or damaged, and may not be or was not downloaded whole.
        RecipeError: The folder is there but not as it ships.
    """
    decoded = all(_cache(data_dir, train).exists() for train in _SPLITS)
    unpacked = (data_dir / FOLDER).is_dir()
    if not unpacked and not decoded:
        _fetch(data_dir, download)
        _unpack(data_dir)
    for train in _SPLITS:
        read(data_dir, train)


def _fetch(data_dir: Path, download: bool) -> None:
    """Make sure that the archive is there and whole."""
    if download:
        download_url(URL, str(data_dir), ARCHIVE, MD5)
    if not check_integrity(str(data_dir / ARCHIVE), MD5):
        raise RuntimeError("no whole archive")  # `recipes.data.image_sets` tells the user what to do


def _unpack(data_dir: Path) -> None:
    """Unpack in a temporary folder and move it into place in one step: a folder of that name is whole."""
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{FOLDER}-") as part:
        extract_archive(str(data_dir / ARCHIVE), part)
        (Path(part) / FOLDER).rename(data_dir / FOLDER)


def _cache(data_dir: Path, train: bool) -> Path:
    """Return the file of the decoded images of one split."""
    return data_dir / f"{FOLDER}-{_SPLITS[train]}.npz"


def read(data_dir: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read the training or the validation images; decoded once, then kept next to the folder.

    Args:
        data_dir: Holds the unpacked folder, or its decoded images, or both.
        train: Training images, else the validation images.

    Returns:
        Images uint8 (N, 64, 64, 3) and labels int64 (N,); classes are numbered in the order of `wnids.txt`.

    Raises:
        RecipeError: The folder is not as it ships, or an image can't be decoded.
    """
    description = {"images": FOLDER, "split": _SPLITS[train], "version": VERSION}
    decode = partial(_decode, data_dir / FOLDER, train)
    arrays = load_or_make(_cache(data_dir, train), description, decode)
    return arrays["images"], arrays["labels"]


def _decode(folder: Path, train: bool) -> Arrays:
    """Decode every image of one split, on all cores: 100 000 of them take half a minute."""
    paths, labels = zip(*samples(folder, train), strict=True)
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(_pixels, paths)
        for index, pixels in enumerate(track(decoded, description="Tiny ImageNet", total=len(paths))):
            images[index] = pixels
    return {"images": images, "labels": np.array(labels, dtype=np.int64)}


def _pixels(path: Path) -> np.ndarray:
    """Decode one image: uint8 (64, 64, 3), red, green and blue."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # some are grey
    except OSError as error:
        raise RecipeError(f"{path} can't be decoded ({error}); unpack {ARCHIVE} again") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise RecipeError(f"{path} has {pixels.shape[:2]} pixels, expected {SIDE}x{SIDE}; unpack {ARCHIVE} again")
    return pixels


def samples(folder: Path, train: bool) -> list[tuple[Path, int]]:
    """List image files and their labels.

    The folder holds `wnids.txt`, `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` and `val/val_annotations.txt`.
    Validation images that somebody has sorted into folders by class are found too.

    Args:
        folder: The unpacked archive.
        train: Training images, else the validation images.

    Returns:
        Paths and labels; classes are numbered in the order of `wnids.txt`.

    Raises:
        RecipeError: Anything of this is missing; the message names it.
    """
    names = _lines(folder / "wnids.txt")
    if len(set(names)) != CLASSES:
        raise RecipeError(f"{folder / 'wnids.txt'} lists {len(set(names))} classes, expected {CLASSES}{_WAY_OUT}")
    labels = {name: label for label, name in enumerate(names)}
    if train:
        return _training_samples(folder / "train", labels)
    return _validation_samples(folder / "val", labels)


_WAY_OUT = (
    f"; expected the layout of {ARCHIVE}: wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG, "
    "val/val_annotations.txt. Delete the folder and unpack the archive again"
)


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file of the archive."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"{path} can't be read ({error}){_WAY_OUT}") from error


def _training_samples(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """List `train/<wnid>/images`, class by class."""
    pairs = []
    for name, label in labels.items():
        files = sorted((folder / name / "images").glob("*.JPEG"))
        if not files:
            raise RecipeError(f"{folder / name / 'images'} holds no images{_WAY_OUT}")
        pairs += [(file, label) for file in files]
    return pairs


def _validation_samples(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """List the images of `val` in the order of their annotations, wherever below that folder they are."""
    file = folder / "val_annotations.txt"
    listed = _annotations(file)
    found = {path.name: path for path in folder.rglob("*.JPEG")}
    missing = [name for name, _ in listed if name not in found]
    if missing or not listed:
        raise RecipeError(
            f"{folder} lacks {len(missing)} of the {len(listed)} images in val_annotations.txt, "
            f"{missing[:1] or 'which is empty'}{_WAY_OUT}"
        )
    unknown = sorted({wnid for _, wnid in listed} - labels.keys())
    if unknown:
        raise RecipeError(f"{file} names classes that wnids.txt lacks: {unknown[0]}")
    return [(found[name], labels[wnid]) for name, wnid in listed]


def _annotations(file: Path) -> list[tuple[str, str]]:
    """Read file names and classes, the first two of the columns that tabs part."""
    listed = []
    for number, line in enumerate(_lines(file), start=1):
        columns = line.split("\t")
        if len(columns) < 2:
            raise RecipeError(f"line {number} of {file} is not a file name and a class, parted by tabs{_WAY_OUT}")
        listed.append((columns[0], columns[1]))
    return listed
