"""From a report to the learning-rate ratio of each of its layers: which number of a record is mapped, and by what.

The maps themselves, from numbers to ratios, are in `farms_tb.balancing.ratio_maps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from farms_tb.balancing.assignment import Assignment, with_shared_ratios
from farms_tb.balancing.ratio_maps import noise_lambda, ratios_from
from farms_tb.options import MAPS, Kind, RatioOptions
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
        missing: the layers that take part without the metric that is mapped, which keep ratio 1, or with `permute`
            what they are dealt. With `unit="block"` those of blocks where no layer has it.
        balanced: all others that take part, by kind: each kind is balanced within itself.
        units: how many layers, or blocks with `unit="block"`, take part, by kind.
        summary: what the mapping did, over all layers.
    """

    ratios: dict[str, float]
    missing: list[str]
    balanced: dict[Kind, list[str]]
    units: dict[Kind, int]
    summary: RatioSummary


@dataclass(frozen=True)
class Estimate:
    """What is mapped of a layer or a block.

    Attributes:
        value: the metric, effect or z-score.
        error: its standard error; None where it is unknown.
    """

    value: float
    error: float | None


@dataclass(frozen=True)
class _MappedKind:
    """The layers of one kind, real or complex weights, after the map.

    Attributes:
        units: how many layers, or blocks, take part.
        estimates: what was mapped of each unit that has it.
        ratios: ratio of each layer that gets one.
        missing: layers of the units without an estimate.
    """

    units: int
    estimates: list[Estimate]
    ratios: dict[str, float]
    missing: list[str]


def ratios_of_report(
    report: Report, members: dict[Kind, list[str]], options: RatioOptions, assignment: Assignment
) -> MappedRatios:
    """Map the metric of the layers that take part, or of their blocks, each kind within itself.

    Args:
        report: the measurement; where the map compares with random layers, one that holds permutation nulls.
        members: names of the layers that take part, by kind.
        options: the map, its options and the metric.
        assignment: the blocks of the layers, and ratios of layers that take no part, and keep these.

    Returns:
        The ratio of every layer of the report, and which layers were balanced.

    Raises:
        ValueError: a metric that the map cannot map.
    """
    kinds: dict[Kind, _MappedKind] = {}
    mapped: dict[str, float] = {}
    missing: list[str] = []
    for kind, names in members.items():
        records = {name: report.layers[name] for name in names}
        kinds[kind] = _mapped_kind(records, assignment.blocks, options)
        mapped |= kinds[kind].ratios
        missing += kinds[kind].missing
    without = set(missing)
    balanced = {kind: [name for name in names if name not in without] for kind, names in members.items()}
    units = {kind: one.units for kind, one in kinds.items()}
    if options.normalize == "mean":
        mapped = _with_weighted_mean_one(report, mapped)
    chosen = {**mapped, **assignment.fixed_layers}
    ratios = with_shared_ratios({**dict.fromkeys(report.layers, 1.0), **chosen}, assignment, options, chosen)
    return MappedRatios(ratios, missing, balanced, units, _summary(kinds, mapped, options))


def _mapped_kind(
    records: Mapping[str, LayerRecord], blocks: Mapping[str, str] | None, options: RatioOptions
) -> _MappedKind:
    """Map the layers of one kind that take part, or the blocks that they are in."""
    units = _units(records, blocks)
    estimates = _estimates(records, options)
    known: dict[str, Estimate] = {}
    missing: list[str] = []
    for unit, layers in units.items():
        own = [estimates[name] for name in layers if name in estimates]
        if own:
            known[unit] = _mean(own, options)
        else:
            missing += layers
    values = {unit: one.value for unit, one in known.items()}
    errors = {unit: one.error for unit, one in known.items() if one.error is not None}
    of_units = ratios_from(values, options, errors)
    if options.permute is not None:
        # A placebo deals the ratios out among all units, those without an estimate too.
        of_units = _permuted({**dict.fromkeys(units, 1.0), **of_units}, options.permute)
    ratios = {}
    for unit, ratio in of_units.items():
        ratios.update(dict.fromkeys(units[unit], ratio))
    return _MappedKind(len(units), list(known.values()), ratios, missing)


