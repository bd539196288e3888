"""The results of a cell: one CSV, a row for every finished run, whole at any moment.

The file is the only memory of a study. Numbers are written with all their digits, so that what is read is bitwise
what was measured, and rows are ordered by run, not by time, so that two studies of the same settings write the
same rows.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from farms_tb.atomic_write import atomic_path
from recipes.errors import RecipeError

__all__ = [
    "METRICS",
    "RESULTS_FILE",
    "SHARES",
    "Job",
    "Phase",
    "Record",
    "Score",
    "read_file",
    "read_records",
    "write_records",
    "write_rows",
]

RESULTS_FILE = "results.csv"

METRICS = {
    "accuracy": "1 - accuracy",
    "macro_f1": "1 - macro F1",
    "nrmse": "nRMSE",
    "relative_l2": "relative L2 error",
    "loss": "cross-entropy in nats",
}
"""The scores a study can compare, and their errors. A network that has learnt nothing has the error of blind
guessing, 1 - 1 / classes or ln(classes), or that of predicting zero, 1."""

SHARES = ("accuracy", "macro_f1")
"""Scores between 0 and 1, the larger the better: the error is what is missing to 1."""

Phase = Literal["tune", "final"]

Score = Literal["val", "test", "best_val", "best_test", "lowest_test"]
"""The scores of a record."""


class Job(NamedTuple):
    """One run of a cell; what makes it this run and no other.

    Attributes:
        arm: The arm.
        phase: "tune" for runs that choose the learning rate, "final" for those that are compared.
        seed: Seed of the run.
        lr: Base learning rate.
    """

    arm: str
    phase: Phase
    seed: int
    lr: float


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        experiment: Name of the cell.
        arm: See `Job`, like the next three.
        phase: See `Job`.
        seed: See `Job`.
        lr: See `Job`.
        status: "ok", or "diverged": a loss or score at the end was not finite.
        metric: Name of the score in `val` and `test`, say "accuracy".
        val: Score of the final weights on validation data; NaN where diverged.
        test: Score of the final weights on test data; NaN where diverged.
        val_samples: Number of validation samples.
        test_samples: Number of test samples.
        blind_error: Error of a network that has learnt nothing; see `METRICS`.
        parameters: Number of trainable parameters.
        epochs: Epochs trained.
        steps: Optimizer steps taken.
        seconds: Time of the whole run, with data, validation and test.
        train_seconds: Time of the training loop, without the callback's measurements.
        callback_seconds: Time of the callback's measurements, all together.
        device: Where it ran.
        config: Fingerprint of the arm's settings.
        best_epoch: The epoch, counted from 1, with the best validation score of those that were evaluated. Like
            the next five NaN in results of version 0.1, which did not look.
        best_val: Its validation score.
        best_test: Its test score.
        lowest_test: Test score of the epoch whose test error is the lowest: what the papers report. It chooses on
            test data, and so is too good.
        mean_ratio: Mean learning-rate ratio over the measured layers, each weighted by its entries, then over the
            measurements; 1 without balancing.
        ratio_sd: Standard deviation of the ratios over these layers, weighted likewise; its mean over the
            measurements.
    """

    experiment: str
    arm: str
    phase: Phase
    seed: int
    lr: float
    status: Literal["ok", "diverged"]
    metric: str
    val: float
    test: float
    val_samples: int
    test_samples: int
    blind_error: float
    parameters: int
    epochs: int
    steps: int
    seconds: float
    train_seconds: float
    callback_seconds: float
    device: str
    config: str
    best_epoch: float = math.nan
    best_val: float = math.nan
    best_test: float = math.nan
    lowest_test: float = math.nan
    mean_ratio: float = math.nan
    ratio_sd: float = math.nan

    @property
    def job(self) -> Job:
        """The run that this is the result of."""
        return Job(self.arm, self.phase, self.seed, self.lr)

    @property
    def diverged(self) -> bool:
        """Whether a loss or a score at the end was not finite."""
        return self.status == "diverged"

    def error(self, which: Score) -> float:
        """Return the error, smaller is better: 1 - score for one of `SHARES`, else the score itself.

        A run that diverged has learnt nothing at its end, and counts as such. Its best and its lowest scores are
        those of the epochs before, where it has some.
        """
        score = float(getattr(self, which))
        if self.diverged and not math.isfinite(score):
            return self.blind_error
        if self.metric in SHARES:
            return 1.0 - score
        return score

    def log_error(self, which: Score) -> float:
        """Return the log of the error.

        To a share of n samples 1/(2n) is added: half a sample, so that no error at all has a log too.

        Raises:
            RecipeError: The error is 0 where it has no smallest value, so that no ratio to it exists.
        """
        error = self.error(which)
        if self.metric in SHARES:
            samples = self.val_samples if which in ("val", "best_val") else self.test_samples
            return math.log(error + 0.5 / samples)
        if error == 0.0:
            raise RecipeError(
                f"{self.experiment} {self.job}: {which} is an error of 0, to which no other has a ratio; "
                "choose a task that can't be solved exactly"
            )
        return math.log(error)


def read_records(folder: Path) -> dict[Job, Record]:
    """Read the finished runs of a cell from its folder; none where there is no file yet.

    Raises:
        RecipeError: The file is not one of `write_records`, or holds runs of several cells.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return {}
    records = read_file(path)
    cells = sorted({record.experiment for record in records})
    if len(cells) > 1:
        raise RecipeError(
            f"{path} has runs of {len(cells)} cells, {', '.join(cells)}; each belongs into a folder of its name"
        )
    return {record.job: record for record in records}


def read_file(path: Path) -> list[Record]:
    """Read a file of finished runs, which may be those of several cells.

    Raises:
        RecipeError: The file is not one of `write_records`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_read_record(row) for row in csv.DictReader(file, strict=True)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RecipeError(
            f"{path} is not a study's results file ({error}); move it away, or choose another study.folder"
        ) from error


_TYPES = get_type_hints(Record)
_CONVERT: dict[Any, Callable[[str], Any]] = {int: int, float: float}


def _read_record(row: dict[str, str]) -> Record:
    """Turn the cells of a row into numbers where the record has numbers."""
    values: dict[str, Any] = {}
    for field in fields(Record):
        if field.name not in row and field.default is not MISSING:
            continue
        convert = _CONVERT.get(_TYPES[field.name], str)
        values[field.name] = convert(row[field.name])
    record = Record(**values)
    if record.status not in get_args(_TYPES["status"]) or record.metric not in METRICS:
        raise ValueError(f"{record.job} has status {record.status!r} and metric {record.metric!r}")
    if record.status == "ok" and not all(map(math.isfinite, (record.val, record.test))):
        raise ValueError(f"{record.job} has the status ok and scores that are not finite")
    return record


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write all finished runs of a cell to its folder, in an order that does not depend on who finished first."""
    ordered = sorted(records, key=lambda record: (record.experiment, record.phase != "tune", *record.job))
    write_rows(folder / RESULTS_FILE, [asdict(record) for record in ordered], [f.name for f in fields(Record)])


def write_rows(path: Path, rows: Iterable[dict[str, Any]], columns: list[str]) -> None:
    """Write a CSV in one step; NaN becomes "nan", None an empty cell."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
