"""Loggers that write straight into the run folder, and go on there when a run resumes.

Lightning's own loggers make a folder for each version of a run, and begin anew when it resumes. Here a run has one
folder and one `metrics.csv`, in which a resumed run continues behind the last row of its checkpoint.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from farms_tb.atomic_write import atomic_path

__all__ = ["METRICS_FILE", "RunFolderCSVLogger", "RunFolderWandbLogger", "forget_rows_after", "read_rows"]

METRICS_FILE = "metrics.csv"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a metrics file without their empty cells; none when there is no file.

    A last line without an end was cut by a kill or a full disk, and its last number with it: it is left out, and
    so is a line with more or fewer cells than there are columns.

    Args:
        path: The metrics file.

    Returns:
        The cells of each row as text, by column.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    whole_lines = text[: text.rfind("\n") + 1]
    rows = []
    for cells in csv.DictReader(io.StringIO(whole_lines, newline="")):
        if None in cells or None in cells.values():
            continue
        row = {column: cell for column, cell in cells.items() if cell != ""}
        if "step" in row:
            rows.append(row)
    return rows


def forget_rows_after(path: Path, step: int) -> None:
    """Drop the rows that a run resumed after `step` optimizer steps logs again.

    The rows of the steps done are numbered 0 to `step` - 1. A row numbered `step` is the measurement before the
    next epoch, or that of the final weights, which the resumed run makes itself.

    Args:
        path: The metrics file.
        step: Optimizer steps of the checkpoint.
    """
    _write_rows(path, [row for row in read_rows(path) if float(row["step"]) < step])


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Write a metrics file from its first row on.

    Args:
        path: The file; a reader sees the old one or the whole new one.
        rows: The rows, each with the columns that it has.

    Returns:
        The columns of all rows, by name.
    """
    rows = list(rows)
    columns = sorted(set().union(*rows))
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    return columns


class _Rows:
    """The rows of a metrics file: appended, or all written again where a new column comes.

    Args:
        path: The file; rows that are in it stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = _write_rows(path, read_rows(path)) if path.exists() else []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; it reaches the disk with `save`."""
        row: Row = {}
        for name, value in metrics.items():
            row[name] = value.item() if isinstance(value, Tensor) else value
        row["step"] = len(self._new) if step is None else step
        self._new.append(row)

    def save(self) -> None:
        """Write the rows gathered since the last time."""
        if not self._new:
            return
        new_columns = set().union(*self._new) - set(self._columns)
        if new_columns:
            self._columns = _write_rows(self._path, [*read_rows(self._path), *self._new])
        else:
            self._append()
        self._new = []

    def _append(self) -> None:
        """Add the new rows to the file, all or none: a disk that is full may take the half of one."""
        size = self._path.stat().st_size
        try:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, fieldnames=self._columns).writerows(self._new)
        except OSError:
            os.truncate(self._path, size)
            raise


class RunFolderCSVLogger(CSVLogger):
    """Lightning's CSVLogger, writing `metrics.csv` into `save_dir` itself.

    Lightning's own deletes an earlier file of that name; this one goes on writing it. Settings are not written:
    the run folder's `config.yaml` has them.

    Args:
        save_dir: The run folder.
        flush_logs_every_n_steps: How often rows reach the disk.
    """

    def __init__(self, save_dir: str | Path, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the rows, made on first use."""
        if self._experiment is None:
            self._experiment = cast(Any, _Rows(Path(self.save_dir) / METRICS_FILE))
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows gathered since the last time."""
        self.experiment.save()


class RunFolderWandbLogger(WandbLogger):
    """Lightning's WandbLogger, quiet, with the run's files under `save_dir`.

    A resumed run goes on under the id of the run that is in the folder. Offline, W&B writes another folder of that
    id, and `wandb sync --append` joins the two; online it goes on with the run itself.

    Args:
        save_dir: The run folder.
        offline: Write to disk only; `wandb sync` uploads later.
        ckpt_path: The checkpoint that the run resumes from; None for a new run.
        options: More keyword arguments of `WandbLogger` and `wandb.init`.
    """

    def __init__(
        self, save_dir: str | Path, offline: bool = True, ckpt_path: str | Path | None = None, **options: Any
    ) -> None:
        import wandb  # first: where it is missing, Lightning's error does not name the package

        earlier = _run_ids(Path(save_dir))
        if ckpt_path is not None and earlier:
            options.setdefault("id", earlier[-1])
            if not offline:
                options.setdefault("resume", "allow")
        super().__init__(save_dir=save_dir, offline=offline, **options)
        self._wandb_init.setdefault("settings", wandb.Settings(console="off", silent=offline))
        self._wandb_init.pop("anonymous", None)  # W&B gave the option up and warns of it

    def close(self) -> None:
        """Finish the run and W&B's helper process; an offline run's file is complete only after that."""
        import wandb

        wandb.finish()
        wandb.teardown()


def _run_ids(folder: Path) -> list[str]:
    """Return the ids of the W&B runs in a run folder, the oldest first."""
    names = [path.name for path in folder.glob("wandb/*run-*-*") if path.is_dir()]
    names.sort(key=lambda name: name.partition("run-")[2])  # "offline-run-<time>-<id>": by time
    return [name.rpartition("-")[2] for name in names]
