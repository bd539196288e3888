"""What measuring takes of a run's time, and whether the run can afford to measure again.

Timed are each measurement, with all that comes of it (ratios, logging, pictures), and the training between two
times to measure, validation and checkpoints included. The next measurement is affordable where

    spent + next + final <= max_overhead * trained

that is, where measuring stays within its share of training even if the run ended right after it, as the final
weights are measured too. The first measurement is always made. How long others will take is not known before the
second, which is made as soon as the first is paid off.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median_low
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from farms_tb.options import check_number
from farms_tb.warnings import warn_once

__all__ = ["TIMINGS_FILE", "Overhead", "Timing", "read_timings"]

TIMINGS_FILE = "farms_timings.csv"

MeasurementKind = Literal["first", "plain", "histogram", "table"]
"""Measurements of one kind take about equally long."""

_TRAINING = "training"
_OUTLIER = 3.0
_NEIGHBOURS = 31


class Timing(NamedTuple):
    """A row of a file of timings.

    Attributes:
        what: `"training"`, or the kind of a measurement: `"first"`, `"plain"`, `"histogram"`, `"table"`.
        epoch: when it was over: completed epochs.
        step: optimizer steps.
        seconds: how long it took.
    """

    what: str
    epoch: int
    step: int
    seconds: float


_HEADER = ",".join(Timing._fields) + "\n"
_WHAT = (_TRAINING, *get_args(MeasurementKind))


class Tally:
    """Adds up timings of one kind, so that a machine that stood still for an hour does not count as work.

    A timing counts at most three times the median of the 31 around it.
    """

    def __init__(self) -> None:
        self._settled = 0.0
        self._recent: deque[float] = deque()

    def add(self, seconds: float) -> None:
        """Note a timing."""
        self._recent.append(seconds)
        if len(self._recent) > _NEIGHBOURS:
            limit = _OUTLIER * self.typical
            self._settled += min(self._recent.popleft(), limit)

    @property
    def typical(self) -> float:
        """Median of the latest timings, in seconds; of two, the smaller: the first is often slow."""
        return median_low(self._recent)

    @property
    def total(self) -> float:
        """Sum of all timings, in seconds."""
        if not self._recent:
            return 0.0
        limit = _OUTLIER * self.typical
        return self._settled + sum(min(seconds, limit) for seconds in self._recent)


class Overhead:
    """The timings of a run, and what they allow.

    They are those of rank zero on all ranks, and are kept in `farms_timings.csv`, row by row as they are taken.

    Args:
        max_overhead: the share of the time of training that measuring may take.
        timings_file: a file of timings of an earlier run. While they last, its timings are taken instead of the
            clock's, those of training and those of measurements each in their order.

    Raises:
        TypeError: `max_overhead` is no number.
        ValueError: `max_overhead` is not above 0 and at most 1, or `timings_file` is no file of timings.
    """

    def __init__(self, max_overhead: float, timings_file: str | os.PathLike[str] | None = None) -> None:
        check_number("max_overhead", max_overhead, above=0, at_most=1)
        self.max_overhead = max_overhead
        self._source = None if timings_file is None else Path(timings_file)
        self._given: dict[str, list[float]] = {"training": [], "measurements": []}
        for row in [] if self._source is None else read_timings(self._source):
            self._given[_series(row.what)].append(row.seconds)
        self._device, self._share = torch.device("cpu"), False
        self._file: Path | None = None
        self._said = False
        self.reset()

    def reset(self) -> None:
        """Forget the run: another one begins."""
        self._rows: list[Timing] = []
        self._training = Tally()
        self._measurements: dict[str, Tally] = {}
        self._taken = {"training": 0, "measurements": 0}
        self._carried = 0.0
        self._since: float | None = None

    def start(self, folder: str, device: torch.device, *, share: bool, write: bool) -> None:
        """Begin to train.

        Args:
            folder: where the timings are kept.
            device: where the model is trained.
            share: several processes train it together.
            write: this is the one that writes the file.

        Raises:
            ValueError: the file to be written is the one to be read.
        """
        file = None if "://" in folder else Path(folder) / TIMINGS_FILE
        if file is None:
            warn_once(
                f"no {TIMINGS_FILE} is written: {folder} is not a local folder; checkpoints hold the timings",
                self,
            )
        elif self._source is not None and file.resolve() == self._source.resolve():
            raise ValueError(
                f"timings_file={str(self._source)!r} is where this run writes its own timings: move it elsewhere"
            )
        self._device, self._share = device, share
        self._file = file if write else None
        self._begin()

    def _begin(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_name(f"{TIMINGS_FILE}.part")
            part.write_text("".join([_HEADER, *map(_line, self._rows)]), encoding="utf-8")
            part.replace(self._file)
        self._since = self.now()

    def stop(self) -> None:
        """Stop the clock: training is over, or interrupted."""
        self._carried, self._since = self._clock(), None

    def now(self) -> float:
        """Return the time in seconds, once what was handed to the device is done."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def note_training(self, epoch: int, step: int) -> None:
        """Note how long training took since the last time to measure."""
        self.now()
        self._note(_TRAINING, epoch, step, self._clock())

    def note_measurement(self, kind: MeasurementKind, epoch: int, step: int, seconds: float) -> None:
        """Note how long a measurement took; training goes on from here."""
        self._note(kind, epoch, step, seconds)

    def _clock(self) -> float:
        """Return the seconds of training since the last row, without waiting for a device that may be broken."""
        return self._carried + (0.0 if self._since is None else time.perf_counter() - self._since)

    def _note(self, what: str, epoch: int, step: int, seconds: float) -> None:
        series = _series(what)
        if self._taken[series] < len(self._given[series]):
            seconds = self._given[series][self._taken[series]]
        elif self._source is not None:
            warn_once(
                f"{self._source} is used up: from here on the clock's timings are taken, and what is measured may "
                "differ from the run that wrote it",
                self,
            )
        row = Timing(what, epoch, step, self._agree(seconds))
        self._add(row)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        self._carried, self._since = 0.0, time.perf_counter()

    def _agree(self, seconds: float) -> float:
        """Return what rank zero says, once all have come this far: a wait for the slowest is not measuring."""
        if not self._share:
            return seconds
        table = torch.tensor([seconds if dist.get_rank() == 0 else 0.0], dtype=torch.float64, device=self._device)
        dist.all_reduce(table)
        return float(table)

    def _add(self, row: Timing) -> None:
        self._rows.append(row)
        self._taken[_series(row.what)] += 1
        tally = self._training if row.what == _TRAINING else self._measurements.setdefault(row.what, Tally())
        tally.add(row.seconds)

    @property
    def has_measured(self) -> bool:
        """Whether a measurement has been timed."""
        return bool(self._measurements)

    def affords(self, following: MeasurementKind, final: MeasurementKind) -> bool:
        """Tell whether there is time for the next measurement.

        Args:
            following: its kind.
            final: the kind of the one that ends the run.
        """
        needed = self._spent + self._forecast(following) + self._forecast(final)
        affordable = needed <= self.max_overhead * self._training.total
        if not affordable and not self._said:
            self._said = True
            warn_once(
                f"measuring has taken {self._spent:.2g} s and training {self._training.total:.2g} s: within "
                f"max_overhead={self.max_overhead:g}, layers are measured less often than configured; "
                "farms/interval says how often",
                self,
            )
        return affordable

    @property
    def share(self) -> float | None:
        """Time spent on measuring, as a share of that of training so far; None before any training."""
        trained = self._training.total + (self._elapsed() if self._since is None else 0.0)
        return self._spent / trained if trained > 0 else None

    @property
    def _spent(self) -> float:
        return sum(tally.total for tally in self._measurements.values())

    def _forecast(self, kind: MeasurementKind) -> float:
        """Return how long a measurement will take: of a kind that is yet to come, as long as others.

        But for the first, which says little about them: it warms up, and may measure random layers too.
        """
        for name in (kind, "plain", "histogram", "table"):
            if name in self._measurements:
                return self._measurements[name].typical
        return 0.0

    def _elapsed(self) -> float:
        """Return the seconds of training since the last row; 0 where a file will say how many."""
        return 0.0 if self._taken["training"] < len(self._given["training"]) else self._clock()

    def state_dict(self) -> dict[str, Any]:
        """Return the timings as plain values, for a checkpoint."""
        return {"timings": [list(row) for row in self._rows], "elapsed": self._elapsed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the timings of a checkpoint."""
        running = self._since is not None
        self.reset()
        for row in state["timings"]:
            self._add(Timing(*row))
        self._carried = state["elapsed"]
        if running:
            self._begin()


def _series(what: str) -> str:
    return "training" if what == _TRAINING else "measurements"


def _line(row: Timing) -> str:
    return f"{row.what},{row.epoch},{row.step},{row.seconds!r}\n"


def read_timings(path: Path) -> list[Timing]:
    """Read a file of timings. A last line without an end, that of a run which was killed, is left out.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        header, *lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"timings_file={str(path)!r} cannot be read: {error}") from error
    if header + "\n" != _HEADER or len(lines) < 2:
        raise ValueError(
            f"timings_file={str(path)!r} holds no timings: expected the header {_HEADER.strip()!r} and rows, "
            f"as in the {TIMINGS_FILE} of a run with max_overhead"
        )
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=2)]


def _parse(line: str, where: str) -> Timing:
    try:
        what, epoch, step, seconds = line.split(",")
        row = Timing(what, int(epoch), int(step), float(seconds))
    except ValueError:
        row = None
    if row is None or row.what not in _WHAT or not 0 <= row.seconds < float("inf"):
        expected = f"one of {', '.join(_WHAT)}, an epoch, a step and seconds"
        raise ValueError(f"timings_file: expected {expected}, got {line!r} in {where}")
    return row
