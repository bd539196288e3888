"""From a report to the learning-rate ratio of each of its layers: which number of a record is mapped, and by what.

The maps themselves, from numbers to ratios, are in `farms_tb.balancing.ratio_maps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from farms_tb.balancing.ratio_maps import noise_lambda, ratios_from
from farms_tb.balancing.shrinkage import shrunk_effects
from farms_tb.options import Kind, RatioOptions
from farms_tb.report import LayerRecord, Report


@dataclass(frozen=True)
class RatioSummary:
    """What one mapping of a report did, over all layers.

    Attributes:
        mean_ratio: mean ratio of the balanced layers; None where no layer is balanced. Far from 1, balancing also
            changes the overall learning rate.
        noise_lambda: with the noise-aware map, the `noise_lambda` of each kind that is balanced; else empty.
        tau: with the map of shrunk effects, the standard deviation of the layers' true effects, for each kind.
        mean_weight: with the map of shrunk effects, the mean weight of the layers, for each kind: 0 where all
            differences are noise, 1 where none is.
    """

    mean_ratio: float | None = None
    noise_lambda: dict[Kind, float] = field(default_factory=dict)
    tau: dict[Kind, float] = field(default_factory=dict)
    mean_weight: dict[Kind, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MappedRatios:
    """The ratios that follow from a report.

    Attributes:
        ratios: ratio of each layer of the report; 1 for those that take no part.
        members: the layers that take part, by kind: each kind is balanced within itself.
        missing: those of them without the metric that is mapped, which keep ratio 1.
        summary: what the mapping did, over all layers.
    """

    ratios: dict[str, float]
    members: dict[Kind, list[str]]
    missing: list[str] = field(default_factory=list)
    summary: RatioSummary = field(default_factory=RatioSummary)

    @property
    def balanced(self) -> dict[Kind, list[str]]:
        """The layers that take part and have the metric that is mapped, by kind."""
        missing = set(self.missing)
        balanced = {}
        for kind, names in self.members.items():
            balanced[kind] = [name for name in names if name not in missing]
        return balanced


def ratios_of_report(
    report: Report, members: dict[Kind, list[str]], options: RatioOptions, fixed: Mapping[str, float] | None = None
) -> MappedRatios:
    """Map the metric of the layers that take part, each kind within itself.

    Args:
        report: the measurement; with the noise-aware map and with that of shrunk effects, one that holds
            permutation nulls.
        members: names of the layers that take part, by kind.
        options: the map, its options and the metric.
        fixed: ratios of layers that take no part, and keep these.

    Returns:
        The ratio of every layer of the report, and which layers were balanced.

    Raises:
        ValueError: a metric that the map cannot map.
    """
    ratios = dict.fromkeys(report.layers, 1.0)
    missing: list[str] = []
    by_kind: dict[Kind, dict[str, float]] = {}
    for kind, names in members.items():
        values = {name: mapped_metric(report.layers[name], options) for name in names}
        known = {name: value for name, value in values.items() if value is not None}
        missing += [name for name in names if name not in known]
        ratios |= ratios_from(known, options, _errors(report, known))
        by_kind[kind] = known
    if options.normalize == "mean":
        ratios |= _with_mean_one(report, {name: ratios[name] for known in by_kind.values() for name in known})
    ratios |= fixed or {}
    return MappedRatios(ratios, members, missing, _summary(report, by_kind, ratios, options))


def mapped_metric(record: LayerRecord, options: RatioOptions) -> float | None:
    """Return the number of a record that is mapped: its effect, its z-score or its metric, as the map needs.

    None for a layer that has no alpha, or whose small alpha comes of a collapsed spectrum.
    """
    if record.collapsed and options.collapsed == "leave_out":
        return None
    if options.assign_func == "noise_aware":
        return record.z_score
    if options.assign_func == "shrinkage":
        return None if record.effect_error is None else record.effect
    return record.metric(options.metric)


def _with_mean_one(report: Report, ratios: Mapping[str, float]) -> dict[str, float]:
    """Divide ratios by their mean, in which a layer weighs as much as its matrices have entries.

    Args:
        report: the measurement, whose records hold the shapes.
        ratios: ratios of the balanced layers by name; not all of them 0.
    """
    sizes = {name: math.prod(report.layers[name].shape) for name in ratios}
    total = math.fsum(sizes[name] * ratio for name, ratio in ratios.items())
    if total == 0:
        return dict(ratios)
    mean = total / sum(sizes.values())
    return {name: ratio / mean for name, ratio in ratios.items()}


def _errors(report: Report, names: Iterable[str]) -> dict[str, float]:
    """Return the standard error of each layer's effect, where it has one.

    It is at least the deviation of random layers of the same shape. The layer's own error comes of its windows; of
    few windows it is noisy itself, and one that is far too small would make the layer count for sure: over random
    layers of four to nine windows the squared effects are twice their squared errors without this bound.
    """
    errors = {}
    for name in names:
        record = report.layers[name]
        if record.effect_error is not None and record.null_std is not None:
            errors[name] = max(record.effect_error, record.null_std)
    return errors


def _summary(
    report: Report, by_kind: Mapping[Kind, Mapping[str, float]], ratios: Mapping[str, float], options: RatioOptions
) -> RatioSummary:
    """Say what the map made of the numbers of the layers, each kind of layer apart.

    Args:
        report: the measurement.
        by_kind: what was mapped, by kind and name.
        ratios: the ratios that came of it.
        options: the map.
    """
    balanced = [ratios[name] for known in by_kind.values() for name in known]
    # The mean over all kinds together: of the layers, not of the kinds.
    mean = math.fsum(balanced) / len(balanced) if balanced else None
    present = {kind: known for kind, known in by_kind.items() if known}
    if options.assign_func == "noise_aware":
        return RatioSummary(mean, {kind: noise_lambda(list(known.values())) for kind, known in present.items()})
    if options.assign_func != "shrinkage":
        return RatioSummary(mean)
    shrunk = {}
    for kind, known in present.items():
        shrunk[kind] = shrunk_effects(list(known.values()), list(_errors(report, known).values()))
    return RatioSummary(
        mean,
        tau={kind: one.tau for kind, one in shrunk.items()},
        mean_weight={kind: one.mean_weight for kind, one in shrunk.items()},
    )
