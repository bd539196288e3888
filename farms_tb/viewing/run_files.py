"""Find the files of one run in a folder, and refuse to choose between several runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from farms_tb.viewing.metrics_csv import METRICS_FILE, has_measurements

__all__ = ["RunFiles", "SeveralRunsError", "find_run"]

_MOST_LISTED = 10


class SeveralRunsError(ValueError):
    """A folder holds several runs, and which one is meant must be said."""


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one run lie.

    Attributes:
        folder: the folder that was asked for.
        root: the run's own folder, the same or one below (`version_0`).
        metrics: its `metrics.csv` with measurements of the callback; None where there is none.
        checkpoints: its checkpoints (`*.ckpt`), the newest first.
    """

    folder: Path
    root: Path
    metrics: Path | None
    checkpoints: tuple[Path, ...]


def find_run(folder: Path) -> RunFiles:
    """Find the one run in a folder, in itself or further down.

    A `metrics.csv` with `farms/` columns in the folder itself makes the folder a run, whatever lies below.

    Raises:
        FileNotFoundError: there is no such folder.
        SeveralRunsError: several runs lie in it; the message lists them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    metrics = [path for path in _newest_first(folder.rglob(METRICS_FILE)) if has_measurements(path)]
    if folder / METRICS_FILE in metrics:
        metrics = [folder / METRICS_FILE]
    _refuse_several(folder, [path.parent for path in metrics])
    checkpoints = _newest_first(folder.rglob("*.ckpt"))
    if not metrics:
        _refuse_several(folder, [_run_of(path) for path in checkpoints])
        return RunFiles(folder, folder, None, tuple(checkpoints))
    root = metrics[0].parent
    checkpoints = [path for path in checkpoints if _may_belong(path, root)]
    own = [path for path in checkpoints if path.is_relative_to(root)]
    # Some loggers keep checkpoints apart from the metrics: these are taken if only one run can be meant.
    elsewhere = checkpoints if len({_run_of(path) for path in checkpoints}) == 1 else []
    return RunFiles(folder, root, metrics[0], tuple(own or elsewhere))


def _refuse_several(folder: Path, runs: Iterable[Path]) -> None:
    found = list(dict.fromkeys(runs))
    if len(found) < 2:
        return
    lines = [f"\n  {run}  (written {_written(run)})" for run in found[:_MOST_LISTED]]
    more = f"\n  and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    raise SeveralRunsError(f"{folder} holds several runs, pass the folder of one of them:" + "".join(lines) + more)


def _written(run: Path) -> str:
    newest = max((_modified(path) or 0.0 for path in (run, *run.iterdir())), default=0.0)
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run: Lightning keeps checkpoints in a folder `checkpoints` of it."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _may_belong(checkpoint: Path, root: Path) -> bool:
    """Tell whether a checkpoint is not another run's, which has metrics of its own."""
    run = _run_of(checkpoint)
    return run == root or not (run / METRICS_FILE).exists()


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by time of writing; those that are deleted meanwhile, as old checkpoints are, are left out."""
    times = {path: _modified(path) for path in paths if path.is_file()}
    found = [(modified, path) for path, modified in times.items() if modified is not None]
    return [path for _, path in sorted(found, key=lambda item: item[0], reverse=True)]


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
