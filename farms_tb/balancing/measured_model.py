"""The layers of a model that is trained, and their measurements, now or in the background.

A measurement in the background is begun with the weights of that moment, and finished later, at the end of an
epoch say. Where several processes train one model they share the layers out, so that all of them have to begin,
finish and save together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from farms_tb.balancing.assignment import Assignment, assign
from farms_tb.options import RatioOptions, SpectrumOptions
from farms_tb.report import Report
from farms_tb.spectra.background import BackgroundMeasurement
from farms_tb.spectra.distributed import Team, current_team
from farms_tb.spectra.measure import blank, measure
from farms_tb.spectra.permutation_null import (
    PermutationNull,
    measure_nulls,
    null_seconds,
    with_nulls,
    with_shared_deviations,
)
from farms_tb.warnings import warn_once
from farms_tb.weights.adapters import adapter_problem
from farms_tb.weights.layers import Layer
from farms_tb.weights.names import counted

LONG_NULLS = 60.0
"""Seconds of one core beyond which the measurement of shuffled layers is announced."""


class MeasuredModel:
    """Measures the layers of a model, whose parameters may be replaced meanwhile.

    Args:
        model: the model.
        spectrum_options: how alphas are measured.
        ratio_options: which parameters follow which layer, and whether permutation nulls are needed.
        share: measure each layer on one process only and share the results.

    Attributes:
        model: the model.
        assignment: its layers, and which parameter follows which of them, at the latest measurement.
        compares: whether layers are compared with their permutation nulls. Some maps need it, and it may be set
            for others.

    Raises:
        TypeError: not a module.
        ValueError: no layer to analyse, or a pattern of `exclude` that matches none.
    """

    def __init__(
        self, model: nn.Module, spectrum_options: SpectrumOptions, ratio_options: RatioOptions, share: bool
    ) -> None:
        self.model = model
        self._spectrum_options, self._ratio_options = spectrum_options, ratio_options
        self._share = share
        self.compares = ratio_options.compares_with_random
        self._begun: BackgroundMeasurement | Report | None = None
        # With the shape that each was measured for: a layer may be replaced by one of the same name.
        self._nulls: dict[str, tuple[Hashable, PermutationNull]] = {}
        self.assignment = self._assigned()
        self._signature = _signature(model, self.assignment.layers)
        # Those of the measurement that was begun last.
        self._at_begin = self.assignment, self._signature

    def measure(self, histogram: bool = False) -> Report:
        """Measure every layer now, on all processes together where shared.

        Args:
            histogram: count the ESD of each layer too.
        """
        self.follow_model()
        layers, team = self.assignment.layers, self._team()
        return self._compared(measure(layers, self._spectrum_options, histogram=histogram, team=team))

    def begin(self, histogram: bool = False) -> None:
        """Begin to measure the weights as they are now, in the background.

        Args:
            histogram: count the ESD of each layer too.
        """
        self.follow_model()
        self._at_begin = self.assignment, self._signature
        layers, team = self.assignment.layers, self._team()
        self._begun = BackgroundMeasurement(layers, self._spectrum_options, histogram=histogram, team=team)

    def finish(self) -> Report:
        """Wait for the measurement that was begun.

        Raises:
            RuntimeError: none was begun, or it failed.
        """
        report, self._begun = self.begun_report(), None
        if report is None:
            raise RuntimeError("no measurement was begun: call begin_update() before finish_update()")
        # The report is of the layers of then. The next to follow the model finds those of now.
        self.assignment, self._signature = self._at_begin
        return self._compared(report)

    def begun_report(self) -> Report | None:
        """Wait for the measurement that was begun, if any. It stays begun."""
        if isinstance(self._begun, BackgroundMeasurement):
            self._begun = self._begun.finish()
        return self._begun

    def wait(self) -> None:
        """Wait until no thread of this process measures."""
        if isinstance(self._begun, BackgroundMeasurement):
            self._begun.wait()

    def restore(self, report: Report | None, begun: Report | None) -> None:
        """Continue from a checkpoint, or begin anew.

        Args:
            report: the last measurement, whose permutation nulls stay; None to begin anew.
            begun: a measurement that was begun and not yet finished.
        """
        self._nulls, self._begun = {}, begun
        self._at_begin = self.assignment, self._signature
        if report is None:
            return
        for name, shape in self._shapes(report).items():
            null = PermutationNull.of(report.layers[name])
            if null is not None:
                self._nulls[name] = shape, null

    def follow_model(self) -> None:
        """Find the layers again if parameters were replaced, or adapters merged."""
        if self._signature != _signature(self.model, self.assignment.layers):
            self.assignment = self._assigned()
            self._signature = _signature(self.model, self.assignment.layers)

    def _assigned(self) -> Assignment:
        spectrum = self._spectrum_options
        return assign(self.model, self._ratio_options, embeddings=spectrum.embeddings, adapters=spectrum.adapters)

    def _team(self) -> Team | None:
        return current_team() if self._share else None

    def _compared(self, report: Report) -> Report:
        """Where layers are compared, add the permutation null of each, and measure those that are missing."""
        if not self.compares:
            return report
        # Once for each layer, from the first weights that have an alpha: its permutation null stays as long as the
        # layer has its shape. Those of layers that are gone go with them.
        shapes = self._shapes(report)
        known = {name: null for name, (shape, null) in self._nulls.items() if shapes.get(name) == shape}
        report = with_nulls(report, known)
        self._announce_long_nulls(report)
        # Without traps, which would be those of the first weights and say nothing of the present ones.
        found = measure_nulls(
            self.assignment.layers, report, self._spectrum_options, traps=False, team=self._team()
        )
        new = {name: null for name, null in found.items() if name not in known}
        shared = with_shared_deviations(known | new, report)
        nulls = known | {name: shared[name] for name in new}
        self._nulls = {name: (shapes[name], null) for name, null in nulls.items()}
        return with_nulls(report, nulls)

    def _shapes(self, report: Report) -> dict[str, Hashable]:
        """Return what the permutation null of each layer depends on, besides its entries and the options."""
        # The sampling tells a 1x1 convolution from a linear layer of its shape.
        samplings = {layer.name: layer.sampling for layer in self.assignment.layers}
        return {name: (record.shape, record.kind, samplings.get(name)) for name, record in report.layers.items()}

    def _announce_long_nulls(self, report: Report) -> None:
        """Warn, before the time is spent, where shuffled layers of a large model take long on a processor."""
        missing = [
            layer
            for layer in self.assignment.layers
            if report.layers[layer.name].null_mean is None and report.layers[layer.name].alpha is not None
        ]
        seconds = sum(null_seconds(blank(layer), self._spectrum_options, traps=False) for layer in missing)
        on_processor = all(parameter.device.type == "cpu" for parameter in self.model.parameters())
        if not on_processor or seconds < LONG_NULLS:
            return
        layers = counted(len(missing), "layer")
        warn_once(
            f"to compare {layers} with random ones, their shuffled entries are measured once, now: "
            f"about {math.ceil(seconds / 60)} min of one CPU core. preset='farms' maps alphas without that, and "
            "preset='monitor' maps nothing",
            self.model,
        )


def _signature(model: nn.Module, layers: Sequence[Layer]) -> list[tuple[str, int, bool] | str]:
    """Return what changes when parameters are replaced or renamed, and when adapters can no longer be measured.

    A lazy parameter stays the same object when it gets values, a parameter that is parametrized when it gets
    another name, and a weight when adapters are merged into it.
    """
    signature: list[tuple[str, int, bool] | str] = []
    for name, parameter in model.named_parameters():
        signature.append((name, id(parameter), is_lazy(parameter)))
    adapted = [layer for layer in layers if layer.is_adapted]
    signature += [adapter_problem(layer.module, layer.adapters) for layer in adapted]
    return signature
