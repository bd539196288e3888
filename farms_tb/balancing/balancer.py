"""From a model and its optimizers to the learning rate of every parameter.

`LayerBalancer` holds the layers, their ratios and the optimizers, and calls the steps of the method in order: a
measurement gives a record for each layer (`farms_tb.spectra`), `ratio_maps` turns records into ratios,
`assignment` says which parameter takes which ratio, and `layerwise_step` lets the optimizers step with them.
`TempBalance` and the trainers' callbacks drive it.

Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.assignment import members, ratios_of_parameters
from farms_tb.balancing.measured_model import MeasuredModel
from farms_tb.balancing.optimizers import BalancedOptimizers
from farms_tb.balancing.ratio_maps import MappedRatios, RatioSummary, only_measures, ratios_of_report
from farms_tb.balancing.ratio_warnings import RatioWarnings
from farms_tb.balancing.split_groups import SplitGroup
from farms_tb.balancing.state import BalancerState, read_state, state_changes, write_state
from farms_tb.options import RatioOptions, SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import Layer, clean_name, unwrap

_DETACHED = (
    "this balancer is a copy, or was pickled, and is detached from its model and optimizers: report, ratios and "
    "parameter_ratios() can be read. Make a new one to balance"
)


@dataclass(frozen=True)
class StepGroup:
    """A param group that the optimizer really steps with.

    Attributes:
        group: index of the user's param group that it is part of.
        layers: names of the measured layers among its parameters.
        parameters: names of the parameters.
        ratio: learning-rate ratio of all of them.
        lr: learning rate of all of them now, the user's (or the scheduler's) lr * ratio. None where the optimizer
            chooses its learning rate by itself, which is possible if it is only measured.
    """

    group: int
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    ratio: float
    lr: float | None


class LayerBalancer:
    """Measure the layers of a model and give each its learning rate.

    A copy, or one that was pickled, keeps the report and the ratios and is detached from the model.

    Args:
        model: the model that is trained.
        optimizers: the optimizers that train it; each gets layer-wise learning rates until `detach`.
        spectrum_options: how alphas are measured.
        ratio_options: how alphas become learning-rate ratios.
        share: measure each layer on one process only and share the results.

    Attributes:
        report: the latest measurement; None before the first.
        ratios: current learning-rate ratio of each layer by name.
        summary: what the latest mapping of a report to ratios did, over all layers.

    Raises:
        TypeError: not a module, or not a torch optimizer.
        ValueError: no layer to analyse, none of its parameters in an optimizer, a pattern of `exclude` that
            matches nothing, or an optimizer that cannot have layer-wise learning rates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        spectrum_options: SpectrumOptions,
        ratio_options: RatioOptions,
        share: bool = False,
    ) -> None:
        self.spectrum_options, self.ratio_options = spectrum_options, ratio_options
        self.report: Report | None = None
        self.summary = RatioSummary()
        self._copied_ratios: dict[str, float] = {}
        self._attached: MeasuredModel | None = MeasuredModel(unwrap(model), spectrum_options, ratio_options, share)
        self._warnings = RatioWarnings(unwrap(model), ratio_options)
        self.ratios = dict.fromkeys((layer.name for layer in self.layers), 1.0)
        self._optimizers = BalancedOptimizers(optimizers, only_measure=only_measures(ratio_options))
        self._optimizers.attach(self.layers)

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers of the model."""
        return self._measured.assignment.layers

    def measure(self, histogram: bool = False) -> Report:
        """Measure every layer, on all processes together where shared; ratios stay as they are."""
        self.report = self._measured.measure(histogram)
        return self.report

    def update(self, histogram: bool = False) -> Report:
        """Measure, and apply the ratios that follow."""
        first = self.report is None
        return self._follow(self.measure(histogram), first)

    def begin_update(self, histogram: bool = False) -> None:
        """Begin to measure the weights as they are now, in the background."""
        self._measured.begin(histogram)

    def finish_update(self) -> Report:
        """Wait for the measurement that was begun, and apply the ratios that follow."""
        first = self.report is None
        self.report = self._measured.finish()
        return self._follow(self.report, first)

    def map_ratios(self, report: Report) -> MappedRatios:
        """Return the ratios that follow from a report; the place for a subclass with other ratios."""
        trained = self._optimizers.trained(self._measured.model)
        return ratios_of_report(report, members(self.layers, self.ratio_options, trained), self.ratio_options)

    def parameter_ratios(self) -> dict[str, float]:
        """Return the current ratio of each parameter of the model by name."""
        if self._attached is None:
            return dict(self._copied_ratios)
        followed = self._attached.assignment.followed
        return ratios_of_parameters(self._attached.model, followed, self.ratios, self.ratio_options)

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with.

        Raises:
            ValueError: the optimizer is not one that is balanced here.
        """
        return _step_groups(self._measured, self._optimizers.groups(optimizer))

    def layer_lrs(self) -> dict[str, float]:
        """Return the current learning rate of each layer that is trained."""
        return _layer_lrs(self._measured, self._optimizers)

    def detach(self) -> None:
        """Give the optimizers back as they were. Reports and ratios stay readable."""
        if self._attached is not None:
            self._optimizers.detach()
            self._attached.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values.

        A measurement that was begun is waited for, on every process that takes part in it.
        """
        options = as_plain(self.spectrum_options, self.ratio_options)
        return write_state(BalancerState(options, self.ratios, self.report, self._measured.begun_report()))

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Apply the saved ratios.

        Returns:
            Whether the state fits. False where the options or the layers are others now, after a warning that
            names them: the layers that remain keep their saved ratios until they are measured again.

        Raises:
            ValueError: not a state of this class, one of a newer version, or a damaged one. Nothing was changed.
        """
        saved, options = read_state(state), as_plain(self.spectrum_options, self.ratio_options)
        changes = state_changes(saved, options, [layer.name for layer in self.layers])
        if changes:
            message = f"the checkpoint was written with other settings, measuring anew: {changes}"
            warn_once(message, self._measured.model)
        self._apply({layer.name: saved.ratios.get(layer.name, 1.0) for layer in self.layers})
        self.report = saved.report
        self._measured.restore(*((None, None) if changes else (saved.report, saved.begun)))
        return not changes

    def __getstate__(self) -> dict[str, Any]:
        """Return what is of use in a copy or in another process: no hooks, views and threads."""
        names = ("spectrum_options", "ratio_options", "report", "ratios", "summary")
        return {name: getattr(self, name) for name in names} | {"_copied_ratios": self.parameter_ratios()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _attached=None)

    @property
    def _measured(self) -> MeasuredModel:
        if self._attached is None:
            raise RuntimeError(_DETACHED)
        return self._attached

    def _follow(self, report: Report, first: bool) -> Report:
        """Apply the ratios that follow from a report, and warn of what a user should know."""
        self._optimizers.warn_of_unseen_steps(self._measured.model)
        mapped = self.map_ratios(report)
        self.summary = mapped.summary
        self._apply(mapped.ratios)
        self._warnings.about(report, mapped)
        if not first:
            self._warnings.about_noise(report, mapped)
        return report

    def _apply(self, ratios: dict[str, float]) -> None:
        self.ratios = ratios
        self._optimizers.apply(self._measured.model, self.parameter_ratios())


