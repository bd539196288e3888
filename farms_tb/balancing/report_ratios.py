"""From a report to the learning-rate ratio of each of its layers: which number of a record is mapped, and by what.

The maps themselves, from numbers to ratios, are in `farms_tb.balancing.ratio_maps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from farms_tb.balancing.assignment import Assignment
from farms_tb.balancing.ratio_maps import noise_lambda, ratios_from
from farms_tb.options import Kind, RatioOptions
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.random_effects import shrunk_effects


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

    def at(self, strength: float) -> RatioSummary:
        """Return the summary of the ratios 1 + s (r - 1), for a strength s."""
        mean = None if self.mean_ratio is None else 1 + strength * (self.mean_ratio - 1)
        return replace(self, mean_ratio=mean)


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


@dataclass(frozen=True)
class Estimate:
    """What is mapped of a layer or a block.

    Attributes:
        value: the metric, effect or z-score.
        error: its standard error; None where it is unknown.
    """

    value: float
    error: float | None


def ratios_of_report(
    report: Report, members: dict[Kind, list[str]], options: RatioOptions, assignment: Assignment | None = None
) -> MappedRatios:
    """Map the metric of the layers that take part, or of their blocks, each kind within itself.

    Args:
        report: the measurement; with the noise-aware map and with that of shrunk effects, one that holds
            permutation nulls.
        members: names of the layers that take part, by kind.
        options: the map, its options and the metric.
        assignment: the blocks of the layers, and ratios of layers that take no part, and keep these.

    Returns:
        The ratio of every layer of the report, and which layers were balanced.

    Raises:
        ValueError: a metric that the map cannot map.
    """
    ratios = dict.fromkeys(report.layers, 1.0)
    missing: list[str] = []
    by_kind: dict[Kind, dict[str, Estimate]] = {}
    mapped: dict[str, float] = {}
    for kind, names in members.items():
        units = _units(names, None if assignment is None else assignment.blocks)
        estimates = _estimates({name: report.layers[name] for name in names}, options)
        known = {}
        for unit, layers in units.items():
            of_unit = [estimates[name] for name in layers if name in estimates]
            if of_unit:
                known[unit] = _mean(of_unit, options)
        values = {unit: estimate.value for unit, estimate in known.items()}
        errors = {unit: estimate.error for unit, estimate in known.items() if estimate.error is not None}
        of_units = dict.fromkeys(units, 1.0) | ratios_from(values, options, errors)
        if options.permute is not None:
            of_units = _permuted(of_units, options.permute)
        for unit, layers in units.items():
            if unit in known or options.permute is not None:
                mapped.update(dict.fromkeys(layers, of_units[unit]))
            if unit not in known:
                missing += layers
        by_kind[kind] = known
    if options.normalize == "mean":
        mapped = _with_mean_one(report, mapped)
    # The mean over all kinds together: of the layers, not of the kinds.
    mean = math.fsum(mapped.values()) / len(mapped) if mapped else None
    ratios |= mapped
    if assignment is not None:
        ratios |= assignment.fixed_layers
    return MappedRatios(ratios, members, missing, _summary(by_kind, mean, options))


def _permuted(ratios: Mapping[str, float], seed: int) -> dict[str, float]:
    """Deal ratios out under a permutation that is drawn uniformly from the seed, and is the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ratios), generator=generator).tolist()
    names = list(ratios)
    return {name: ratios[names[place]] for name, place in zip(names, order, strict=True)}


def _units(names: Iterable[str], blocks: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Return the layers of each unit: a layer, or the block that layers are in.

    Args:
        names: layers that take part.
        blocks: the block of each of them; None where layers are units by themselves.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(name if blocks is None else blocks[name], []).append(name)
    return units


def _estimates(records: Mapping[str, LayerRecord], options: RatioOptions) -> dict[str, Estimate]:
    """Return what is mapped of each layer: its effect, its z-score or its metric, as the map needs.

    Layers that have no alpha are left out, and those whose small alpha comes of a collapsed spectrum.

    The standard error of an effect is taken as at least the deviation of random layers of the same shape. The
    layer's own error comes of its windows; of few windows it is noisy itself, and one that is far too small would
    make the layer count for sure: over random layers of four to nine windows the squared effects are twice their
    squared errors without this bound.
    """
    if options.collapsed == "leave_out":
        records = {name: record for name, record in records.items() if not record.collapsed}
    errors = {name: record.alpha_error for name, record in records.items()}
    if options.assign_func == "shrinkage":
        records = {name: record for name, record in records.items() if record.effect_error is not None}
        values = {name: record.effect for name, record in records.items()}
        errors = {
            name: max(record.effect_error or 0.0, record.null_std or 0.0) for name, record in records.items()
        }
    elif options.assign_func == "noise_aware":
        values = {name: record.z_score for name, record in records.items()}
    else:
        values = {name: record.metric(options.metric) for name, record in records.items()}
    return {name: Estimate(value, errors[name]) for name, value in values.items() if value is not None}


def _mean(estimates: Sequence[Estimate], options: RatioOptions) -> Estimate:
    """Return the mean of the estimates of a unit's layers, one or more.

    Plain: the mean of the values, whose error is sqrt(sum of e_i^2) / n. Weighted: with the weights 1 / e_i^2,
    whose error is 1 / sqrt(sum of 1 / e_i^2).
    """
    if len(estimates) == 1:
        return estimates[0]
    errors = [one.error for one in estimates if one.error]
    if options.block_mean == "weighted" and len(errors) == len(estimates):
        weights = [1 / error**2 for error in errors]
        weighted = math.fsum(weight * one.value for weight, one in zip(weights, estimates, strict=True))
        return Estimate(weighted / math.fsum(weights), 1 / math.sqrt(math.fsum(weights)))
    mean = math.fsum(one.value for one in estimates) / len(estimates)
    known = [one.error for one in estimates if one.error is not None]
    error = math.hypot(*known) / len(estimates) if len(known) == len(estimates) else None
    return Estimate(mean, error)


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


def _summary(
    by_kind: Mapping[Kind, Mapping[str, Estimate]], mean_ratio: float | None, options: RatioOptions
) -> RatioSummary:
    """Say what the map made of the estimates, each kind of layer apart.

    Args:
        by_kind: what was mapped, by kind and unit.
        mean_ratio: the mean ratio that came of it.
        options: the map.
    """
    values = {kind: [one.value for one in known.values()] for kind, known in by_kind.items() if known}
    if options.assign_func == "noise_aware":
        return RatioSummary(mean_ratio, {kind: noise_lambda(own) for kind, own in values.items()})
    if options.assign_func != "shrinkage":
        return RatioSummary(mean_ratio)
    shrunk = {}
    for kind, own in values.items():
        errors = [one.error for one in by_kind[kind].values() if one.error is not None]
        shrunk[kind] = shrunk_effects(own, errors)
    return RatioSummary(
        mean_ratio,
        tau={kind: one.tau for kind, one in shrunk.items()},
        mean_weight={kind: one.mean_weight for kind, one in shrunk.items()},
    )
