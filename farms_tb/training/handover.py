"""Results of a run that trains in child processes, brought back to the process that started it.

Lightning's strategies `ddp_spawn`, `ddp_fork` and `ddp_notebook` train with copies of the callback, and return the
weights, but nothing of a callback. So the copy on rank zero writes its results to a file that both know, and the
original reads them when it is asked for its report.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farms_tb.atomic_write import write_text_atomically
from farms_tb.report import LayerRecord, Report


@dataclass(frozen=True)
class Results:
    """What a callback shows after training, without model and optimizers.

    Attributes:
        report: the latest measurement; None before the first.
        ratios: active ratio of each layer by name.
        by_parameter: active ratio of each parameter by name.
    """

    report: Report | None
    ratios: Mapping[str, float]
    by_parameter: Mapping[str, float]

    def parameter_ratios(self) -> Mapping[str, float]:
        """Return the active ratio of each parameter by name, as `LayerBalancer` does."""
        return self.by_parameter

    def as_json(self) -> str:
        """Return the results as text, for another process.

        Histograms and outliers, which are only drawn, are left out. Numbers come back bitwise identical.
        """
        report = Report({}, {}) if self.report is None else self.report
        return json.dumps(
            {
                "layers": {name: record.as_plain() for name, record in report.layers.items()},
                "options": dict(report.options),
                "ratios": dict(self.ratios),
                "by_parameter": dict(self.by_parameter),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `as_json` returned."""
        read: dict[str, Any] = json.loads(text)
        layers = {name: LayerRecord.from_plain(plain) for name, plain in read["layers"].items()}
        return cls(Report(layers, read["options"]), read["ratios"], read["by_parameter"])


class Handover:
    """A file by which child processes give the results of a run to the process that started them.

    Copies of this object, in forked and spawned processes, know the same file; one by `copy.deepcopy` has another.
    A file exists only between the end of training in a child and the first `receive` in the parent.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"farms_tb_{uuid.uuid4().hex}.json"
        weakref.finalize(self, _remove, self._path, self._owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        """Return a new object with a file of its own: results of one callback are not those of its copy."""
        return Handover()

    def send(self, results: Results) -> None:
        """Write the results if this process is a child of the one that made this object.

        Args:
            results: what the parent will show; the file replaces an earlier one at once, never in part.

        Raises:
            OSError: the directory for temporary files cannot be written.
        """
        is_child = os.getpid() != self._owner and os.getppid() == self._owner
        if not is_child:
            return
        write_text_atomically(self._path, results.as_json(), mode=0o600)  # for the user alone

    def receive(self) -> Results | None:
        """Return what a child has sent, and remove the file.

        Returns:
            The results; None where there is nothing new, and in every process but the one that made this object.
        """
        if os.getpid() != self._owner or not self._path.exists():
            return None
        results = Results.from_json(self._path.read_text())
        self._path.unlink()
        return results


def _remove(path: Path, owner: int) -> None:
    """Remove a file that nobody asked for; children leave it to the process that owns it."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
