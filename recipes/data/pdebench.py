"""PDEBench's data files: Darcy flow and compressible Navier-Stokes (Takamoto et al., NeurIPS 2022).

How the samples are split. The first tenth of a file is the test set: 1000 of 10 000, a ninth of the number
left. Of these, the pool, every k-th is trained on, k = 1 / fraction. So far this is the split of Liu et al.,
"Model Balancing Helps Low-data Training and Fine-tuning" (EMNLP 2024), where the best epoch is chosen on the
test set.

Here it is chosen on samples of the pool that are held out, the last of every `val_every` in a row: with 10, 900
of the 9000, the same ones for every fraction. For an even k (and an even `val_every`) none of them is an every
k-th one, so the training set is the published one to the sample: 4500, 2250, 900, 225 and 50 for fractions of
1/2, 1/4, 1/10, 1/40 and 1/180. For an odd k the training set lacks those held out: fraction 1 trains on 8100 of
9000.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.data.download import FILES, FOLDER
from recipes.data.hdf5 import SampleReader, in_memory
from recipes.data.loaders import SplitData
from recipes.errors import RecipeError
from recipes.values import Range

__all__ = ["FileOptions", "PDEBenchDarcy", "PDEBenchFlow", "split_samples"]

Pair = tuple[Tensor, Tensor]
Shapes = dict[str, tuple[int, ...]]

BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
CHANNELS = {1: ("density", "pressure", "Vx"), 2: ("density", "pressure", "Vx", "Vy")}


def sample_step(fraction: float | str) -> int:
    """Return k of the data fraction 1/k.

    Args:
        fraction: One over a whole number, as text ("1/180") or as the float nearest to it.

    Raises:
        ValueError: It is no such fraction.
    """
    try:
        exact = Fraction(str(fraction)).limit_denominator(1_000_000)
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if exact.numerator != 1:
        raise ValueError(f"data.fraction must be one over a whole number, such as 1, 0.1 or 1/180, got {fraction}")
    return exact.denominator


def split_samples(total: int, step: int, val_every: int) -> dict[str, list[int]]:
    """Split the samples of a file; see the top of this module.

    Args:
        total: Samples in the file.
        step: Every step-th of the pool is trained on.
        val_every: The last of every so many of the pool is held out.

    Returns:
        Indices into the file, ascending, under "train", "val" and "test".

    Raises:
        RecipeError: A split would be empty.
    """
    test = total // 10
    pool = range(test, total)
    if test == 0:
        raise RecipeError(f"the file holds {total} samples; a tenth is the test set, so at least 10 are needed")
    if len(pool) < val_every:
        raise RecipeError(
            f"data.val_every={val_every} holds out none of the {len(pool)} samples that are not for testing; "
            "take a smaller one"
        )
    if len(pool) < step:
        raise RecipeError(
            f"data.fraction=1/{step} of the {len(pool)} samples that are not for testing is less than one; "
            "take a larger one"
        )
    val = pool[val_every - 1 :: val_every]
    train = [index for index in pool[::step] if index not in val]
    return {"train": train, "val": list(val), "test": list(range(test))}


@dataclass(frozen=True)
class FileOptions:
    """The arguments that `PDEBenchDarcy` and `PDEBenchFlow` share.

    Attributes:
        data_dir: Folder of all data; PDEBench's files are in its `pdebench`.
        path: Another file of the same layout, instead.
        batch_size: Samples a batch.
        every_point: Keep every so many-th point along each axis; must divide the grid.
        fraction: Part of the pool that is trained on, one over a whole number; "1/180" is understood.
        val_every: The last of every so many samples of the pool is held out for validation.
        shuffle_seed: Seed of the order of the training samples.
        memory_gb: The samples in use are read once and kept if they take no more memory than this; otherwise each
            batch is read from the file. Each process of a distributed run keeps its own.
        num_workers: Processes that read batches from the file; samples kept in memory need none.

    Raises:
        ValueError: One of them is out of range.
    """

    data_dir: str | Path
    path: str | Path | None
    batch_size: int
    every_point: int = 1
    fraction: float | str = 1
    val_every: int = 10
    shuffle_seed: int = 0
    memory_gb: float = 4.0
    num_workers: int = 2

    def __post_init__(self) -> None:
        Range(1).check("data.every_point", self.every_point)
        Range(2).check("data.val_every", self.val_every)  # 1 leaves nothing to train on
        if not isinstance(self.memory_gb, int | float):
            raise ValueError(f"data.memory_gb must be a number, got {self.memory_gb!r}")
        sample_step(self.fraction)

    @property
    def step(self) -> int:
        """Every step-th sample of the pool is trained on."""
        return sample_step(self.fraction)


def _remedy(name: str, generate: str | None, options: FileOptions) -> str:
    """Say how to come by a file, for the end of every message about one that is missing or damaged."""
    folder = options.data_dir
    text = "" if options.path is None else "Correct data.path, or leave it out: "
    text += f"`python -m recipes.data.download {name} --data-dir {folder}` fetches PDEBench's file"
    text += f" ({FILES[name].size / 1e9:.1f} GB)"
    if generate is not None:
        text += f", `python -m recipes.generate {generate} paths.data_dir={folder}` makes one like it"
    return text


class _Samples(Dataset[Pair]):
    """Pairs made from samples of a file when they are asked for.

    Args:
        reader: The file.
        indices: The samples.
        select: Which part of each dataset's samples is used.
        pair: Makes the pair from these parts, float32, in the order of `select`. It must be a function that can be
            pickled: processes that load batches are handed the samples.
    """

    def __init__(
        self,
        reader: SampleReader,
        indices: Sequence[int],
        select: dict[str, tuple[slice, ...]],
        pair: Callable[[list[np.ndarray]], Pair],
    ) -> None:
        self.reader = reader
        self.indices = indices
        self.select = select
        self.pair = pair

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Pair:
        index = self.indices[position]
        return self.pair([self.reader.read(key, index, select) for key, select in self.select.items()])


def _darcy_pair(fields: list[np.ndarray]) -> Pair:
    """Return coefficient and solution, both (1, X, Y), from arrays (X, Y) and (1, X, Y)."""
    nu, u = fields
    return torch.from_numpy(nu)[None], torch.from_numpy(u)


def _flow_pair(fields: list[np.ndarray], history: int) -> Pair:
    """Return history (T_in, C, *space) and future (T_out, C, *space) from an array (T, *space) a channel."""
    frames = torch.from_numpy(np.stack(fields, axis=1))
    return frames[:history], frames[history:]


class _PDEBenchData(SplitData):
    """A file in one of PDEBench's layouts, thinned and split.

    The shapes in the file are read once, when they are first asked for, and checked against the options. Samples
    are read when training sets up: all of them where they fit in memory, else each when its batch comes.

    Args:
        name: The published file, one of `FILES`.
        generate: Arguments for `recipes.generate` to make a file like it, if there is such a generator.
        dimensions: Of space: the last axes of each dataset.
        select: Which part of each dataset's samples is used.
        pair: Makes a pair of these parts.
        options: The arguments that `PDEBenchDarcy` and `PDEBenchFlow` share.
    """

    def __init__(
        self,
        name: str,
        generate: str | None,
        dimensions: int,
        select: dict[str, tuple[slice, ...]],
        pair: Callable[[list[np.ndarray]], Pair],
        options: FileOptions,
    ) -> None:
        super().__init__(options.batch_size, options.shuffle_seed, options.num_workers)
        path = options.path or Path(options.data_dir) / FOLDER / FILES[name].file_name
        self.reader = SampleReader(Path(path), tuple(select), _remedy(name, generate, options))
        self.dimensions = dimensions
        self.select = select
        self.pair = pair
        self.options = options

    @abstractmethod
    def _check_layout(self, shapes: Shapes) -> None:
        """Refuse datasets, given by their shapes, that are of another layout or too small for the options."""

    @cached_property
    def _shapes(self) -> Shapes:
        """Shapes of the datasets, once they are known to be right."""
        shapes = self.reader.shapes()
        self._check_layout(shapes)
        every = self.options.every_point
        for side in self._space(shapes):
            if side % every:
                raise RecipeError(f"data.every_point={every} does not divide a grid of {side} points")
        return shapes

    def _space(self, shapes: Shapes) -> tuple[int, ...]:
        """Points along each axis of space in the file."""
        return next(iter(shapes.values()))[-self.dimensions :]

    @property
    def grid(self) -> tuple[int, ...]:
        """Points along each axis of space that are used."""
        return tuple(side // self.options.every_point for side in self._space(self._shapes))

    @property
    def made_by(self) -> dict[str, Any]:
        """What the file says of how it was made, which a study notes."""
        return self.reader.made_by()

    def _split(self) -> dict[str, list[int]]:
        """Which samples of the file are for what; see `split_samples`."""
        total = next(iter(self._shapes.values()))[0]
        return split_samples(total, self.options.step, self.options.val_every)

    def _sample_bytes(self) -> int:
        """Bytes of one sample as it is used, float32 and thinned."""
        numbers = 0
        for key, shape in self._shapes.items():
            kept = [len(range(size)[part]) for part, size in zip(self.select[key], shape[1:], strict=True)]
            numbers += math.prod(kept)
        return 4 * numbers

    def prepare_data(self) -> None:
        """Check the file and that the options fit it, before any time is spent.

        Raises:
            RecipeError: The file is missing, damaged or of another layout, or the options do not fit it.
        """
        self._split()

    def make_splits(self) -> dict[str, Dataset[Any]]:
        """Open the splits; read them where they fit in `memory_gb`."""
        splits = self._split()
        needed = self._sample_bytes() * sum(map(len, splits.values()))
        samples = {
            split: _Samples(self.reader, indices, self.select, self.pair) for split, indices in splits.items()
        }
        if needed <= self.options.memory_gb * 1e9:
            self.num_workers = 0
            return {split: in_memory(own, f"Reading {split} samples") for split, own in samples.items()}
        return dict(samples)


class PDEBenchDarcy(_PDEBenchData):
    """Darcy flow: from the coefficient nu to the solution u, as they are in the file.

    Batches are (nu, u), both float32 (B, 1, X, Y).

    Args:
        data_dir: PDEBench's file is `<data_dir>/pdebench/2D_DarcyFlow_beta<beta>_Train.hdf5`.
        beta: The constant source: 0.01, 0.1, 1, 10 or 100.
        path: Another file of the same layout, instead: `nu` (N, X, Y) and `tensor` (N, 1, X, Y).
        batch_size: Samples a batch.
        **options: The other arguments that `FileOptions` lists, such as `every_point` and `fraction`.

    Raises:
        ValueError: An argument is out of range. What depends on the file is checked by `prepare_data`.
    """

    kind = "fields"

    def __init__(
        self,
        data_dir: str | Path,
        beta: float = 1.0,
        path: str | Path | None = None,
        *,
        batch_size: int = 50,
        **options: Any,
    ) -> None:
        if beta not in BETAS:
            raise ValueError(f"data.beta must be one of {', '.join(map(str, BETAS))}, got {beta}")
        file = FileOptions(data_dir, path, batch_size, **options)
        points = (slice(None, None, file.every_point),) * 2
        select = {"nu": points, "tensor": (slice(None), *points)}
        super().__init__(f"darcy_beta{float(beta)}", f"darcy beta={float(beta)}", 2, select, _darcy_pair, file)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input, (channels, height, width)."""
        return (1, *self.grid)

    def _check_layout(self, shapes: Shapes) -> None:
        nu, u = shapes["nu"], shapes["tensor"]
        if len(nu) != 3 or u != (nu[0], 1, *nu[1:]):
            raise RecipeError(
                f"{self.reader.path}: nu must have shape (N, X, Y) and tensor (N, 1, X, Y), got {nu} and {u}"
            )


