"""What a user should know of the ratios that were just applied: each is said once.

Without the noise-aware map, ratios follow differences of alpha that may be sampling noise, or the bias of a small
layer. And some settings leave nothing to balance, or give a layer a rate that is far from the one that was tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from farms_tb.balancing.ratio_maps import MappedRatios, only_measures
from farms_tb.options import RatioOptions
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
        self._said: set[str] = set()

    def about(self, report: Report, mapped: MappedRatios) -> None:
        """Warn where nothing is balanced, a layer has no metric, or a ratio is large."""
        missing = self._new(mapped.missing)
        if missing:
            reasons = "; ".join(f"{name}: {_reason(report.layers[name])}" for name in missing)
            self._warn(f"layers with no {self._options.metric} keep the base learning rate: {reasons}")
        if not only_measures(self._options):
            self._about_few_layers(mapped)
        large = max(mapped.ratios, key=mapped.ratios.__getitem__, default=None)
        if large is not None and mapped.ratios[large] > LARGE_RATIO and self._new(["large ratio"]):
            self._warn(
                f"the learning rate of {large} is {mapped.ratios[large]:.3g} times the base learning rate: "
                "training may diverge. lr_max_ratio, sigmoid_max and sigmoid_min set the range of the ratios"
            )

    def about_noise(self, report: Report, mapped: MappedRatios) -> None:
        """Warn where the ratios rest on noise. Not meant for initial weights, whose alphas are all noise."""
        if self._options.assign_func == "noise_aware" or self._options.metric != "alpha":
            return
        for names in mapped.balanced.values():
            if len({mapped.ratios[name] for name in names}) > 1:
                self._about_sampling_noise([report.layers[name] for name in names])
                self._about_single_matrix({name: report.layers[name] for name in names}, mapped)

    def _about_few_layers(self, mapped: MappedRatios) -> None:
        numbers = [len(names) for names in mapped.members.values()]
        if max(numbers, default=0) > 1 or not self._new(["few layers"]):
            return
        left = "no layer is" if sum(numbers) == 0 else "only one layer of a kind is"
        self._warn(
            f"{left} left to balance, so every layer keeps the base learning rate: see exclude, exclude_first, "
            "exclude_last, balance, and which parameters the optimizer trains"
        )

    def _about_sampling_noise(self, records: Sequence[LayerRecord]) -> None:
        share = _noise_share(records)
        if share > 0.5 and self._new(["noise"]):
            self._warn(
                f"{share:.0%} of the variance of alpha between the layers is sampling noise, so the learning "
                "rates mostly follow noise. Consider assign_func='noise_aware'"
            )

    def _about_single_matrix(self, records: dict[str, LayerRecord], mapped: MappedRatios) -> None:
        top = max(records, key=lambda name: records[name].alpha or 0.0)
        others_are_stacks = not all(map(_is_single, records.values()))
        if _is_single(records[top]) and others_are_stacks and self._new([f"single matrix {top}"]):
            self._warn(
                f"{top} has the largest alpha and is a single matrix, which reads higher than a stack of several "
                f"that is as random. The mean ratio is {mapped.summary.mean_ratio or 1.0:.2f}. "
                "assign_func='noise_aware' compares each layer with random layers of its shape"
            )

    def _new(self, topics: Sequence[str]) -> list[str]:
        """Return those topics that were not warned about yet, and note them."""
        new = [topic for topic in topics if topic not in self._said]
        self._said.update(new)
        return new

    def _warn(self, message: str) -> None:
        warn_once(message, self._model)


def _reason(record: LayerRecord) -> str:
    """Say why a layer has no value to map."""
    return record.status if record.status != OK else "its permutation null has no alpha to compare with"


def _noise_share(records: Sequence[LayerRecord]) -> float:
    """Return the share of the variance of alpha over the layers that sampling noise explains.

    The mean of the squared standard errors over the sample variance of the alphas, at most 1; 0 if it is unknown.
    """
    alphas = [record.alpha for record in records if record.alpha is not None]
    errors = [record.alpha_error for record in records if record.alpha_error is not None]
    if len(alphas) < 2 or not errors:
        return 0.0
    mean = math.fsum(alphas) / len(alphas)
    variance = math.fsum((alpha - mean) ** 2 for alpha in alphas) / (len(alphas) - 1)
    noise = math.fsum(error**2 for error in errors) / len(errors)
    return min(1.0, noise / variance) if variance > 0 else 0.0


def _is_single(record: LayerRecord) -> bool:
    """Tell whether a layer has one window alone: a 1x1 convolution, or a linear layer of a window's size."""
    return bool(record.shape) and record.shape[0] == 1 and record.num_eigenvalues <= record.shape[1]
