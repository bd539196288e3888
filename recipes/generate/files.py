"""A data file that is being made: HDF5 of its final size, and a record of which samples are in it already.

The file `<name>.part` is a whole HDF5 file with every data set laid out in one piece, so that samples are written
in place without touching HDF5's own structures. Behind it, where HDF5 does not look, stands a record: one byte a
sample, 1 once the sample is on disk, and a magic word. A run that is killed at any moment leaves a file that the
next run goes on with. At the end the record is cut off and the file gets its name.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from recipes.data.cache import Arrays
from recipes.errors import RecipeError
from recipes.generate.cfd1d import CFD1DSpec
from recipes.generate.darcy import DarcySpec

__all__ = ["PartFile", "Settings", "Spec"]

Spec = DarcySpec | CFD1DSpec
"""What a file holds, and how its samples are made."""

Settings = Mapping[str, str | int | float]

_MAGIC = b"FARMSTB1"


class PartFile:
    """The unfinished file of one run; a context manager that holds it open and locked.

    Args:
        target: The finished file's path; its folder is created.
        spec: Gives the data sets.
        samples: How many samples the file holds.
        settings: What the samples depend on; kept as attributes of the file.

    Raises:
        RecipeError: The folder can't be written or has too little space, another run is writing the file, or an
            unfinished file is there that holds other data.
    """

    def __init__(self, target: Path, spec: Spec, samples: int, settings: Settings) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self.samples = samples
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self._check_space(spec, present=0)
                self._create(spec, settings)
            self._file = self.path.open("r+b", buffering=0)
        except OSError as error:
            raise RecipeError(f"{self.path} can't be written ({error}); choose another place") from error
        try:
            self._lock()
            self._offsets = self._check(settings)
            self._end, self._done = self._read_record()
            blocks = os.fstat(self._file.fileno()).st_blocks
            self._check_space(spec, present=512 * blocks)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def missing(self) -> list[int]:
        """Numbers of the samples that are not in the file yet."""
        return [int(index) for index in np.flatnonzero(self._done == 0)]

    def write(self, start: int, arrays: Arrays) -> None:
        """Put consecutive samples in their place.

        Args:
            start: Number of the first.
            arrays: Samples of every data set, first axis by sample.

        Raises:
            RecipeError: They are not finite, or can't be written, for want of space say.
        """
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise RecipeError(
                    f"samples from {start} on have numbers in {name!r} that are not finite: take less extreme "
                    "settings"
                )
        count = len(next(iter(arrays.values())))
        file = self._file.fileno()
        try:
            for name, values in arrays.items():
                data = np.ascontiguousarray(values, dtype="<f4")
                offset = self._offsets[name] + start * data[0].nbytes
                _write_at(file, offset, data.tobytes())
            os.fsync(file)  # the record must not reach the disk before the samples that it says are there
            _write_at(file, self._end + start, b"\1" * count)
        except OSError as error:
            raise RecipeError(
                f"writing {self.path} failed ({error}). {self.samples - len(self.missing)} of {self.samples} "
                "samples are in it: make room and run the same command again to go on from there"
            ) from error
        self._done[start : start + count] = 1

    def finish(self) -> None:
        """Cut the record off and give the file its name.

        Raises:
            ValueError: Samples are missing.
        """
        if self.missing:
            raise ValueError(f"{len(self.missing)} samples are missing in {self.path}")
        self._file.truncate(self._end)
        os.fsync(self._file.fileno())
        self.path.replace(self.target)

    def _create(self, spec: Spec, settings: Settings) -> None:
        """Lay the file out, with an empty record, under a third name: a file that has its own name is whole.

        Of two runs that begin at once the second goes on with the file of the first, and is refused by its lock.
        """
        draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.new")
        with h5py.File(draft, "w") as file:
            file.attrs.update(settings)
            for name, values in spec.coordinates.items():
                file.create_dataset(name, data=values.astype("<f4"))
            for name, shape in spec.fields.items():
                _lay_out(file, name, (self.samples, *shape))
        with draft.open("ab") as record:
            record.write(bytes(self.samples) + _MAGIC)
            record.flush()
            os.fsync(record.fileno())
        try:
            os.link(draft, self.path)  # unlike a renaming it replaces nothing
        except FileExistsError:
            pass
        finally:
            draft.unlink()

    def _lock(self) -> None:
        """Keep other runs out; the system frees the lock when the file is closed, by a kill too."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"another run is writing {self.path}; wait for it, or stop it") from error
        except OSError as error:
            raise RecipeError(
                f"{self.path} is on a file system that has no locks ({error}), and two runs could mix samples: "
                "set file=... on another"
            ) from error

    def _check(self, settings: Settings) -> dict[str, int]:
        """Compare the settings with those in the file, and return where each data set begins in it, in bytes."""
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                found = {name: _plain(value) for name, value in file.attrs.items()}
                offsets = {name: data.id.get_offset() for name, data in file.items()}
        except OSError as error:
            raise RecipeError(
                f"{self.path} is not an unfinished file of this generator ({error}); delete it to start anew"
            ) from error
        _check_settings(self.path, found, settings)
        return offsets

    def _read_record(self) -> tuple[int, np.ndarray]:
        """Return where the HDF5 part ends and the record begins, and the record, one byte a sample.

        A file that ends where its HDF5 part does lost the record in `finish`, and was stopped before it got its
        name: it is complete.
        """
        file = self._file.fileno()
        # Bytes 40 to 47 of the superblock, version 0: where HDF5's own part of the file ends.
        end = int.from_bytes(os.pread(file, 8, 40), "little")
        record = os.pread(file, self.samples + len(_MAGIC) + 1, end)
        if not record:
            return end, np.ones(self.samples, dtype=np.uint8)
        done, magic = record[: self.samples], record[self.samples :]
        if magic != _MAGIC:
            raise RecipeError(
                f"{self.path} is damaged: its record of finished samples is not whole; delete it to start anew"
            )
        return end, np.frombuffer(done, dtype=np.uint8).copy()

    def _check_space(self, spec: Spec, present: int) -> None:
        """Refuse a disk without room for the samples, in float32.

        `present` bytes of the file are on the disk already; a file with holes has fewer than its size.
        """
        numbers = sum(math.prod(shape) for shape in spec.fields.values())
        needed = 4 * self.samples * numbers - present
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise RecipeError(
                f"{self.target} takes another {needed / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left; "
                "make room, choose another place, or make fewer samples"
            )


def _write_at(file: int, offset: int, data: bytes) -> None:
    """Write all bytes at a place of an open file."""
    rest = memoryview(data)
    while rest:  # the system may take less of it at a time
        written = os.pwrite(file, rest, offset)
        rest = rest[written:]
        offset += written


def _check_settings(path: Path, found: Settings, settings: Settings) -> None:
    """Refuse to go on with a file of other settings, and name those that differ."""
    names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
    if not names:
        return
    there = ", ".join(f"{name}={found.get(name)}" for name in names)
    here = ", ".join(f"{name}={settings.get(name)}" for name in names)
    raise RecipeError(
        f"{path} was begun with other settings: {there}, not {here}. Repeat those to go on with it, "
        "choose another file, or delete it to start anew"
    )


def _plain(value: Any) -> Any:
    """Return an attribute of an HDF5 file as a number or text of Python: h5py returns numbers as NumPy scalars."""
    return value.item() if isinstance(value, np.generic) else value


def _lay_out(file: h5py.File, name: str, shape: tuple[int, ...]) -> None:
    """Make a float32 data set that has its place in the file, in one piece, before anything is written to it.

    Neither fill values nor times are written: the file of a run is bitwise the same whenever it was begun.
    """
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), layout)
