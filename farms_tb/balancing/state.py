"""What a checkpoint holds of the balancing: written as plain values, and checked before any of it is used.

The state of version 2 is a dict of

- `version`: the number of this format;
- `options`: all options of the measurement and of the ratios, flat;
- `ratios`: learning-rate ratio of each layer by name;
- `report`: the latest measurement, a dict of each layer's record by name;
- `begun`: where a measurement was running in the background, its report;
- `leaders`: with `unit="block"`, a layer of each block that has the block's ratio.

Version 1 is the same without the last two, and with fewer options and fields of a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeGuard

from farms_tb.options import MAPS, NUMERICS, RatioOptions, SpectrumOptions, as_plain
from farms_tb.printable import printable
from farms_tb.report import DRAWN, LayerRecord, Report
from farms_tb.weights.layers import Layer

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
        leaders: with `unit="block"` a layer that has the ratio of its block, by the block's path.
    """

    options: dict[str, Any]
    ratios: dict[str, float]
    report: Report | None
    begun: Report | None
    leaders: dict[str, str]


def write_state(state: BalancerState) -> dict[str, Any]:
    """Return a state as plain values, which `torch.load` reads with `weights_only=True`.

    Returns:
        The dict of version 2, see this module. Histograms are left out.
    """
    plain: dict[str, Any] = {
        "version": STATE_VERSION,
        "options": dict(state.options),
        "ratios": dict(state.ratios),
        "report": _plain_records(state.report),
    }
    if state.begun is not None:
        plain["begun"] = _plain_records(state.begun)
    if state.leaders:
        plain["leaders"] = dict(state.leaders)
    return plain


def read_state(plain: object) -> BalancerState:
    """Check a saved state of any version up to this one, and read it.

    Args:
        plain: what a checkpoint holds, of which nothing is taken for granted.

    Raises:
        ValueError: not a state of this package, one of a newer version, or one that is damaged: a wrong type, a
            missing entry, or a number that is not finite. The message names the entry.
    """
    if not isinstance(plain, dict) or not set(_KEYS) <= set(plain):
        raise ValueError("not a state of farms_tb: expected a dict with version, options, ratios and report")
    _check_version(plain["version"])
    options = _named(plain["options"], "options")
    saved_ratios = _named(plain["ratios"], "ratios")
    ratios = {name: _ratio(value, f"ratios[{name!r}]") for name, value in saved_ratios.items()}
    _check_bound(ratios, options)
    report = _read_report(plain["report"], "report", options)
    begun = _read_report(plain.get("begun", {}), "begun", options)
    leaders = _named(plain.get("leaders", {}), "leaders")
    for block, layer in leaders.items():
        if layer not in ratios:
            raise damaged_state(f"leaders[{block!r}] must be a layer with a ratio, got {layer!r:.60}")
    return BalancerState(options, ratios, report, begun, leaders)


def changed_settings(state: BalancerState, options: Mapping[str, Any], layers: Sequence[Layer]) -> list[str]:
    """Say in what a saved state has other options or layers than the present run.

    Returns:
        A clause for each option that changes results and has another value, for the layers that are new or gone,
        and for each layer of another shape; empty where there are none.
    """
    changes = _changed_options(state, options)
    saved, present = set(state.ratios), {layer.name for layer in layers}
    gone, new = sorted(saved - present), sorted(present - saved)
    if gone:
        changes.append(f"layers {', '.join(gone)} are not in the model")
    if new:
        changes.append(f"layers {', '.join(new)} are new")
    return changes + _changed_shapes(state, layers)


def _changed_options(state: BalancerState, options: Mapping[str, Any]) -> list[str]:
    """Say which options have another value now. Those that change no result do not count."""
    # An option that the checkpoint does not know yet had no effect: it was at its default.
    saved = as_plain(SpectrumOptions(), RatioOptions()) | state.options
    changes = []
    for name in {**options, **saved}:
        before, now = saved.get(name), options.get(name)
        if before != now and name not in NUMERICS:
            changes.append(f"{name} was {before!r} and is {now!r}{_hint(name, before, now)}")
    return changes


def _changed_shapes(state: BalancerState, layers: Sequence[Layer]) -> list[str]:
    """Say which layers have another shape now, or other numbers, real or complex: metrics do not compare then.

    Layers that had no shape when they were measured, as lazy ones before their first batch, or that have none now,
    are no change.
    """
    # What was begun to be measured is later than the report: layers may have been replaced between the two.
    records = {
        name: record for part in (state.report, state.begun) if part for name, record in part.layers.items()
    }
    changes = []
    for layer in layers:
        record = records.get(layer.name)
        if record is None or not record.shape or not layer.shape:
            continue
        if record.shape != layer.shape:
            changes.append(f"layer {layer.name} had shape {record.shape} and has {layer.shape}")
        elif record.kind and record.kind != layer.kind:
            changes.append(f"layer {layer.name} was {record.kind} and is {layer.kind}")
    return changes


