"""Measure the layers of a source one by one, with a progress bar, and keep what there is when it stops early."""

from __future__ import annotations

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
from farms_tb.spectra.measure import Nulls, weight_record
from farms_tb.viewing.names import printable, shortened
from farms_tb.viewing.stable_rank import matrix_stable_rank
from farms_tb.weights.matrices import MatrixStack


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        options: how alpha is measured.
        full: also measure whole matrices.
        null: also measure the permutation null: a layer of each shape with its entries shuffled.
        patterns: shell-style patterns of layer names, with or without prefixes of wrappers; none for every layer.
        device: where eigenvalues are computed.
    """

    options: SpectrumOptions
    full: bool = False
    null: bool = False
    patterns: Sequence[str] = ()
    device: str = "cpu"

    def takes(self, name: str) -> bool:
        """Whether the layer is to be measured."""
        names = {name, without_wrappers(name)}
        return not self.patterns or any(fnmatchcase(each, pattern) for each in names for pattern in self.patterns)


_FIRST = (
    *("layer", "shape", "alpha", "alpha_error", "alpha_full", "bias", "z_score", "ks_distance"),
    *("stable_rank", "stable_rank_full"),
)


@dataclass
class Measured:
    """What was found.

    Attributes:
        records: record of each layer by name.
        full: the same of the whole matrices, where asked for.
        stopped: why not all layers were measured; empty where they were.
        interrupted: whether that was Ctrl-C.
        nulls: the permutation nulls of the shapes so far.
    """

    records: dict[str, LayerRecord] = field(default_factory=dict)
    full: dict[str, LayerRecord] = field(default_factory=dict)
    stopped: str = ""
    interrupted: bool = False
    nulls: Nulls = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values for each layer, the most asked-for metrics first."""
        return [self._row(row) for row in Report(self.records).rows()]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        full = self.full.get(row["layer"], LayerRecord())
        row["alpha_full"] = full.alpha
        row["bias"] = None if row["alpha"] is None or full.alpha is None else full.alpha - row["alpha"]
        row["stable_rank_full"] = matrix_stable_rank(full)
        if row["status"] == OK and full.status != OK:
            row["status"] = f"whole matrix: {full.status}"
        names = dict.fromkeys((*_FIRST, *(name for name in row if name != "status"), "status"))
        return {name: row[name] for name in names}


COLUMNS = tuple(Measured({"": LayerRecord()}).rows()[0])
"""Names of the values in a row."""


def checked_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        ValueError: torch has no such device here.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    return name


def measure(source: Source, wanted: Wanted, console: Console) -> Measured:
    """Measure the layers of a source; Ctrl-C and a file that breaks off keep what was measured.

    Args:
        source: the model.
        wanted: what is measured.
        console: where the progress bar goes, if it is a terminal.
    """
    if source.note:
        say(source.note)
    found = Measured(stopped="; ".join(source.damaged))
    name = "the first layer"
    with _progress(console, len(source.items)) as show:
        try:
            for name, weight in source.read(_counted(source.items, show)):
                if wanted.takes(name):
                    show(description=shortened(printable(name), 60))
                    _measure_layer(found, name, weight, wanted)
        except KeyboardInterrupt:
            found.stopped, found.interrupted = f"interrupted at {name}", True
        except (ValueError, OSError, RuntimeError) as error:
            found.stopped = f"reading stopped after {name}: {error}"
    return found


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar where the console is a terminal; yields what updates it, as `Progress.update` does."""
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
    for item in items:
        yield item
        show(advance=1)


def _measure_layer(found: Measured, name: str, weight: MatrixStack | LayerRecord, wanted: Wanted) -> None:
    if isinstance(weight, LayerRecord):
        found.records[name] = weight
        return
    stack = replace(weight, matrices=weight.matrices.to(wanted.device))
    nulls = found.nulls if wanted.null else None
    record = _attempt(lambda: weight_record(stack, wanted.options, nulls=nulls), stack)
    if wanted.full and record.status == OK:
        found.full[name] = _attempt(lambda: weight_record(stack, replace(wanted.options, esd="full")), stack)
    found.records[name] = record


def _attempt(record: Callable[[], LayerRecord], stack: MatrixStack) -> LayerRecord:
    """A layer that is too large for the memory, or whose eigenvalues do not converge, does not stop the others."""
    try:
        return record()
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return LayerRecord(status=f"failed: {reason}", kind=stack.kind, shape=tuple(stack.matrices.shape))
