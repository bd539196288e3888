"""Read several runs to compare them, each under a name of its own.

All are read before anything is drawn, so that one that cannot be read leaves no half of a comparison.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from farms_tb.viewing.names import shortened
from farms_tb.viewing.run_files import find_run
from farms_tb.viewing.run_folder import RunFolder, read_run_folder
from farms_tb.weights.names import first_few

__all__ = ["in_every_run", "in_some_runs", "listed", "read_runs", "unique_names"]

_Value = TypeVar("_Value")


def read_runs(
    paths: Sequence[str | os.PathLike[str]], *, null: bool = False, key: str | None = None
) -> dict[str, RunFolder]:
    """Read several runs.

    Args:
        paths: their folders, or files of weights, as `read_run_folder` takes them; each once.
        null: also measure each layer's entries in random order, in all of them.
        key: where the weights lie in files that hold several things; None to find them.

    Returns:
        The runs in the order given, by the shortest names that tell them apart.

    Raises:
        ValueError: a run is given twice, or one cannot be read: the message names it. What is not there is found
            before any weights are measured.
    """
    found = [Path(path) for path in paths]
    names = unique_names(found)
    for path in found:
        if not path.is_file():
            with _naming(path):
                find_run(path)
    runs = {}
    for name, path in zip(names, found, strict=True):
        with _naming(path):
            runs[name] = read_run_folder(path, null=null, key=key)
    return runs


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart, without the last parts that all have in common.

    Raises:
        ValueError: two paths are of the same file or folder.

    Example:
        >>> unique_names([Path("/logs/sgd/1/version_0"), Path("/logs/adam/1/version_0")])
        ['sgd', 'adam']
        >>> unique_names([Path("/logs/a"), Path("/logs/b")])
        ['a', 'b']
    """
    resolved = [path.resolve() for path in paths]
    for path, own in zip(paths, resolved, strict=True):
        if resolved.count(own) > 1:
            raise ValueError(f"{path} is given twice: pass each run once")
    # Links keep their own names, which may say more than what they lead to.
    parts = [path.absolute().parts for path in paths]
    while len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    kept = 1
    while len({own[-kept:] for own in parts}) < len(parts):
        kept += 1
    return ["/".join(own[-kept:]) for own in parts]


def in_every_run(values: Mapping[str, Mapping[str, _Value]]) -> list[str]:
    """Return the names, of layers say, that every run has, in the order of the first run.

    Example:
        >>> in_every_run({"a": {"conv": 1, "fc": 2}, "b": {"fc": 3, "conv": 4, "head": 5}})
        ['conv', 'fc']
    """
    tables = list(values.values())
    if not tables:
        return []
    return [name for name in tables[0] if all(name in table for table in tables)]


def in_some_runs(values: Mapping[str, Mapping[str, _Value]]) -> list[str]:
    """Return the names that some runs have and others lack.

    Example:
        >>> in_some_runs({"a": {"conv": 1, "fc": 2}, "b": {"fc": 3, "head": 5}})
        ['conv', 'head']
    """
    common = set(in_every_run(values))
    every = dict.fromkeys(name for table in values.values() for name in table)
    return [name for name in every if name not in common]


def listed(names: Sequence[str]) -> str:
    """Return names in one line, those beyond the fifth as a number.

    Example:
        >>> listed(["a", "b"]), listed(["layer"] * 7)
        ('a, b', 'layer, layer, layer, layer, layer and 2 more')
    """
    return first_few([shortened(name) for name in names])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise a ValueError that names a run in place of the error for one that cannot be read."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be compared with the others: {error}") from error
