"""Find the files of one run in a folder, and refuse to choose between several runs.

Loggers disagree on where files go: Lightning's CSVLogger makes `version_0/metrics.csv` and
`version_0/checkpoints/*.ckpt`, others keep checkpoints in a tree of their own. A run is told by its `metrics.csv`;
where there is none, by its checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from farms_tb.viewing.metrics_csv import METRICS_FILE, has_measurements
from farms_tb.viewing.saved_state import read_state

__all__ = ["RunFiles", "SeveralRunsError", "find_run"]

_MOST_LISTED = 10
"""Runs that an error lists, the newest first; a folder of a sweep may hold thousands."""

_MOST_COMPARED = 50
"""Checkpoints that are opened for their steps; of a run with more of them the time of writing decides."""


class SeveralRunsError(ValueError):
    """A folder holds several runs, and which one is meant must be said."""


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one run lie.

    Attributes:
        folder: the folder that was asked for.
        root: the run's own folder, the same or one below (`version_0`).
        metrics: its `metrics.csv` with measurements of the callback; None where there is none.
        by_time: its checkpoints (`*.ckpt`) by their times of writing, the newest first.
    """

    folder: Path
    root: Path
    metrics: Path | None
    by_time: tuple[Path, ...]

    @cached_property
    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints, the last of the run first. They are opened for that, see `_last_first`."""
        return tuple(_last_first(self.by_time))


def find_run(folder: Path) -> RunFiles:
    """Find the one run in a folder, in itself or further down.

    A `metrics.csv` with `farms/` columns in the folder itself makes the folder a run, whatever lies below.

    Args:
        folder: the folder.

    Returns:
        Where the run's files lie; neither metrics nor checkpoints in a folder without a run.

    Raises:
        FileNotFoundError: there is no such folder.
        SeveralRunsError: several runs lie in it; the message lists them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    metrics = _find_metrics(folder)
    checkpoints = _newest_first(folder.rglob("*.ckpt"))
    if metrics is None:
        _refuse_several(folder, [_run_of(path) for path in checkpoints])
        return RunFiles(folder, folder, None, tuple(checkpoints))
    root = metrics.parent
    return RunFiles(folder, root, metrics, tuple(_checkpoints_of(root, checkpoints)))


def _find_metrics(folder: Path) -> Path | None:
    """Return the one `metrics.csv` with measurements in a folder; None where there is none.

    Raises:
        SeveralRunsError: there are several, and none in the folder itself.
    """
    found = [path for path in _newest_first(folder.rglob(METRICS_FILE)) if has_measurements(path)]
    own = folder / METRICS_FILE
    if own in found:
        return own
    _refuse_several(folder, [path.parent for path in found])
    return found[0] if found else None


def _checkpoints_of(root: Path, checkpoints: Iterable[Path]) -> list[Path]:
    """Return those of some checkpoints that are of the run in `root`, in the same order.

    Some loggers keep checkpoints apart from the metrics: without any in the run's own folder, those elsewhere are
    taken if only one run can be meant, which is not another one with metrics of its own.
    """
    by_run = {path: _run_of(path) for path in checkpoints}
    possible = [path for path, run in by_run.items() if run == root or not (run / METRICS_FILE).exists()]
    own = [path for path in possible if path.is_relative_to(root)]
    if own:
        return own
    return possible if len({by_run[path] for path in possible}) == 1 else []


def _refuse_several(folder: Path, runs: Iterable[Path]) -> None:
    """Refuse to choose between the runs in a folder; `runs` are their folders, the newest first, maybe repeated.

    Raises:
        SeveralRunsError: there is more than one; the message lists them.
    """
    different = list(dict.fromkeys(runs))
    if len(different) < 2:
        return
    listed = [f"{run}  (written {_written(run)})" for run in different[:_MOST_LISTED]]
    more = len(different) - _MOST_LISTED
    if more > 0:
        listed.append(f"and {more} more")
    heading = f"{folder} holds several runs, pass the folder of one of them:"
    raise SeveralRunsError("\n  ".join([heading, *listed]))


def _written(run: Path) -> str:
    """Return when something was last written in a run's folder, in local time."""
    newest = max(_modified(path) or 0.0 for path in (run, *run.iterdir()))
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run: Lightning keeps checkpoints in a folder `checkpoints` of it."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by time of writing; those that are deleted meanwhile, as old checkpoints are, are left out."""
    times: dict[Path, float] = {}
    for path in paths:
        modified = _modified(path)
        if path.is_file() and modified is not None:
            times[path] = modified
    return sorted(times, key=lambda path: times[path], reverse=True)


def _last_first(checkpoints: Sequence[Path]) -> list[Path]:
    """Sort the checkpoints of one run by their optimizer steps, as far as they say them.

    Times of writing alone are not enough: a run that was copied has those of the copy, in any order. They decide
    where there are very many checkpoints, where one does not say its step, as one that is being written, and
    between equal steps.
    """
    if len(checkpoints) > _MOST_COMPARED:
        return list(checkpoints)
    steps: dict[Path, int] = {}
    for path in checkpoints:
        try:
            step = read_state(path).step
        except (ValueError, OSError):
            step = None
        if step is None:
            return list(checkpoints)
        steps[path] = step
    return sorted(checkpoints, key=steps.__getitem__, reverse=True)


def _modified(path: Path) -> float | None:
    """Return when a file was last written, in seconds; None where it is gone or cannot be looked at."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