class PDEBenchFlow(_PDEBenchData):
    """Compressible Navier-Stokes: the frames that follow `history` frames, as they are in the file.

    Batches are (history, future), float32 (B, history, C, *space) and (B, rollout_to - history, C, *space). The
    channels are density, pressure, Vx and, in two dimensions, Vy.

    Args:
        data_dir: PDEBench's file is `<data_dir>/pdebench/1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5` or
            `<data_dir>/pdebench/2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5`.
        dimensions: Of space, 1 or 2.
        path: Another file of the same layout, instead: `density`, `pressure`, `Vx`[, `Vy`], each (N, T, X[, Y]).
        every_frame: Keep every so many-th frame, from the first on.
        history: Frames that are given, after thinning.
        rollout_to: Frames in all, given and to be predicted, after thinning.
        batch_size: Samples a batch.
        **options: The other arguments that `FileOptions` lists, such as `every_point` and `fraction`.

    Raises:
        ValueError: An argument is out of range. What depends on the file is checked by `prepare_data`.
    """

    kind = "trajectories"

    def __init__(
        self,
        data_dir: str | Path,
        dimensions: int = 1,
        path: str | Path | None = None,
        *,
        every_frame: int = 1,
        history: int = 10,
        rollout_to: int = 21,
        batch_size: int = 20,
        **options: Any,
    ) -> None:
        if dimensions not in CHANNELS:
            raise ValueError(f"data.dimensions must be 1 or 2, got {dimensions}")
        for name, number in (("every_frame", every_frame), ("history", history), ("rollout_to", rollout_to)):
            Range(1).check(f"data.{name}", number)
        if history >= rollout_to:
            raise ValueError(
                f"data.history={history} must be below data.rollout_to={rollout_to}: the frames between them are "
                "predicted"
            )
        file = FileOptions(data_dir, path, batch_size, **options)
        frames = slice(0, (rollout_to - 1) * every_frame + 1, every_frame)
        points = (slice(None, None, file.every_point),) * dimensions
        select = dict.fromkeys(CHANNELS[dimensions], (frames, *points))
        generate = "cfd1d" if dimensions == 1 else None
        pair = partial(_flow_pair, history=history)
        super().__init__(f"cfd{dimensions}d", generate, dimensions, select, pair, file)
        self.channels = len(select)
        self.every_frame = every_frame
        self.history = history
        self.rollout_to = rollout_to

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one frame, (channels, *space)."""
        return (self.channels, *self.grid)

    def _check_layout(self, shapes: Shapes) -> None:
        first = shapes["density"]
        if len(first) != 2 + self.dimensions or any(shape != first for shape in shapes.values()):
            axes = ", ".join(("N", "T", "X", "Y")[: 2 + self.dimensions])
            found = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
            raise RecipeError(f"{self.reader.path}: the datasets must have one shape ({axes}), got {found}")
        frames = math.ceil(first[1] / self.every_frame)
        if frames < self.rollout_to:
            raise RecipeError(
                f"data.rollout_to={self.rollout_to} exceeds the {frames} frames that "
                f"data.every_frame={self.every_frame} leaves of {first[1]} in {self.reader.path}"
            )
