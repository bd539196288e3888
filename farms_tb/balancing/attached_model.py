"""A model with the optimizers that train it: ratios of layers become learning rates of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.assignment import Assignment, members, ratios_of_parameters
from farms_tb.balancing.measured_model import MeasuredModel
from farms_tb.balancing.optimizers import BalancedOptimizers
from farms_tb.balancing.ratio_warnings import RatioWarnings
from farms_tb.balancing.report_ratios import MappedRatios, ratios_of_report
from farms_tb.balancing.step_groups import StepGroup, lrs_of_layers, step_groups
from farms_tb.balancing.verdict_warnings import VerdictWarnings
from farms_tb.options import RatioOptions
from farms_tb.report import Report


class AttachedModel:
    """Applies the ratios of a model's layers to the optimizers that train it, until it is detached.

    Args:
        measured: the model, whose layers are measured.
        optimizers: the optimizers that train it.
        options: how alphas become ratios.

    Attributes:
        measured: the model, whose layers are measured.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: none of the layers has a parameter in an optimizer, or an optimizer cannot have layer-wise
            learning rates.
    """

    def __init__(self, measured: MeasuredModel, optimizers: Sequence[Optimizer], options: RatioOptions) -> None:
        self.measured = measured
        self._options = options
        self._warnings = RatioWarnings(measured.model, options)
        self._verdict_warnings = VerdictWarnings(measured.model)
        self._optimizers = BalancedOptimizers(optimizers, options)
        self._optimizers.attach(measured.assignment.layers)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.measured.model

    @property
    def assignment(self) -> Assignment:
        """The layers of the model, and which parameter follows which of them."""
        return self.measured.assignment

    def map_ratios(self, report: Report) -> MappedRatios:
        """Return the ratios that follow from a report."""
        trained = self._optimizers.trained(self.model)
        by_kind = members(self.assignment, self._options, trained)
        return ratios_of_report(report, by_kind, self._options, self.assignment)

    def warn_of_unseen_steps(self) -> None:
        """Warn where the model was trained since the last call by steps without layer-wise learning rates."""
        self._optimizers.warn_of_unseen_steps(self.model)

    def warn_about(self, report: Report, mapped: MappedRatios, *, initial: bool) -> None:
        """Warn of what a user should know of ratios that were just applied.

        Args:
            report: the measurement.
            mapped: the ratios that follow from it.
            initial: whether these may be initial weights, whose alphas are all noise: that is not worth a warning.
        """
        self._warnings.about(report, mapped)
        self._verdict_warnings.about(report, self._trained_layers(), mapped.missing)
        if not initial:
            self._warnings.about_noise(report, mapped)

    def _trained_layers(self) -> list[str]:
        trained = self._optimizers.trained(self.model).keys()
        return [layer.name for layer in self.assignment.layers if not trained.isdisjoint(layer.parameters)]

    def apply(self, ratios: Mapping[str, float]) -> None:
        """Let the next steps use these ratios of the parameters by name."""
        self._optimizers.apply(self.model, ratios)

    def parameter_ratios(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Return the ratio of each parameter by name, given those of the layers."""
        return ratios_of_parameters(self.model, self.assignment, ratios, self._options)

    def param_groups(self, optimizer: Optimizer | None = None) -> list[StepGroup]:
        """Return the groups that an optimizer really steps with, or all optimizers.

        Raises:
            ValueError: the optimizer is not one of those that train the model.
        """
        return step_groups(self.model, self.assignment, self._optimizers.groups(optimizer))

    def layer_lrs(self) -> dict[str, float]:
        """Return the current learning rate of each layer that is trained."""
        return lrs_of_layers(self.assignment, self.param_groups(), self._optimizers.trained(self.model))

    def detach(self) -> None:
        """Give the optimizers back as they were, and wait until no thread measures."""
        self._optimizers.detach()
        self.measured.wait()
