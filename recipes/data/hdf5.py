"""Samples of an HDF5 file that need not fit in memory, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from recipes.console import make_console
from recipes.errors import RecipeError

__all__ = ["SampleReader", "in_memory"]

T = TypeVar("T", bound=tuple[Tensor, ...])


class SampleReader:
    """Reads single samples of the datasets of one HDF5 file, whose first axis counts the samples.

    The file is opened by the process that reads, at its first read: an open HDF5 file must not be shared with the
    loader processes.

    Args:
        path: The file.
        keys: Names of the datasets.
        remedy: What to do when the file is missing or damaged; ends every message.
    """

    def __init__(self, path: Path, keys: Sequence[str], remedy: str) -> None:
        self.path = path
        self.keys = tuple(keys)
        self.remedy = remedy
        self._file: Any = None
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shape of each dataset; leaves the file closed.

        Raises:
            RecipeError: The file is missing, cut short or not HDF5, or lacks a dataset of floats.
        """
        with self._open() as file:
            return {key: self._shape(file, key) for key in self.keys}

    def made_by(self) -> dict[str, Any]:
        """Read which settings `recipes.generate` made the file with; the generator is None for files of others."""
        with self._open() as file:
            if "generator" not in file.attrs:
                return {"generator": None}
            return {name: np.asarray(value).item() for name, value in file.attrs.items()}

    def read(self, key: str, index: int, select: tuple[slice, ...]) -> np.ndarray:
        """Read a part of one sample.

        The sample is read in one piece, up to where `select` stops on its first axis, and thinned in memory: HDF5
        is several times slower at gathering every second point itself.

        Args:
            key: Name of the dataset.
            index: The sample.
            select: One slice for each axis of the sample.

        Returns:
            The part, contiguous and float32.

        Raises:
            RecipeError: The file cannot be read, or the part holds NaN or infinity.
        """
        try:
            block = self._dataset(key)[index, : select[0].stop]
        except OSError as error:
            raise RecipeError(
                f"{self.path}: cannot read sample {index} of {key!r} ({error}). {self.remedy}"
            ) from error
        part = np.ascontiguousarray(block[select], dtype=np.float32)
        if not np.isfinite(part).all():
            raise RecipeError(f"{self.path}: sample {index} of {key!r} holds NaN or infinity. {self.remedy}")
        return part

    def _dataset(self, key: str) -> Any:
        """Return a dataset of the open file; open it where this process has not yet done so."""
        if self._process != os.getpid():
            self._file = None  # one inherited by a fork is closed before the file is opened again
            self._file, self._process = self._open(), os.getpid()
        return self._file[key]

    def _open(self) -> Any:
        """Open the file for reading; say how to come by it where that fails."""
        if not self.path.is_file():
            raise RecipeError(f"{self.path.name} is not in {self.path.parent.resolve()}. {self.remedy}")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise RecipeError(
                f"{self.path} is cut short or no HDF5 file ({error}); move it away. {self.remedy}"
            ) from error

    def _shape(self, file: Any, key: str) -> tuple[int, ...]:
        """Return the shape of a dataset, which must be one of floats."""
        found = file.get(key)
        if not isinstance(found, h5py.Dataset) or found.dtype.kind != "f":
            there = ", ".join(sorted(file)) or "nothing"
            raise RecipeError(f"{self.path} has no dataset {key!r} of floats; it holds {there}. {self.remedy}")
        return tuple(found.shape)


def in_memory(samples: Dataset[T], description: str) -> TensorDataset:
    """Read every sample once, under a progress bar.

    Args:
        samples: Tuples of tensors, those at one place of one shape.
        description: Stands before the progress bar.

    Returns:
        The same samples, held in memory.
    """
    size = len(samples)  # type: ignore[arg-type]
    stacks = [torch.empty(size, *x.shape) for x in samples[0]]
    console = make_console()
    for index in track(range(size), description, console=console, transient=True, disable=not console.is_terminal):
        for stack, x in zip(stacks, samples[index], strict=True):
            stack[index] = x
    return TensorDataset(*stacks)
