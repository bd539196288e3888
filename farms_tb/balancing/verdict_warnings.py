"""Warn of layers that training does not reach, or makes collapse: of each once.

A layer that is still random after some epochs, while most others have learnt, is often not used, gets no gradient,
or has far too small a learning rate. Random layers of the first epochs are what they should be, and no warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn

from farms_tb.report import LayerRecord, Report
from farms_tb.verdicts import Verdict
from farms_tb.warnings import warn_once

PATIENCE = 3
"""A layer is named when so many measurements in a row found it random and most others not."""

MOST = 0.5
"""Most others have learnt when more than this share of the layers is not random."""


class VerdictWarnings:
    """Warns of layers that collapse, and of those that stay random while others learn.

    Args:
        model: what the warnings are about.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._said: set[str] = set()
        self._left_behind: Counter[str] = Counter()

    def warn(self, report: Report, trained: Sequence[str], named: Collection[str]) -> None:
        """Warn of what a measurement shows.

        Args:
            report: the measurement.
            trained: names of the layers that an optimizer trains. Others stay as they are, and are no news.
            named: names of layers whose status another warning gives.
        """
        records = {name: report.layers[name] for name in trained}
        for name, record in records.items():
            if record.collapsed and name not in named:
                self._warn(name, f"{name} has {record.status}. A smaller weight decay may help, or fewer units")
        compared = {name: record for name, record in records.items() if record.z_score is not None}
        if not compared:
            return
        for name in self._lagging(compared):
            self._warn(
                name,
                f"{name} is still like a random layer after {PATIENCE} measurements in which most others had "
                "learnt. Is it used, does it get gradients, and is its learning rate large enough?",
            )

    def _lagging(self, compared: dict[str, LayerRecord]) -> list[str]:
        """Return the layers that have been random for some measurements while most others were not."""
        random = [name for name, record in compared.items() if record.verdict is Verdict.RANDOM]
        others_have_learnt = len(compared) - len(random) > MOST * len(compared)
        counts: Counter[str] = Counter()
        if others_have_learnt:
            counts.update({name: self._left_behind[name] + 1 for name in random})
        self._left_behind = counts
        return [name for name, count in counts.items() if count >= PATIENCE]

    def _warn(self, name: str, message: str) -> None:
        if name not in self._said:
            self._said.add(name)
            warn_once(message, self._model)