def _hint(name: str, before: object, now: object) -> str:
    """Return what to say of an option whose default has changed since the checkpoint was written; else nothing."""
    if (name, before, now) != ("assign_func", "tb_linear_map", RatioOptions.assign_func):
        return ""
    return " (the default since version 0.2: to continue as before, pass assign_func='tb_linear_map')"


def _plain_records(report: Report | None) -> dict[str, dict[str, Any]]:
    """Return the records as dicts, without what is drawn: that is large, and not needed to continue."""
    layers = {} if report is None else report.layers
    return {name: record.as_plain() for name, record in layers.items()}


def _read_report(plain: object, entry: str, options: dict[str, Any]) -> Report | None:
    """Check and read the records of a report, measured with the saved options; None where there are none."""
    records = {name: _read_record(record, f"{entry}[{name!r}]") for name, record in _named(plain, entry).items()}
    if not records:
        return None
    # As it was measured; an option that the checkpoint does not know was at its default.
    defaults = as_plain(SpectrumOptions())
    measured_with = {name: options.get(name, default) for name, default in defaults.items()}
    return Report(records, measured_with)


def _read_record(plain: object, entry: str) -> LayerRecord:
    """Check and read the record of one layer."""
    # Up to version 0.1 a record had what is drawn as well, always None.
    record = {name: value for name, value in _named(plain, entry).items() if name not in DRAWN}
    unknown = sorted(set(record) - {field.name for field in fields(LayerRecord)})
    if unknown:
        listed = ", ".join(map(printable, unknown))
        raise damaged_state(f"{entry} has unknown fields {listed}, maybe of a newer farms_tb: upgrade it")
    for name in _RECORD_KEYS:
        if name not in record:
            raise damaged_state(f"{entry} has no {name!r}")
    _check_fields(record, entry)
    if "pooled_stable_rank" not in record:
        # Up to version 0.1 it had the name that is the matrix's now.
        record = {**record, "pooled_stable_rank": record.get("stable_rank"), "stable_rank": None}
    return LayerRecord.from_plain(record)


def _check_fields(record: Mapping[str, Any], entry: str) -> None:
    """Raise where a field of a record is not of its type in `LayerRecord`, or out of range."""
    types = {field.name: str(field.type) for field in fields(LayerRecord)}
    for name, value in record.items():
        expected, fits = _FIELD_TYPES[types[name]]
        if not fits(value):
            raise damaged_state(f"{entry}[{name!r}] must be {expected}, got {value!r}")
    for name in ("null_std", "null_entropy_std", "null_draws"):
        value = record.get(name)
        if value is not None and not value > 0:
            raise damaged_state(f"{entry}[{name!r}] must be above 0, got {value!r}")


def _check_version(version: object) -> None:
    """Raise where the version of a state is none, or one of a newer farms_tb."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise damaged_state(f"its version must be an integer of at least 1, got {version!r}")
    if version > STATE_VERSION:
        raise ValueError(f"the state has version {version}, this farms_tb reads up to {STATE_VERSION}: upgrade it")


def _named(value: object, entry: str) -> dict[str, Any]:
    """Return a dict with strings as keys, or raise for anything else."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise damaged_state(f"{entry} must be a dict with names as keys, got {value!r:.60}")
    return value


def _ratio(value: object, entry: str) -> float:
    """Return a learning-rate ratio; raise a `ValueError` unless it is a finite number of at least 0."""
    if not _is_number(value) or value < 0:
        raise damaged_state(f"{entry} must be a finite number of at least 0, got {value!r:.60}")
    return float(value)


def _check_bound(ratios: dict[str, float], options: dict[str, Any]) -> None:
    """Raise where a ratio is above the bound that the options it was saved with set, if they set one."""
    is_free = options.get("normalize") is not None or options.get("fixed")
    bounded = [name for name, traits in MAPS.items() if traits.bounded]
    if is_free or options.get("assign_func") not in bounded:
        return
    largest = options.get("lr_max_ratio")
    if not _is_number(largest):
        return
    # Rounding may put a ratio just above its bound.
    bound = max(1.0, largest) * (1 + 1e-6)
    for name, ratio in ratios.items():
        if ratio > bound:
            raise damaged_state(f"ratios[{name!r}] must be at most the lr_max_ratio of {largest!r}, got {ratio!r}")


def damaged_state(what: str) -> ValueError:
    """Return the error for a state that cannot be used; `what` names the entry, what it must be and what it is."""
    return ValueError(f"the saved state of farms_tb is damaged: {what}. Resume from another checkpoint")


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number. In Python, True and False are numbers; here they are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def _is_shape(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# By the type of the field in `LayerRecord`, as it is written there.
_FIELD_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "float | None": ("a finite number or None", _is_number_or_none),
    "int | None": ("an integer of at least 0, or None", _is_count_or_none),
    "int": ("an integer of at least 0", _is_count),
    "str": ("a string", _is_text),
    "tuple[int, ...]": ("a list of integers", _is_shape),
}