def _permuted(ratios: Mapping[str, float], seed: int) -> dict[str, float]:
    """Deal ratios out under a permutation that is drawn uniformly from the seed, and is the same at every call."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(ratios), generator=generator, device="cpu").tolist()
    names = list(ratios)
    return {name: ratios[names[place]] for name, place in zip(names, order, strict=True)}


def _units(names: Iterable[str], blocks: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Return the layers of each unit: the block that they are in, or without blocks each layer by itself."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(name if blocks is None else blocks[name], []).append(name)
    return units


def _estimates(records: Mapping[str, LayerRecord], options: RatioOptions) -> dict[str, Estimate]:
    """Return what is mapped of each layer: its effect, its z-score or its metric, as the map needs.

    Layers that have no alpha are left out, and with `collapsed="leave_out"` those whose small alpha comes of a
    collapsed spectrum; none is by the static maps, which look at no alpha.
    """
    takes = MAPS[options.assign_func].takes
    if takes == "nothing":
        return {name: Estimate(0.0, None) for name in records}
    if options.collapsed == "leave_out":
        records = {name: record for name, record in records.items() if not record.collapsed}
    if options.compares_with_random and takes == "effect":
        return _effects(records)
    if options.compares_with_random:
        values = {name: record.z_score for name, record in records.items()}
    else:
        values = {name: record.metric(options.metric) for name, record in records.items()}
    found = {}
    for name, value in values.items():
        if value is not None:
            found[name] = Estimate(value, records[name].alpha_error)
    return found


def _effects(records: Mapping[str, LayerRecord]) -> dict[str, Estimate]:
    """Return the effects of the layers that have one, and their standard errors.

    The standard error is taken as at least the deviation of random layers of the same shape. The layer's own error
    comes of its windows; of few windows it is noisy itself, and one that is far too small would make the layer
    count for sure: over random layers of four to nine windows the squared effects are twice their squared errors
    without this bound.
    """
    found = {}
    for name, record in records.items():
        effect, error = record.effect, record.effect_error
        if effect is not None and error is not None:
            found[name] = Estimate(effect, max(error, record.null_std or 0.0))
    return found


def _mean(estimates: Sequence[Estimate], options: RatioOptions) -> Estimate:
    """Return the mean of the estimates of a unit's layers; one alone is returned as it is.

    The error of the plain mean is sqrt(sum of e_i^2) / n, where e_i are those of the n layers. With
    `block_mean="weighted"`, where every layer has an error above 0, see `_weighted_mean`.
    """
    if len(estimates) == 1:
        return estimates[0]
    values = [one.value for one in estimates]
    errors = [one.error for one in estimates if one.error is not None]
    mean = fmean(values)
    if len(errors) < len(values):
        return Estimate(mean, None)
    if options.block_mean == "weighted" and all(errors):
        return _weighted_mean(values, errors)
    return Estimate(mean, math.hypot(*errors) / len(values))


def _weighted_mean(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    """Return the mean with the weights 1 / e_i^2, whose error is 1 / sqrt(sum of 1 / e_i^2)."""
    weights = [1 / error**2 for error in errors]
    weighted = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
    return Estimate(weighted / math.fsum(weights), 1 / math.sqrt(math.fsum(weights)))


def _with_weighted_mean_one(report: Report, ratios: Mapping[str, float]) -> dict[str, float]:
    """Divide ratios by their mean, in which a layer weighs as much as its matrices have entries."""
    sizes = {name: math.prod(report.layers[name].shape) for name in ratios}
    total = math.fsum(sizes[name] * ratio for name, ratio in ratios.items())
    if total == 0:
        return dict(ratios)
    mean = total / sum(sizes.values())
    return {name: ratio / mean for name, ratio in ratios.items()}


def _summary(
    kinds: Mapping[Kind, _MappedKind], mapped: Mapping[str, float], options: RatioOptions
) -> RatioSummary:
    """Say what the map made of the estimates, of each kind that has any; `mapped` are the ratios of all kinds."""
    # The mean over all kinds together: of the layers, not of the kinds.
    mean_ratio = fmean(mapped.values()) if mapped else None
    if not options.compares_with_random:
        return RatioSummary(mean_ratio)
    known = {kind: one.estimates for kind, one in kinds.items() if one.estimates}
    values = {kind: [one.value for one in own] for kind, own in known.items()}
    if MAPS[options.assign_func].takes == "z-score":
        return RatioSummary(mean_ratio, {kind: noise_lambda(own) for kind, own in values.items()})
    tau: dict[Kind, float] = {}
    mean_weight: dict[Kind, float] = {}
    for kind, own in known.items():
        errors = [one.error for one in own if one.error is not None]
        shrunk = shrunk_effects(values[kind], errors)
        tau[kind], mean_weight[kind] = shrunk.tau, shrunk.mean_weight
    return RatioSummary(mean_ratio, tau=tau, mean_weight=mean_weight)
