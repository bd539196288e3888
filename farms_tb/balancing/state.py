"""What a checkpoint holds of the balancing: written as plain values, and checked before any of it is used.

The state of version 2 is a dict of

- `version`: the number of this format;
- `options`: all options of the measurement and of the ratios, flat;
- `ratios`: learning-rate ratio of each layer by name;
- `report`: the latest measurement, a dict of each layer's record by name;
- `begun`: where a measurement was running in the background, its report.

Version 1 is the same without `begun` and with fewer options and fields of a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, get_type_hints

from farms_tb.options import NUMERICS, RatioOptions, SpectrumOptions, as_plain
from farms_tb.report import LayerRecord, Report

STATE_VERSION = 2

_KEYS = ("version", "options", "ratios", "report")
_RECORD_KEYS = ("alpha", "status", "shape")
"""Fields of a record in every version."""


@dataclass(frozen=True)
class BalancerState:
    """What a run continues from.

    Attributes:
        options: options by name, those of the measurement and of the ratios.
        ratios: learning-rate ratio of each layer by name: finite, and not negative.
        report: the latest measurement; None before the first.
        begun: the report of a measurement that was begun and whose ratios are not applied yet.
    """

    options: dict[str, Any]
    ratios: dict[str, float]
    report: Report | None = None
    begun: Report | None = None


def write_state(state: BalancerState) -> dict[str, Any]:
    """Return a state as plain values, which `torch.load` reads with `weights_only=True`."""
    plain: dict[str, Any] = {
        "version": STATE_VERSION,
        "options": dict(state.options),
        "ratios": dict(state.ratios),
        "report": _plain_records(state.report),
    }
    if state.begun is not None:
        plain["begun"] = _plain_records(state.begun)
    return plain


def read_state(plain: object) -> BalancerState:
    """Check a saved state of any version up to this one, and read it.

    Raises:
        ValueError: not a state of this package, one of a newer version, or one that is damaged: a wrong type, a
            missing entry, or a number that is not finite. The message names the entry.
    """
    if not isinstance(plain, dict) or not set(_KEYS) <= set(plain):
        raise ValueError("not a state of farms_tb: expected a dict with version, options, ratios and report")
    _check_version(plain["version"])
    options = _named(plain["options"], "options")
    ratios = {
        name: _ratio(value, f"ratios[{name!r}]") for name, value in _named(plain["ratios"], "ratios").items()
    }
    _check_bound(ratios, options)
    report = _read_report(plain["report"], "report", options)
    begun = _read_report(plain["begun"], "begun", options) if "begun" in plain else None
    return BalancerState(options, ratios, report, begun)


def state_changes(state: BalancerState, options: Mapping[str, Any], layers: Collection[str]) -> str:
    """Say how a saved state differs from the present run; an empty string where it does not.

    Args:
        state: the saved state.
        options: the present options by name.
        layers: names of the present layers.
    """
    # An option that the checkpoint does not know yet had no effect: it was at its default.
    saved = as_plain(SpectrumOptions(), RatioOptions()) | state.options
    changes = [
        f"{name} was {saved.get(name)!r} and is {options.get(name)!r}"
        for name in {**options, **saved}
        if saved.get(name) != options.get(name) and name not in NUMERICS
    ]
    gone, new = sorted(set(state.ratios) - set(layers)), sorted(set(layers) - set(state.ratios))
    if gone:
        changes.append(f"layers {', '.join(gone)} are not in the model")
    if new:
        changes.append(f"layers {', '.join(new)} are not in the checkpoint")
    return "; ".join(changes)


def _plain_records(report: Report | None) -> dict[str, dict[str, Any]]:
    """Return the records as dicts without histograms, which are large and not needed to continue."""
    records = {} if report is None else report.layers
    # `dataclasses.asdict` takes thirty times as long, at every checkpoint.
    return {name: {**vars(r), "histogram": None, "shape": list(r.shape)} for name, r in records.items()}


def _read_report(plain: object, entry: str, options: dict[str, Any]) -> Report | None:
    records = {name: _read_record(record, f"{entry}[{name!r}]") for name, record in _named(plain, entry).items()}
    # As it was measured; an option that the checkpoint does not know was at its default.
    defaults = as_plain(SpectrumOptions())
    measured_with = {name: options.get(name, default) for name, default in defaults.items()}
    return Report(records, measured_with) if records else None


def _read_record(plain: object, entry: str) -> LayerRecord:
    record = _named(plain, entry)
    unknown = sorted(set(record) - {field.name for field in fields(LayerRecord)})
    if unknown:
        raise _damaged(f"{entry} has unknown fields {', '.join(unknown)}, maybe of a newer farms_tb: upgrade it")
    for name in _RECORD_KEYS:
        if name not in record:
            raise _damaged(f"{entry} has no {name!r}")
    hints = get_type_hints(LayerRecord)
    for name, value in record.items():
        expected, fits = _FIELD_TYPES.get(str(hints[name]), ("", _anything))
        if not fits(value):
            raise _damaged(f"{entry}[{name!r}] must be {expected}, got {value!r}")
    if record.get("null_std") is not None and not record["null_std"] > 0:
        raise _damaged(f"{entry}['null_std'] must be above 0, got {record['null_std']!r}")
    return LayerRecord(**{**record, "histogram": None, "shape": tuple(record["shape"])})


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _damaged(f"its version must be an integer of at least 1, got {version!r}")
    if version > STATE_VERSION:
        raise ValueError(f"the state has version {version}, this farms_tb reads up to {STATE_VERSION}: upgrade it")


def _named(value: object, entry: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _damaged(f"{entry} must be a dict with names as keys, got {_short(value)}")
    return value


def _ratio(value: object, entry: str) -> float:
    if value is None or not _is_number_or_none(value) or value < 0:  # type: ignore[operator]
        raise _damaged(f"{entry} must be a finite number of at least 0, got {_short(value)}")
    return float(value)  # type: ignore[arg-type]


def _check_bound(ratios: dict[str, float], options: dict[str, Any]) -> None:
    """Raise where a ratio is larger than the options that it was saved with allow."""
    largest = options.get("lr_max_ratio")
    if not _is_finite(largest):
        return
    bound = max(1.0, float(largest)) * (1 + 1e-6)  # type: ignore[arg-type]
    for name, ratio in ratios.items():
        if ratio > bound:
            raise _damaged(f"ratios[{name!r}] must be at most the lr_max_ratio of {largest!r}, got {ratio!r}")


def _damaged(what: str) -> ValueError:
    return ValueError(f"the saved state of farms_tb is damaged: {what}. Resume from another checkpoint")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_finite(value)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shape(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value))


def _anything(value: object) -> bool:
    return True


# By the type of the field in `LayerRecord`; fields of other types are not checked.
_FIELD_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "float | None": ("a finite number or None", _is_number_or_none),
    "typing.Optional[float]": ("a finite number or None", _is_number_or_none),
    "<class 'int'>": ("an integer of at least 0", _is_count),
    "<class 'str'>": ("a string", lambda value: isinstance(value, str)),
    "tuple[int, ...]": ("a list of integers", _is_shape),
}
