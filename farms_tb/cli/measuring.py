"""Measure the layers of a source one by one, with a progress bar, and keep what there is when it stops early.

Both `analyze` and `compare` measure here. The weights of one layer are in memory at a time; Ctrl-C, a file that
breaks off and a layer that is too large for the memory cost what is not measured yet, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from farms_tb.cli.messages import say
from farms_tb.cli.pairing import without_wrappers
from farms_tb.cli.sources import Source
from farms_tb.options import SpectrumOptions
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.spectra.permutation_null import null_seconds, weight_record
from farms_tb.viewing.names import shortened
from farms_tb.weights.layers import Layer
from farms_tb.weights.stacks import MatrixStack


@dataclass(frozen=True)
class MeasureRequest:
    """What is measured.

    Attributes:
        options: how alpha is measured.
        full: also measure whole matrices.
        null: also measure the permutation null: each layer with its entries shuffled.
        patterns: shell-style patterns of layer names, with or without prefixes of wrappers; none for every layer.
        device: where eigenvalues are computed.
    """

    options: SpectrumOptions
    full: bool = False
    null: bool = False
    patterns: Sequence[str] = ()
    device: str = "cpu"

    def takes(self, name: str) -> bool:
        """Return whether a layer is to be measured, by its name with the prefixes of wrappers."""
        if not self.patterns:
            return True
        bare = without_wrappers(name)
        return any(fnmatchcase(name, pattern) or fnmatchcase(bare, pattern) for pattern in self.patterns)


_FIRST = (
    *("layer", "shape", "verdict", "alpha", "alpha_error", "effect", "effect_error"),
    *("alpha_full", "bias", "z_score", "ks_distance", "stable_rank", "stable_rank_full"),
)
"""The most asked-for metrics, which come first in every format."""


@dataclass
class Reading:
    """How far layers were read, one after the other.

    Attributes:
        stopped: why not all layers were measured; empty where they were.
        interrupted: whether that was Ctrl-C.
        at: name of the last layer that was read; empty before the first.
    """

    stopped: str = ""
    interrupted: bool = False
    at: str = ""

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Let Ctrl-C, and input that cannot be read further, end a block early; `stopped` says why."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = f"interrupted at {self.at or 'the first layer'}"
            self.interrupted = True
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            where = f"after {self.at}" if self.at else "at the first layer"
            self.stopped = f"reading stopped {where}: {str(error) or type(error).__name__}"


@dataclass
class Measured(Reading):
    """The records of the layers that were measured so far.

    Attributes:
        records: record of each layer by name.
        full: the same of the whole matrices, where asked for.
    """

    records: dict[str, LayerRecord] = field(default_factory=dict)
    full: dict[str, LayerRecord] = field(default_factory=dict)

    @property
    def report(self) -> Report:
        """The records as a report."""
        return Report(self.records)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values for each layer.

        Keys are those of `COLUMNS`, in this order: the most asked-for metrics, the other ones, the status.
        """
        return [self._row(row) for row in self.report.rows()]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a report's row with the metrics of the whole matrix added."""
        full = self.full.get(row["layer"], LayerRecord())
        row["alpha_full"] = full.alpha
        row["stable_rank_full"] = full.stable_rank
        if row["stable_rank"] is None:
            row["stable_rank"] = full.stable_rank
        row["bias"] = None
        if row["alpha"] is not None and full.alpha is not None:
            row["bias"] = full.alpha - row["alpha"]
        status = row.pop("status")
        if status == OK and full.status != OK:
            status = f"whole matrix: {full.status}"
        first = {name: row[name] for name in _FIRST}
        return {**first, **row, "status": status}


QUICK_NULLS = 60.0
"""Seconds that permutation nulls may take to be measured without being asked for."""

COLUMNS = tuple(Measured(records={"": LayerRecord()}).rows()[0])
"""Names of the values in a row."""


