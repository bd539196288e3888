"""From a model and its optimizers to the learning rate of every parameter.

`LayerBalancer` calls the steps of the method in order: a measurement gives a record for each layer
(`measured_model`), `report_ratios` turns records into ratios, `assignment` says which parameter takes which ratio,
and `optimizers` lets the optimizers step with them. `TempBalance` and the trainers' callbacks drive it.

What the model and its optimizers hold is looked up anew at each measurement: parameters may be frozen, replaced or
handed to an optimizer between two of them. A parameter that takes the place of another between two steps has the
ratio of its name from its first step on.

Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from farms_tb.balancing.assignment import (
    Assignment,
    block_leaders,
    members,
    ratios_of_parameters,
    trained_layers,
    with_shared_ratios,
)
from farms_tb.balancing.measured_model import MeasuredModel
from farms_tb.balancing.optimizers import BalancedOptimizers
from farms_tb.balancing.ratio_warnings import RatioWarnings
from farms_tb.balancing.report_ratios import RatioSummary, ratios_of_report
from farms_tb.balancing.state import BalancerState, changed_settings, read_state, write_state
from farms_tb.balancing.step_groups import StepGroup, lrs_of_layers, step_groups
from farms_tb.balancing.targets import Ratio, scale_of, weakened
from farms_tb.balancing.verdict_warnings import VerdictWarnings
from farms_tb.options import Kind, RatioOptions, SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import Layer, unwrap
from farms_tb.weights.names import named_parameters

_KEPT_IN_COPIES = ("spectrum_options", "ratio_options", "report", "strength", "summary", "_mapped")


class _LeftBehind:
    """Takes the place of what a copy of a balancer leaves behind; to use it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            "this balancer is a copy, or was pickled, and is detached from its model and optimizers: report, "
            "ratios and parameter_ratios() can be read. Make a new one to balance"
        )


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
        strength: share s of the ratios r that applies: the current ones are 1 + s (r - 1).
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
        self.strength = 1.0
        self._measured = MeasuredModel(unwrap(model), spectrum_options, ratio_options, share)
        self._mapped = {layer.name: 1.0 for layer in self.layers}
        # With unit="block" a layer of each block that was balanced: what else is in the block has its ratio.
        self._leaders: dict[str, str] = {}
        self._ratio_warnings = RatioWarnings(self._measured.model, ratio_options)
        self._verdict_warnings = VerdictWarnings(self._measured.model)
        # The ratio of each parameter by name, in a copy, which has no parameters.
        self._of_original: dict[str, float] | None = None
        # Ratios go by the `id` of a parameter, which another object may get once the parameter is freed.
        self._kept_alive: list[Tensor] = []
        self._optimizers = BalancedOptimizers(optimizers, ratio_options, self._apply)
        self._optimizers.attach(self.layers)

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers of the model."""
        return self._measured.assignment.layers

    @property
    def ratios(self) -> dict[str, float]:
        """Current learning-rate ratio of each layer by name."""
        return weakened(self._mapped, self.strength)

    def set_strength(self, strength: float) -> None:
        """Let the next steps use 1 + s (r - 1) in place of each ratio r.

        Args:
            strength: s, from 0 (the base learning rate everywhere) to 1 (the ratios).
        """
        if strength != self.strength:
            self.strength = strength
            self._apply()

    def compare_with_random(self) -> None:
        """From now on compare layers with their permutation nulls, also where the map does not need it."""
        self._measured.compares = True

    def measure(self, histogram: bool = False) -> Report:
        """Measure every layer, on all processes together where shared; ratios stay as they are."""
        self.report = self._measured.measure(histogram)
        return self.report

    def update(self, histogram: bool = False) -> Report:
        """Measure, and apply the ratios that follow."""
        return self._balance(self._measured.measure(histogram))

    def begin_update(self, histogram: bool = False) -> None:
        """Begin to measure the weights as they are now, in the background."""
        self._measured.begin(histogram)

    def finish_update(self) -> Report:
        """Wait for the measurement that was begun, and apply the ratios that follow."""
        return self._balance(self._measured.finish())

    def parameter_ratios(self) -> dict[str, float]:
        """Return the current ratio of each parameter of the model by name."""
        if self._of_original is not None:
            return dict(self._of_original)
        return self._ratios_of(named_parameters(self._measured.model))

    def param_groups(self, optimizer: Optimizer | None = None) -> list[StepGroup]:
        """Return the groups that an optimizer really steps with.

        Args:
            optimizer: one of those that are balanced here; None for all of them.

        Raises:
            ValueError: the optimizer is not one of these.
        """
        return step_groups(self._measured.model, self._assignment_now(), self._optimizers.groups(optimizer))

    def layer_lrs(self) -> dict[str, float]:
        """Return the current learning rate of each layer that is trained."""
        return lrs_of_layers(self.layers, self.param_groups(), self._trained())

    def trained_layers(self) -> list[str]:
        """Return the names of the layers with a parameter that an optimizer trains: frozen ones do not count."""
        return [layer.name for layer in trained_layers(self.layers, self._trained())]

    def detach(self) -> None:
        """Give the optimizers back as they were, and wait until no thread measures. Reports and ratios stay."""
        if self._of_original is None:
            self._optimizers.detach()
            self._kept_alive = []
            self._measured.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values.

        A measurement that was begun is waited for, on every process that takes part in it.
        """
        begun = self._measured.begun_report()
        return write_state(BalancerState(self._plain_options(), self._mapped, self.report, begun, self._leaders))

    def load_state_dict(
        self,
        state: dict[str, Any],
        changed: str = "the checkpoint was written with other settings",
        others: Sequence[str] = (),
    ) -> bool:
        """Apply the saved ratios.

        Args:
            state: what `state_dict` returned.
            changed: how the warning begins where options or layers are others now.
            others: what the warning says of changed settings outside of the state, which need no new measurement.

        Returns:
            Whether the state fits. False where the options, the layers or their shapes are others now, after a
            warning that names them: the layers that remain keep their saved ratios until they are measured again.

        Raises:
            ValueError: not a state of this class, one of a newer version, or a damaged one. Nothing was changed.
        """
        saved = read_state(state)
        # Layers may have been replaced since they were measured last.
        self._measured.follow_model()
        names = [layer.name for layer in self.layers]
        changes = changed_settings(saved, self._plain_options(), self.layers)
        fits = not changes
        if changes or others:
            consequence = "" if fits else ", measuring anew"
            warn_once(f"{changed}{consequence}: {'; '.join([*changes, *others])}", self._measured.model)
        ratios = {name: saved.ratios.get(name, 1.0) for name in names}
        # Earlier versions saved what the map gave each of the layers that share a matrix.
        self._mapped = with_shared_ratios(ratios, self._measured.assignment, self.ratio_options, names)
        # Those of the measurement, since other layers may be trained by now. Earlier versions did not save them.
        present = block_leaders(self._measured.assignment, self._members())
        self._leaders = saved.leaders if fits and saved.leaders else present
        self._apply()
        self.report = saved.report
        self._measured.restore(saved.report if fits else None, saved.begun if fits else None)
        return fits

    def __getstate__(self) -> dict[str, Any]:
        """Return what is of use in a copy or in another process: no hooks, views and threads."""
        kept = {name: getattr(self, name) for name in _KEPT_IN_COPIES}
        return {**kept, "_of_original": self.parameter_ratios()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _measured=_LeftBehind(), _optimizers=_LeftBehind())

    def _balance(self, report: Report) -> Report:
        """Map a report of the present layers to ratios, let the next steps use them, and warn of what is odd."""
        # The first weights may be initial ones, whose alphas are all noise: that is not worth a warning.
        initial, self.report = self.report is None, report
        assignment, by_kind = self._measured.assignment, self._members()
        self._leaders = block_leaders(assignment, by_kind)
        mapped = ratios_of_report(report, by_kind, self.ratio_options, assignment)
        self._mapped, self.summary = mapped.ratios, mapped.summary.at(self.strength)
        trained = self.trained_layers()  # of the report: to apply the ratios finds the layers of now
        self._optimizers.apply_measured(self._scales(), self._measured.model)
        self._ratio_warnings.warn(report, mapped, initial=initial)
        self._verdict_warnings.warn(report, trained, mapped.missing)
        return report

    def _members(self) -> dict[Kind, list[str]]:
        """Return the layers that are balanced as the optimizers are now, by kind."""
        return members(self._measured.assignment, self.ratio_options, self._trained())

    def _apply(self) -> None:
        """Let the next steps use the current ratios, for all parameters that the optimizers hold now."""
        self._optimizers.apply(self._scales())

    def _scales(self) -> dict[int, Ratio]:
        """Return what the current ratios scale of each parameter of model and optimizers, by its `id`."""
        parameters, held = named_parameters(self._measured.model), self._optimizers.parameters()
        self._kept_alive = [*held, *parameters.values()]
        scales: dict[int, Ratio] = dict.fromkeys(map(id, held), 1.0)
        for name, ratio in self._ratios_of(parameters).items():
            scales[id(parameters[name])] = scale_of(ratio, self.ratio_options)
        return scales

    def _ratios_of(self, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
        """Return the current ratio of each of the model's parameters by name."""
        ratios = self._mapped | {block: self._mapped[leader] for block, leader in self._leaders.items()}
        mapped = ratios_of_parameters(parameters, self._assignment_now(), ratios, self.ratio_options)
        return weakened(mapped, self.strength)

    def _assignment_now(self) -> Assignment:
        """Return which parameter follows which layer; while an optimizer has ratios, as the model is now.

        Between two measurements a parameter may get another name, where its layer is parametrized or pruned.
        """
        if self._optimizers.are_attached:
            self._measured.follow_model()
        return self._measured.assignment

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that an optimizer trains now, by name."""
        return self._optimizers.trained(named_parameters(self._measured.model))

    def _plain_options(self) -> dict[str, Any]:
        return as_plain(self.spectrum_options, self.ratio_options)
