"""What a user should know of the ratios that were just applied: each is said once.

Without a map that compares layers with random ones, ratios follow differences of alpha that may be sampling noise,
or the bias of a small layer. And some settings leave nothing to balance, or give a layer a rate that is far from
the one that was tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, variance

from torch import nn

from farms_tb.balancing.report_ratios import MappedRatios
from farms_tb.options import MAPS, RatioOptions
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.warnings import warn_once

LARGE_RATIO = 10.0
"""A ratio above it is worth a warning: the scheduler's learning rate was hardly tuned for it."""


class RatioWarnings:
    """Warns about ratios, of each layer once.

    Args:
        model: what the warnings are about.
        options: how alphas become ratios.
    """

    def __init__(self, model: nn.Module, options: RatioOptions) -> None:
        self._model, self._options = model, options
        self._maps_nothing = options.maps_nothing
        self._follows_single_alphas = _follows_single_alphas(options)
        self._scaled = "weight decay" if options.target == "weight_decay" else "learning rate"
        self._said: set[str] = set()

    def warn(self, report: Report, mapped: MappedRatios, *, initial: bool) -> None:
        """Warn where nothing is balanced, a layer has no metric, a ratio is large, or ratios rest on noise.

        Args:
            report: the measurement.
            mapped: the ratios that follow from it.
            initial: whether these may be initial weights, whose alphas are all noise: then that is no warning.
        """
        self._about_missing(report, mapped)
        if not self._maps_nothing:
            self._about_few_layers(mapped)
        self._about_large_ratio(mapped.ratios)
        if self._follows_single_alphas and not initial:
            self._about_noise(report, mapped)

    def _about_noise(self, report: Report, mapped: MappedRatios) -> None:
        """Warn where differences of alpha that ratios follow are sampling noise, or the bias of a small layer."""
        # Each kind of layer is balanced, and so looked at, by itself.
        for names in mapped.balanced.values():
            ratios = {mapped.ratios[name] for name in names}
            if len(ratios) < 2:
                continue
            records = {name: report.layers[name] for name in names}
            self._about_sampling_noise(list(records.values()))
            self._about_single_matrix(records, mapped)

    def _about_missing(self, report: Report, mapped: MappedRatios) -> None:
        """Name the layers that take part and have no value to map, with the reason of each."""
        new = self._new(mapped.missing)
        if not new:
            return
        reasons = "; ".join(f"{name}: {_reason(report.layers[name])}" for name in new)
        kept = f"keep the base {self._scaled}"
        if any(mapped.ratios[name] != 1.0 for name in new):
            kept += ", or have the mean ratio of the layers that are one parameter with them"
        if self._options.permute is not None:
            kept = "are dealt a ratio all the same"
        self._warn(f"layers with no {self._options.metric} {kept}: {reasons}")

    def _about_large_ratio(self, ratios: Mapping[str, float]) -> None:
        """Warn, once, of the largest ratio of learning rates where it is above `LARGE_RATIO`."""
        if self._options.target == "weight_decay":
            return
        largest = max(ratios, key=ratios.__getitem__)
        if ratios[largest] <= LARGE_RATIO or not self._new(["large ratio"]):
            return
        self._warn(
            f"the learning rate of {largest} is {ratios[largest]:.3g} times the base learning rate: training may "
            "diverge. lr_max_ratio, sigmoid_max and sigmoid_min set the range of the ratios"
        )

    def _about_few_layers(self, mapped: MappedRatios) -> None:
        """Warn, once, where no kind has two layers, or blocks, that could differ."""
        numbers = mapped.units.values()
        if max(numbers, default=0) > 1 or not self._new(["few layers"]):
            return
        unit = self._options.unit
        left = f"only one {unit} of a kind is" if any(numbers) else "no layer is"
        self._warn(
            f"{left} left to balance, so every layer keeps the base {self._scaled}: see exclude, exclude_first, "
            "exclude_last, balance, and which parameters the optimizer trains"
        )

    def _about_sampling_noise(self, records: Sequence[LayerRecord]) -> None:
        """Warn, once, where most of the variance of alpha between layers is sampling noise."""
        share = _noise_share(records)
        if share > 0.5 and self._new(["noise"]):
            self._warn(
                f"{share:.0%} of the variance of alpha between the layers is sampling noise, so the "
                f"{self._scaled}s mostly follow noise. Consider assign_func='shrinkage'"
            )

    def _about_single_matrix(self, records: dict[str, LayerRecord], mapped: MappedRatios) -> None:
        """Warn where the largest alpha is that of a single matrix among stacks, and so biased upwards."""
        top = max(records, key=lambda name: records[name].alpha or 0.0)
        some_are_stacks = not all(map(_is_single, records.values()))
        is_biased = _is_single(records[top]) and some_are_stacks
        if not is_biased or not self._new([f"single matrix {top}"]):
            return
        self._warn(
            f"{top} has the largest alpha and is a single matrix, which reads higher than a stack of several "
            f"that is as random. The mean ratio is {mapped.summary.mean_ratio or 1.0:.2f}. "
            "assign_func='shrinkage' compares each layer with random layers of its shape"
        )

    def _new(self, topics: Sequence[str]) -> list[str]:
        """Return those topics that were not warned about yet, and note them."""
        new = [topic for topic in topics if topic not in self._said]
        self._said.update(new)
        return new

    def _warn(self, message: str) -> None:
        warn_once(message, self._model)


def _follows_single_alphas(options: RatioOptions) -> bool:
    """Return whether ratios follow the alpha of each layer, noise included."""
    if MAPS[options.assign_func].takes not in ("metric", "alpha"):
        return False
    # Only alpha has a standard error; means over blocks have less noise, and a placebo follows nothing.
    return options.metric == "alpha" and options.unit == "layer" and options.permute is None


def _reason(record: LayerRecord) -> str:
    """Say why a layer has no value to map: it has no alpha, or nothing to compare its alpha with."""
    if record.status != OK:
        return record.status
    return "its permutation null has no alpha to compare with"


def _noise_share(records: Sequence[LayerRecord]) -> float:
    """Return the share of the variance of alpha over the layers that sampling noise explains.

    The mean of the squared standard errors over the sample variance of the alphas, at most 1:
    (sum_i e_i^2 / n) / (sum_i (a_i - mean a)^2 / (n - 1)). 0 where it is unknown.
    """
    alphas = [record.alpha for record in records if record.alpha is not None]
    errors = [record.alpha_error for record in records if record.alpha_error is not None]
    if len(alphas) < 2 or not errors:
        return 0.0
    of_alphas = variance(alphas)
    if of_alphas == 0:
        return 0.0
    return min(1.0, fmean(error**2 for error in errors) / of_alphas)


def _is_single(record: LayerRecord) -> bool:
    """Return whether a layer has one window alone: a 1x1 convolution, or a linear layer of a window's size."""
    if not record.shape:
        return False
    matrices, rows = record.shape[:2]
    return matrices == 1 and record.num_eigenvalues <= rows
