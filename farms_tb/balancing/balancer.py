"""From a model and its optimizers to the learning rate of every parameter.

`LayerBalancer` calls the steps of the method in order: a measurement gives a record for each layer
(`farms_tb.spectra`), `report_ratios` turns records into ratios, `assignment` says which parameter takes which
ratio, and `layerwise_step` lets the optimizers step with them. `TempBalance` and the trainers' callbacks drive it.

Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.attached_model import AttachedModel
from farms_tb.balancing.measured_model import MeasuredModel
from farms_tb.balancing.report_ratios import RatioSummary
from farms_tb.balancing.state import BalancerState, is_of_this_run, read_state, write_state
from farms_tb.balancing.step_groups import StepGroup as StepGroup
from farms_tb.balancing.targets import weakened
from farms_tb.options import RatioOptions, SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.weights.layers import Layer, unwrap

_DETACHED = (
    "this balancer is a copy, or was pickled, and is detached from its model and optimizers: report, ratios and "
    "parameter_ratios() can be read. Make a new one to balance"
)
_KEPT_IN_COPIES = ("spectrum_options", "ratio_options", "report", "strength", "summary", "_mapped")


class _Detached:
    """Takes the place of the attached model in a copy: it knows the ratios, and nothing else."""

    def __init__(self, ratios: dict[str, float]) -> None:
        self._ratios = ratios

    def parameter_ratios(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Return the ratio of each parameter by name, as it was when the copy was made."""
        return dict(self._ratios)

    def detach(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(_DETACHED)


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
        measured = MeasuredModel(unwrap(model), spectrum_options, ratio_options, share)
        self._plain_options = as_plain(spectrum_options, ratio_options)
        self.strength = 1.0
        self._mapped = {layer.name: 1.0 for layer in measured.assignment.layers}
        self._attached: AttachedModel | _Detached = AttachedModel(measured, optimizers, ratio_options)

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers of the model."""
        return self._attached.assignment.layers

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
            self._attached.apply(self._mapped, strength)

    def compare_with_random(self) -> None:
        """From now on compare layers with their permutation nulls, also where the map does not need it."""
        self._attached.measured.compares = True

    def measure(self, histogram: bool = False) -> Report:
        """Measure every layer, on all processes together where shared; ratios stay as they are."""
        self.report = self._attached.measured.measure(histogram)
        return self.report

    def update(self, histogram: bool = False) -> Report:
        """Measure, and apply the ratios that follow."""
        return self._follow(self._attached.measured.measure(histogram))

    def begin_update(self, histogram: bool = False) -> None:
        """Begin to measure the weights as they are now, in the background."""
        self._attached.measured.begin(histogram)

    def finish_update(self) -> Report:
        """Wait for the measurement that was begun, and apply the ratios that follow."""
        return self._follow(self._attached.measured.finish())

    def parameter_ratios(self) -> dict[str, float]:
        """Return the current ratio of each parameter of the model by name."""
        return weakened(self._attached.parameter_ratios(self._mapped), self.strength)

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with.

        Raises:
            ValueError: the optimizer is not one that is balanced here.
        """
        return self._attached.param_groups(optimizer)

    def layer_lrs(self) -> dict[str, float]:
        """Return the current learning rate of each layer that is trained."""
        return self._attached.layer_lrs()

    def trained_layers(self) -> list[str]:
        """Return the names of the layers with a parameter that an optimizer trains: frozen ones do not count."""
        return self._attached.trained_layers()

    def detach(self) -> None:
        """Give the optimizers back as they were. Reports and ratios stay readable."""
        self._attached.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values.

        A measurement that was begun is waited for, on every process that takes part in it.
        """
        begun = self._attached.measured.begun_report()
        return write_state(BalancerState(self._plain_options, self._mapped, self.report, begun))

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Apply the saved ratios.

        Returns:
            Whether the state fits. False where the options or the layers are others now, after a warning that
            names them: the layers that remain keep their saved ratios until they are measured again.

        Raises:
            ValueError: not a state of this class, one of a newer version, or a damaged one. Nothing was changed.
        """
        saved, attached = read_state(state), self._attached
        names = [layer.name for layer in self.layers]
        fits = is_of_this_run(saved, self._plain_options, names, attached.model)
        self._mapped = {name: saved.ratios.get(name, 1.0) for name in names}
        attached.apply(self._mapped, self.strength)
        self.report = saved.report
        attached.measured.restore(saved if fits else None)
        return fits

    def __getstate__(self) -> dict[str, Any]:
        """Return what is of use in a copy or in another process: no hooks, views and threads."""
        kept = {name: getattr(self, name) for name in _KEPT_IN_COPIES}
        return {**kept, "_attached": self._attached.parameter_ratios(self._mapped)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _attached=_Detached(state["_attached"]))

    def _follow(self, report: Report) -> Report:
        initial, self.report = self.report is None, report
        mapped = self._attached.map_ratios(report)
        self._mapped, self.summary = mapped.ratios, mapped.summary.at(self.strength)
        self._attached.follow(report, mapped, self.strength, initial=initial)
        return report
