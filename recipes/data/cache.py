"""Arrays cached in one file that is either whole and the right one, or made again.

A cache that is trusted by its name alone goes stale unnoticed when the code that makes it changes, or when a
disk loses a part of it. So a file holds a description of what it is, and is read to its checksums.
"""

from __future__ import annotations

import json
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_tb.atomic_write import atomic_path

__all__ = ["Arrays", "StaleCacheError", "load_or_make", "read_arrays", "write_arrays"]

Arrays = dict[str, np.ndarray]

_log = logging.getLogger(__name__)
_DESCRIPTION = "description"
_NAMES = "_arrays"  # in the description: a damaged directory of the zip container can lack an array
# What numpy and zipfile raise for a damaged file: RuntimeError where a flag says encrypted, its subclass
# NotImplementedError for an unknown compression, MemoryError for a length that no memory holds.
_UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, MemoryError, OverflowError, struct.error),
    TypeError,  # an array in place of an archive, which cannot be closed as one
)


class StaleCacheError(ValueError):
    """A cache file that is cut short, damaged, or describes other data."""


def load_or_make(path: Path, description: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Read the arrays in `path`, or make and keep them.

    Args:
        path: An `.npz` file; its folder is created.
        description: What the arrays are (plain JSON values). A file with another description is not used.
        make: Called without arguments when there is no usable file.

    Returns:
        The arrays by name.
    """
    try:
        return read_arrays(path, description)
    except FileNotFoundError:
        pass
    except StaleCacheError as error:
        _log.warning("%s; making the data again", error)
    arrays = make()
    write_arrays(path, description, arrays)
    return arrays


def read_arrays(path: Path, description: Mapping[str, Any]) -> Arrays:
    """Read every array of `path`; the zip container's checksums are verified on the way.

    Args:
        path: An `.npz` file of `write_arrays`.
        description: What the arrays must be.

    Returns:
        The arrays by name.

    Raises:
        FileNotFoundError: There is no such file.
        StaleCacheError: The file is cut short or damaged, or its description differs.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found = json.loads(str(arrays.pop(_DESCRIPTION)))
    except _UNREADABLE as error:
        raise StaleCacheError(f"the cached data in {path} is cut short or damaged ({error})") from error
    names = None  # files of earlier releases do not list their arrays
    if isinstance(found, dict):
        names = found.pop(_NAMES, None)
    if names is not None and names != sorted(arrays):
        raise StaleCacheError(f"the cached data in {path} is damaged: it lacks some of {', '.join(names)}")
    if found != dict(description):
        raise StaleCacheError(f"the cached data in {path} describes other data: {found}")
    return arrays


def write_arrays(path: Path, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Write the arrays to `path` in one step.

    A reader sees the old file or the whole new one, also when writing stops half way or two runs write at once.

    Args:
        path: An `.npz` file; its folder is created.
        description: What the arrays are (plain JSON values).
        arrays: The arrays by name.
    """
    text = json.dumps({**description, _NAMES: sorted(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez(file, **{_DESCRIPTION: np.array(text)}, **arrays)  # type: ignore[arg-type]
