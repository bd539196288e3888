"""A CSV logger that writes straight into the run folder and keeps its rows when a run resumes."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["METRICS_FILE", "RunFolderCSVLogger", "RunFolderWandbLogger", "forget_rows_after", "read_rows"]

METRICS_FILE = ExperimentWriter.NAME_METRICS_FILE


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file without their empty cells; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: cell for key, cell in row.items() if cell not in ("", None)} for row in csv.DictReader(file)]


def forget_rows_after(path: Path, step: int) -> None:
    """Drop the rows logged after `step`: a resumed run logs them again."""
    rows = [row for row in read_rows(path) if float(row["step"]) <= step]
    names = sorted(set().union(*rows))
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


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
    def experiment(self) -> ExperimentWriter:
        """The writer, made on first use with the earlier rows of the file."""
        if self._experiment is None:
            earlier = read_rows(Path(self.save_dir) / METRICS_FILE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
                self._experiment = ExperimentWriter(log_dir=self.save_dir)
            self._experiment.metrics = earlier
            self._experiment.save()
        return cast(ExperimentWriter, self._experiment)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows gathered since the last time."""
        self.experiment.save()


class RunFolderWandbLogger(WandbLogger):
    """Lightning's WandbLogger, quiet, with the run's files under `save_dir`.

    Args:
        save_dir: The run folder.
        offline: Write to disk only; `wandb sync` uploads later.
        options: More keyword arguments of `WandbLogger` and `wandb.init`.
    """

    def __init__(self, save_dir: str | Path, offline: bool = True, **options: Any) -> None:
        super().__init__(save_dir=save_dir, offline=offline, **options)
        import wandb

        self._wandb_init.setdefault("settings", wandb.Settings(console="off", silent=offline))
        self._wandb_init.pop("anonymous", None)  # W&B gave the option up and warns of it

    def close(self) -> None:
        """Finish the run and W&B's helper process; an offline run's file is complete only after that."""
        import wandb

        wandb.finish()
        wandb.teardown()