def _step_groups(measured: MeasuredModel, groups: Sequence[SplitGroup]) -> list[StepGroup]:
    """Name the layers and parameters of the groups of a step."""
    names = {id(parameter): clean_name(name) for name, parameter in measured.model.named_parameters()}
    found = []
    for group in groups:
        parameters = tuple(names.get(id(parameter), "(not in the model)") for parameter in group.params)
        lr = None if group.lr is None else float(group.lr)
        found.append(StepGroup(group.index, _owners(measured, parameters), parameters, group.ratio, lr))
    return found


def _layer_lrs(measured: MeasuredModel, optimizers: BalancedOptimizers) -> dict[str, float]:
    """Return the learning rate of each layer: that of the first of its parameters that is trained."""
    trained = optimizers.trained(measured.model)
    lrs: dict[str, float] = {}
    for group in _step_groups(measured, optimizers.groups()):
        for layer in _owners(measured, [name for name in group.parameters if name in trained]):
            if group.lr is not None:
                lrs.setdefault(layer, group.lr)
    return {layer.name: lrs[layer.name] for layer in measured.assignment.layers if layer.name in lrs}


def _owners(measured: MeasuredModel, parameters: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that parameters are part of, each once."""
    owners = measured.assignment.owners
    return tuple(dict.fromkeys(owner for name in parameters for owner in owners.get(name, ())))
