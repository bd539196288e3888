"""Read the callback's state in a checkpoint; what is damaged is left out and said, the rest is kept.

Lightning saves it under `callbacks`. Nothing in the file is executed, see `farms_tb.weights.torch_files`, and a
file may come from anybody: every value is checked for its type before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.spectra.permutation_null import PermutationNull
from farms_tb.viewing.history import LARGEST_EXACT
from farms_tb.weights.torch_files import open_torch_file

__all__ = ["SavedState", "newest_state", "read_state"]


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds of the callback.

    Attributes:
        options: the callback's options as plain values; empty where they are not known.
        layers: names of the layers in order of depth; empty where they are not known.
        nulls: each layer's permutation null, where the run measured it.
        epoch: completed epochs; None where the checkpoint does not say.
        step: optimizer steps; None where the checkpoint does not say.
        damaged: names of the parts that are not what the callback writes, and were left out.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    nulls: Mapping[str, PermutationNull] = field(default_factory=dict)
    epoch: int | None = None
    step: int | None = None
    damaged: tuple[str, ...] = ()

    @property
    def spectrum_options(self) -> dict[str, Any]:
        """How the run measured, as arguments of `SpectrumOptions`; unknown ones, of other versions, left out."""
        names = [option.name for option in fields(SpectrumOptions)]
        return {name: self.options[name] for name in names if name in self.options}

    def nulls_by(self, options: Mapping[str, Any]) -> Mapping[str, PermutationNull]:
        """Return the permutation nulls by layer, if the run measured them by these options; else none.

        Args:
            options: plain values, as `as_plain(SpectrumOptions(...))` returns them.
        """
        try:
            own = as_plain(SpectrumOptions(**self.spectrum_options))
        except (TypeError, ValueError):  # options that no run can have had
            return {}
        return self.nulls if options == own else {}

    def at(self) -> str:
        """Return the time of the checkpoint in words, `"epoch 3, step 12"`; empty where it is not known."""
        counts = {"epoch": self.epoch, "step": self.step}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count is not None)


def read_state(checkpoint: Path) -> SavedState:
    """Read the callback's state out of a checkpoint.

    Args:
        checkpoint: a file that Lightning's Trainer saved, of which only plain values are read.

    Returns:
        What the checkpoint holds of the callback; empty for one of a run without it.

    Raises:
        ValueError: the file is no checkpoint, or cut short or damaged, or holds more than plain values.
        OSError: there is no such file.
    """
    loaded = open_torch_file(checkpoint).content
    if not isinstance(loaded, dict):
        return SavedState()
    damaged: list[str] = []
    state: Any = loaded
    for key in ("callbacks", "FARMSTempBalance", "balancer"):
        state = _mapping(state, key, damaged)
    options = _mapping(state, "options", damaged)
    ratios = _mapping(state, "ratios", damaged)
    report = _mapping(state, "report", damaged)
    last_epoch = _count(loaded, "epoch")
    return SavedState(
        options={name: value for name, value in options.items() if _is_text(name)},
        layers=tuple(filter(_is_text, ratios)),
        nulls=dict(_nulls(report, damaged)),
        epoch=None if last_epoch is None else last_epoch + 1,  # Lightning counts from 0
        step=_count(loaded, "global_step"),
        damaged=tuple(damaged),
    )


def newest_state(checkpoints: Sequence[Path]) -> SavedState:
    """Return the state in the first of several checkpoints that can be read; an empty one where none can."""
    for path in checkpoints:
        try:
            return read_state(path)
        except (ValueError, OSError):  # one that is being written, or deleted
            continue
    return SavedState()


def _mapping(state: Mapping[str, Any], key: str, damaged: list[str]) -> Mapping[Any, Any]:
    """Return a part of the callback's state; one that is no dict is left empty, and named in `damaged`."""
    found = state.get(key, {})
    if isinstance(found, Mapping):
        return found
    damaged.append(key)
    return {}


def _nulls(report: Mapping[Any, Any], damaged: list[str]) -> Iterator[tuple[str, PermutationNull]]:
    """Yield the permutation null of each layer that has one, up to the first record that is damaged."""
    for name, record in report.items():
        if not (_is_text(name) and isinstance(record, Mapping)):
            damaged.append("report")
            return
        mean = record.get("null_mean")
        std = record.get("null_std")
        if mean is None or std is None:
            continue
        if not (_is_finite(mean) and _is_finite(std) and std > 0):
            damaged.append("permutation null")
            return
        yield name, PermutationNull(mean, std, _count(record, "null_draws"), *_entropy_null(record))


def _entropy_null(record: Mapping[Any, Any]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of the entropy, of which version 0.1 saved none."""
    mean: Any = record.get("null_entropy_mean")
    std: Any = record.get("null_entropy_std")
    return (mean, std) if _is_finite(mean) and _is_finite(std) and std > 0 else (None, None)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _count(checkpoint: Mapping[Any, Any], key: str) -> int | None:
    """Return a number of epochs or steps; None for what can be none, so that a page can show all that it gets."""
    value = checkpoint.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if value in range(LARGEST_EXACT) else None


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
