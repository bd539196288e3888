"""A model with the optimizers that train it: ratios of layers become learning rates of parameters.

After a measurement `map_ratios` asks which parameters are trained and maps the report to the ratios of the layers;
`follow` applies them and says what a user should know. What the model and its optimizers hold is looked up anew
each time: parameters may be frozen, replaced or handed to an optimizer between two measurements. A parameter that
takes the place of another between two steps has the ratio of its name from its first step on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from farms_tb.balancing.assignment import Assignment, members, ratios_of_parameters, trained_layers
from farms_tb.balancing.measured_model import MeasuredModel
from farms_tb.balancing.optimizers import BalancedOptimizers
from farms_tb.balancing.ratio_warnings import RatioWarnings
from farms_tb.balancing.report_ratios import MappedRatios, ratios_of_report
from farms_tb.balancing.step_groups import StepGroup, lrs_of_layers, step_groups
from farms_tb.balancing.targets import Ratio, scale_of, weakened
from farms_tb.balancing.verdict_warnings import VerdictWarnings
from farms_tb.options import RatioOptions
from farms_tb.report import Report
from farms_tb.weights.layers import named_parameters


class AttachedModel:
    """Applies the ratios of a model's layers to the optimizers that train it, until it is detached.

    Args:
        measured: the model, whose layers are measured.
        optimizers: the optimizers that train it.
        options: how alphas become ratios.

    Attributes:
        measured: the model, whose layers are measured.
        model: the model itself.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: none of the layers has a parameter in an optimizer, or an optimizer cannot have layer-wise
            learning rates.
    """

    def __init__(self, measured: MeasuredModel, optimizers: Sequence[Optimizer], options: RatioOptions) -> None:
        self.measured, self.model = measured, measured.model
        self._options = options
        self._warnings = RatioWarnings(measured.model, options)
        self._verdict_warnings = VerdictWarnings(measured.model)
        self._applied: tuple[Mapping[str, float], float] = ({}, 1.0)
        # Ratios go by the `id` of a parameter, which another object may get once the parameter is freed.
        self._kept_alive: list[Tensor] = []
        self._optimizers = BalancedOptimizers(optimizers, options, self._apply_again)
        self._optimizers.attach(measured.assignment.layers)

    @property
    def assignment(self) -> Assignment:
        """The layers of the model, and which parameter follows which of them."""
        return self.measured.assignment

    def map_ratios(self, report: Report) -> MappedRatios:
        """Return the ratios that follow from a report.

        Args:
            report: the measurement of the present layers.

        Raises:
            ValueError: a metric that the map cannot map.
        """
        by_kind = members(self.assignment, self._options, self._trained())
        mapped = ratios_of_report(report, by_kind, self._options, self.assignment)
        return replace(mapped, trained=self.trained_layers())

    def follow(self, report: Report, mapped: MappedRatios, strength: float, *, initial: bool) -> None:
        """Let the next steps use the ratios that follow from a measurement, and warn of what a user should know.

        Args:
            report: the measurement.
            mapped: the ratios that follow from it.
            strength: share of the ratios that applies, as in `LayerBalancer`.
            initial: whether these may be initial weights, whose alphas are all noise: that is not worth a warning.
        """
        self._optimizers.follow(self._scales(mapped.ratios, strength), self.model)
        self._warnings.about(report, mapped, initial=initial)
        self._verdict_warnings.about(report, mapped.trained, mapped.missing)

    def apply(self, ratios: Mapping[str, float], strength: float) -> None:
        """Let the next steps use other ratios of the layers, or the same at another strength.

        Args:
            ratios: ratio of each layer by name.
            strength: share of the ratios that applies.
        """
        self._optimizers.apply(self._scales(ratios, strength))

    def _apply_again(self) -> None:
        """Apply the same ratios, where the optimizers hold parameters that they did not hold before."""
        self.apply(*self._applied)

    def _scales(self, ratios: Mapping[str, float], strength: float) -> dict[int, Ratio]:
        """Return what the ratios of the layers scale of each parameter, by the parameter's `id`.

        Args:
            ratios: ratio of each layer by name.
            strength: share of the ratios that applies.

        Returns:
            An entry for every parameter of the model and of the optimizers.
        """
        self._applied = (ratios, strength)
        assignment, parameters = self.assignment, named_parameters(self.model)
        own = ratios_of_parameters(parameters, assignment, ratios, self._options)
        applied = weakened(own, strength)
        held = self._optimizers.parameters()
        self._kept_alive = [*held, *parameters.values()]
        scales: dict[int, Ratio] = dict.fromkeys(map(id, held), 1.0)
        for name, parameter in parameters.items():
            scales[id(parameter)] = scale_of(applied[name], self._options)
        return scales

    def parameter_ratios(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Return the ratio of each parameter by name, given those of the layers."""
        return ratios_of_parameters(named_parameters(self.model), self.assignment, ratios, self._options)

    def param_groups(self, optimizer: Optimizer | None = None) -> list[StepGroup]:
        """Return the groups that an optimizer really steps with.

        Args:
            optimizer: one of those that train the model; None for all of them.

        Raises:
            ValueError: the optimizer is not one of those that train the model.
        """
        return step_groups(self.model, self.assignment, self._optimizers.groups(optimizer))

    def layer_lrs(self) -> dict[str, float]:
        """Return the current learning rate of each layer that is trained."""
        return lrs_of_layers(self.assignment, self.param_groups(), self._trained())

    def trained_layers(self) -> list[str]:
        """Return the names of the layers with a parameter that an optimizer trains: frozen ones do not count."""
        return [layer.name for layer in trained_layers(self.assignment.layers, self._trained())]

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that an optimizer trains now, by name."""
        return self._optimizers.trained(named_parameters(self.model))

    def detach(self) -> None:
        """Give the optimizers back as they were, and wait until no thread measures."""
        self._optimizers.detach()
        self._kept_alive = []
        self.measured.wait()
