"""Measure the layers of a source one by one, with a progress bar, and keep what there is when it stops early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from farms_tb.cli.sources import Source
from farms_tb.options import SpectrumOptions
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.spectra.measure import Nulls, weight_record
from farms_tb.weights.matrices import MatrixStack


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        options: how alpha is measured.
        full: also measure whole matrices.
        null: also measure a layer of each shape with its entries shuffled.
        patterns: shell-style patterns of layer names; none for every layer.
        device: where eigenvalues are computed.
    """

    options: SpectrumOptions
    full: bool = False
    null: bool = False
    patterns: Sequence[str] = ()
    device: str = "cpu"

    def takes(self, name: str) -> bool:
        """Whether the layer is to be measured."""
        return not self.patterns or any(fnmatchcase(name, pattern) for pattern in self.patterns)


_FIRST = (
    *("layer", "shape", "alpha", "alpha_error", "alpha_full", "bias", "z_score", "ks_distance"),
    *("stable_rank", "stable_rank_full"),
)


@dataclass
class Measured:
    """What was found.

    Attributes:
        records: figures of each layer by name.
        full: figures of the whole matrices, where asked for.
        stopped: why not all layers were measured; empty where they were.
        interrupted: whether that was Ctrl-C.
        nulls: the nulls of the shapes so far.
    """

    records: dict[str, LayerRecord] = field(default_factory=dict)
    full: dict[str, LayerRecord] = field(default_factory=dict)
    stopped: str = ""
    interrupted: bool = False
    nulls: Nulls = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values a layer, the most asked-for figures first."""
        rows = []
        for row in Report(self.records).rows():
            full = self.full.get(row["layer"])
            row["alpha_full"] = None if full is None else full.alpha
            row["bias"] = None if None in (row["alpha"], row["alpha_full"]) else row["alpha_full"] - row["alpha"]
            row["stable_rank_full"] = None if full is None else full.stable_rank
            if row["status"] == OK and full is not None and full.status != OK:
                row["status"] = f"whole matrix: {full.status}"
            names = dict.fromkeys((*_FIRST, *(name for name in row if name != "status"), "status"))
            rows.append({name: row[name] for name in names})
        return rows


COLUMNS = tuple(Measured({"": LayerRecord()}).rows()[0])
"""Names of the figures in a row."""


def measure(source: Source, wanted: Wanted, console: Console) -> Measured:
    """Measure the layers of a source; Ctrl-C and a file that breaks off keep what was measured.

    Args:
        source: the model.
        wanted: what is measured.
        console: where the progress bar goes, if it is a terminal.
    """
    found = Measured(stopped="; ".join(source.damaged))
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    # Some versions of rich end even a disabled bar with an empty line.
    with progress if console.is_terminal else nullcontext():
        task = progress.add_task("", total=len(source.items))

        def counted(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                yield item
                progress.advance(task)

        name = "the first layer"
        try:
            for name, weight in source.read(counted(source.items)):
                if wanted.takes(name):
                    progress.update(task, description=name)
                    _measure_layer(found, name, weight, wanted)
        except KeyboardInterrupt:
            found.stopped, found.interrupted = f"interrupted at {name}", True
        except (ValueError, OSError, RuntimeError) as error:
            found.stopped = f"reading stopped after {name}: {error}"
    return found


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