def checked_device(name: str) -> str:
    """Return the name of a device, `"cuda:1"`, after a check that torch can use it.

    Raises:
        ValueError: torch has no such device here, or one without values.
    """
    if name.partition(":")[0] == "meta":
        raise ValueError("--device meta: no values are there to measure. Choose cpu, or cuda where there is a GPU")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {_first_line(error)}") from error
    return name


def null_is_quick(source: Source, request: MeasureRequest) -> bool:
    """Return whether the permutation nulls of layers of these shapes take less than a minute on one core."""
    items = [item for item in source.items if request.takes(item.name if isinstance(item, Layer) else item.path)]
    return sum(null_seconds(stack, request.options) for stack in _without_values(items)) < QUICK_NULLS


def _without_values(items: Sequence[Any]) -> Iterator[MatrixStack]:
    """Yield what each item will be measured as, by its shape alone: of a file, the layer's kind is a guess."""
    for item in items:
        if item.problem or 0 in item.shape:  # Of these, a file may claim any size.
            continue
        if isinstance(item, Layer):
            if item.kind:
                yield MatrixStack(torch.empty(item.shape, device="meta"), item.sampling)
        elif len(item.shape) == 2:
            yield MatrixStack(torch.empty(1, *item.shape, device="meta"), "grid")
        elif len(item.shape) > 2:
            matrices = math.prod(item.shape[2:]), *item.shape[:2]
            yield MatrixStack(torch.empty(matrices, device="meta"))


def measure(source: Source, request: MeasureRequest, console: Console) -> Measured:
    """Measure the layers of a source; Ctrl-C and a file that breaks off keep what was measured.

    The console gets a progress bar, if it is a terminal.
    """
    if source.note:
        say(source.note)
    found = Measured(stopped="; ".join(source.damaged))
    with progress_bar(console, len(source.items)) as show, found.until_stopped():
        for name, weight in source.read(_counted(source.items, show)):
            found.at = name
            if request.takes(name):
                show(description=shortened(name))
                _measure_layer(found, name, weight, request)
    return found


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar where the console is a terminal.

    Yields:
        What updates the bar, with the arguments of `rich.progress.Progress.update`.
    """
    if not console.is_terminal:
        # Some versions of rich end even a disabled bar with an empty line.
        yield lambda **changes: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield partial(progress.update, progress.add_task("", total=total))


def _counted(items: Iterable[Any], show: Callable[..., None]) -> Iterator[Any]:
    """Yield items, and advance the progress bar after each."""
    for item in items:
        yield item
        show(advance=1)


def _measure_layer(found: Measured, name: str, weight: MatrixStack | LayerRecord, request: MeasureRequest) -> None:
    """Measure one layer, and add its records to what was found."""
    if isinstance(weight, LayerRecord):
        found.records[name] = weight
        return
    record = _attempt(weight, request.device, request.options, request.null)
    if request.full and record.status == OK:
        found.full[name] = _attempt(weight, request.device, replace(request.options, esd="full"))
    found.records[name] = record


def _attempt(weight: MatrixStack, device: str, options: SpectrumOptions, null: bool = False) -> LayerRecord:
    """Measure one layer; where that fails, return a record that says why."""
    try:
        stack = replace(weight, matrices=weight.matrices.to(device))
        return weight_record(stack, options, null=null)
    except FAILURES as error:
        return LayerRecord(status=failure(error), kind=weight.kind, shape=tuple(weight.matrices.shape))


FAILURES = (RuntimeError, MemoryError)
"""What one layer raises, too large for the memory or without convergence; the others are measured all the same."""


def failure(error: BaseException) -> str:
    """Return the status of a layer whose measurement has raised an error."""
    return f"failed: {_first_line(error) or type(error).__name__}"


def _first_line(error: BaseException) -> str:
    """Return what an error says, without the stack of C++ calls that torch appends."""
    return str(error).partition("\n")[0]
