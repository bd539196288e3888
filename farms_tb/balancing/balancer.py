"""From alphas to the learning rate of every parameter, for a plain PyTorch loop or any trainer.

`LayerBalancer` holds the rules: which layers take part, which parameters follow which layer. `TempBalance` is the
public class for a plain loop; the Lightning callback drives the same `LayerBalancer`.
Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from farms_tb.balancing.layerwise_step import LayerwiseStep, stepping_optimizers
from farms_tb.balancing.ratio_maps import noise_lambda, ratios_from
from farms_tb.options import (
    NUMERICS,
    RatioOptions,
    SpectrumOptions,
    as_plain,
)
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.spectra.background import BackgroundMeasurement
from farms_tb.spectra.distributed import Team, current_team
from farms_tb.spectra.measure import measure, measure_nulls, with_nulls
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import Layer, checked_layers, clean_name, norm_feeders, unwrap

STATE_VERSION = 2


@dataclass(frozen=True)
class StepGroup:
    """A param group that the optimizer really steps with.

    Attributes:
        group: index of the user's param group that it is part of.
        layers: names of the measured layers among its parameters.
        parameters: names of the parameters.
        ratio: learning-rate ratio of all of them.
        lr: learning rate of all of them now, the user's (or the scheduler's) lr * ratio.
    """

    group: int
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    ratio: float
    lr: float


class LayerBalancer:
    """Measure the layers of a model and hand out learning rates.

    Args:
        model: the model that is trained.
        optimizers: the optimizers that train it; each gets layer-wise learning rates until `detach`.
        spectral: how alphas are measured.
        balance: what is made of them.
        share: measure each layer on one process only and share the results.

    Attributes:
        layers: the model's layers.
        report: the latest measurement; None before the first.
        ratios: ratio in force for each layer by name.
        summary: what the latest update did as a whole, by the name it is logged under: `farms/ratio_mean`, the
            mean ratio of the balanced layers, and with the noise-aware map `farms/lambda`, see
            `farms_tb.balancing.ratio_maps.noise_lambda`.

    Raises:
        TypeError: not a module, or not a torch optimizer.
        ValueError: no layer to analyse, none of its parameters in an optimizer, a pattern of `exclude` that
            matches nothing, or an optimizer that cannot have layer-wise learning rates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        spectral: SpectrumOptions,
        balance: RatioOptions,
        share: bool = False,
    ) -> None:
        self.spectral, self.balance = spectral, balance
        self.report: Report | None = None
        self._model = unwrap(model)
        self._share = share
        self._signature: tuple[tuple[int, bool], ...] = ()
        self._warned: set[str] = set()
        self._nulls: dict[str, tuple[float, float]] = {}
        self._begun: BackgroundMeasurement | Report | None = None
        self._balanced: list[list[str]] = []
        self.summary: dict[str, float] = {}
        self._read_model()
        self.ratios = dict.fromkeys((layer.name for layer in self.layers), 1.0)
        self._check_trained(optimizers)
        self._steps: list[LayerwiseStep] = []
        try:
            for optimizer in optimizers:
                self._steps += [LayerwiseStep(inner) for inner in stepping_optimizers(_raw(optimizer))]
        except Exception:
            self.detach()
            raise

    def measure(self, histogram: bool = False) -> Report:
        """Measure every layer, on all processes together where shared; ratios stay as they are."""
        team = self._prepare()
        self.report = self._with_nulls(measure(self.layers, self.spectral, histogram=histogram, team=team), team)
        return self.report

    def update(self, histogram: bool = False) -> Report:
        """Measure, and put the ratios that follow in force."""
        trained = self.report is not None
        report = self.measure(histogram)
        self._follow(report, trained)
        return report

    def begin_update(self, histogram: bool = False) -> None:
        """Begin to measure the weights as they are now, beside whatever is done next."""
        team = self._prepare()
        self._begun = BackgroundMeasurement(self.layers, self.spectral, histogram=histogram, team=team)

    def finish_update(self) -> Report:
        """Wait for the measurement that was begun, and put the ratios that follow in force."""
        report, self._begun = self._finished(), None
        trained = self.report is not None
        self.report = self._with_nulls(report, self._team())
        self._follow(self.report, trained)
        return self.report

    def _finished(self) -> Report:
        """Wait for the measurement that was begun; it stays so."""
        if isinstance(self._begun, BackgroundMeasurement):
            self._begun = self._begun.finish()
        assert self._begun is not None
        return self._begun

    def _prepare(self) -> Team | None:
        if self._signature != self._sign():
            self._read_model()
        return self._team()

    def _team(self) -> Team | None:
        return current_team() if self._share else None

    def _with_nulls(self, report: Report, team: Team | None) -> Report:
        if not self._noise_aware:
            return report
        # Once for each layer, from the first weights that have an alpha: the null of random weights stays.
        report = with_nulls(report, self._nulls)
        new = measure_nulls(self.layers, report, self.spectral, team=team)
        self._nulls.update(new)
        return with_nulls(report, new)

    def _follow(self, report: Report, trained: bool) -> None:
        self._put_in_force(self._ratios_for(report))
        if trained:
            self._warn_of_noise(report)

    def parameter_ratios(self) -> dict[str, float]:
        """Return the ratio in force for each parameter of the model by name."""
        owners = self._owners
        return {
            name: self._shared_ratio(owners.get(name, ()))
            for name in (clean_name(raw) for raw, _ in self._model.named_parameters())
        }

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with.

        Raises:
            ValueError: the optimizer is none of those balanced here.
        """
        inner = list(stepping_optimizers(_raw(optimizer)))
        steps = [step for step in self._steps if any(step.optimizer is own for own in inner)]
        if not steps:
            raise ValueError(f"this {type(optimizer).__name__} is not one that is being balanced")
        names = {id(parameter): clean_name(name) for name, parameter in self._model.named_parameters()}
        groups = []
        for split in (split for step in steps for split in step.split_groups()):
            parameters = tuple(names.get(id(parameter), "(not in the model)") for parameter in split.params)
            layers = dict.fromkeys(owner for name in parameters for owner in self._own_layers.get(name, ()))
            groups.append(StepGroup(split.index, tuple(layers), parameters, split.ratio, float(split.lr)))
        return groups

    def layer_lrs(self) -> dict[str, float]:
        """Return the learning rate now of each layer that is trained."""
        by_id = {id(p): name for name, p in self._model.named_parameters() if p.requires_grad}
        lrs: dict[str, float] = {}
        for split in (split for step in self._steps for split in step.split_groups()):
            lr = float(split.lr)
            for parameter in split.params:
                for layer in self._own_layers.get(clean_name(by_id.get(id(parameter), "")), ()):
                    lrs.setdefault(layer, lr)
        return {layer.name: lrs[layer.name] for layer in self.layers if layer.name in lrs}

    def detach(self) -> None:
        """Give the optimizers back as they were. Reports and ratios stay readable."""
        for step in self._steps:
            step.detach()
        if isinstance(self._begun, BackgroundMeasurement):
            self._begun.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values.

        Where a measurement was begun it is waited for, on every process that takes part in it.
        """
        state = {
            "version": STATE_VERSION,
            "options": as_plain(self.spectral, self.balance),
            "ratios": dict(self.ratios),
            "report": _plain_records(self.report),
        }
        return state if self._begun is None else {**state, "begun": _plain_records(self._finished())}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Put the saved ratios in force.

        Returns:
            Whether the state fits: False where the options or the layers are others now, after a warning that
            names them. The layers that remain keep their saved ratios; measure anew.

        Raises:
            ValueError: the state is not one of this class, or of a newer version of this package.
        """
        if not isinstance(state, dict) or not {"version", "options", "ratios", "report"} <= set(state):
            raise ValueError("not a state of farms_tb: expected a dict with version, options, ratios and report")
        if state["version"] > STATE_VERSION:
            raise ValueError(
                f"the state has version {state['version']}, this farms_tb reads up to {STATE_VERSION}: upgrade it"
            )
        changes = self._changes(state)
        if changes:
            warn_once("the checkpoint was written with other settings, measuring anew: " + changes, self._model)
        saved = state["ratios"]
        self._put_in_force({layer.name: float(saved.get(layer.name, 1.0)) for layer in self.layers})
        self.report = _report_of_plain(state["report"], self.spectral)
        self._begun = None if changes else _report_of_plain(state.get("begun", {}), self.spectral)
        records = {} if self.report is None else self.report.layers
        self._nulls = {name: r.null for name, r in records.items() if r.null is not None and not changes}
        return not changes

    def _changes(self, state: dict[str, Any]) -> str:
        """Say in what the saved state differs from this run; empty where in nothing."""
        now = as_plain(self.spectral, self.balance)
        # An option that the checkpoint does not know yet was at its default in effect.
        saved = as_plain(SpectrumOptions(), RatioOptions()) | state["options"]
        parts = [
            f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
            for name in {**now, **saved}
            if saved.get(name) != now.get(name) and name not in NUMERICS
        ]
        names = {layer.name for layer in self.layers}
        gone, new = sorted(set(state["ratios"]) - names), sorted(names - set(state["ratios"]))
        parts += [f"layers {', '.join(gone)} are not in the model"] if gone else []
        parts += [f"layers {', '.join(new)} are not in the checkpoint"] if new else []
        return "; ".join(parts)

    def _sign(self) -> tuple[tuple[int, bool], ...]:
        # A lazy parameter stays the same object when it gets its values.
        return tuple((id(parameter), is_lazy(parameter)) for parameter in self._model.parameters())

    def _read_model(self) -> None:
        """Work out the layers, their parameters and who is excluded; again whenever parameters were replaced."""
        self.layers = checked_layers(self._model)
        self._signature = self._sign()
        self._excluded = self._exclusions()
        self._own_layers = _owners(self.layers)
        self._owners = dict(self._own_layers)
        if self.balance.norms == "follow":
            self._owners.update(_norm_owners(self._model, self.layers, self._own_layers))

    def _exclusions(self) -> set[str]:
        matrix_layers = [layer for layer in self.layers if layer.has_rule]
        ends = []
        if self.balance.exclude_first:
            ends.append(matrix_layers[0].module_name)
        if self.balance.exclude_last:
            ends.append(matrix_layers[-1].module_name)
        excluded = {layer.name for layer in matrix_layers if layer.module_name in ends}
        for pattern in self.balance.exclude:
            matches = {layer.name for layer in self.layers if _matches(layer.name, pattern)}
            if not matches:
                names = ", ".join(layer.name for layer in self.layers)
                raise ValueError(f"exclude={pattern!r} matches no layer; the layers are {names}")
            excluded |= matches
        return excluded

    def _check_trained(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise ValueError("there is no optimizer to balance")
        for optimizer in map(_raw, optimizers):
            if not isinstance(optimizer, Optimizer):
                kind = type(optimizer).__name__
                raise TypeError(f"layer-wise learning rates need a torch.optim.Optimizer, got {kind}")
        held = {
            id(p)
            for optimizer in map(_raw, optimizers)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        if not any(id(p) in held for layer in self.layers for p in layer.module.parameters()):
            raise ValueError(
                "none of the model's layers has a parameter in the optimizer: build the optimizer from the "
                "parameters of the same model"
            )

    def _trained(self) -> set[str]:
        """Names of the parameters that some optimizer trains."""
        held = {
            id(parameter)
            for step in self._steps
            for group in step.optimizer.param_groups
            for parameter in group["params"]
        }
        named = self._model.named_parameters()
        return {clean_name(name) for name, p in named if p.requires_grad and id(p) in held}

    def _ratios_for(self, report: Report) -> dict[str, float]:
        """Map the metric of the layers that take part, each kind within itself; 1 for the others."""
        ratios = dict.fromkeys(report.layers, 1.0)
        trained = self._trained()
        self.summary, self._balanced = {}, []
        for kind in self.balance.balance:
            members = [layer for layer in self.layers if layer.kind == kind and self._takes_part(layer, trained)]
            values = {layer.name: self._mapped(report.layers[layer.name]) for layer in members}
            self._warn_missing(report, values)
            ratios.update(ratios_from(values, self.balance))
            known = {name: value for name, value in values.items() if value is not None}
            self._balanced.append(list(known))
            if self._noise_aware and known:
                # Kinds are balanced apart; real weights are all there are, but for Fourier layers.
                key = "farms/lambda" if kind == "real" else f"farms/lambda_{kind}"
                self.summary[key] = noise_lambda(list(known.values()))
        balanced = [ratios[name] for names in self._balanced for name in names]
        if balanced:
            self.summary["farms/ratio_mean"] = math.fsum(balanced) / len(balanced)
        return ratios

    @property
    def _noise_aware(self) -> bool:
        return self.balance.assign_func == "noise_aware"

    def _mapped(self, record: LayerRecord) -> float | None:
        """Return the figure of a layer that becomes its ratio."""
        return record.z_score if self._noise_aware else record.metric(self.balance.metric)

    def _takes_part(self, layer: Layer, trained: set[str]) -> bool:
        return not layer.problem and layer.name not in self._excluded and not trained.isdisjoint(layer.parameters)

    def _warn_missing(self, report: Report, metrics: dict[str, float | None]) -> None:
        missing = [name for name, value in metrics.items() if value is None and name not in self._warned]
        self._warned.update(missing)
        if missing:
            reasons = "; ".join(f"{name}: {self._reason(report.layers[name])}" for name in missing)
            warn_once(f"layers with no {self.balance.metric} keep the base learning rate: {reasons}", self._model)

    def _reason(self, record: LayerRecord) -> str:
        return record.status if record.status != OK else "its entries, shuffled, have no alpha to compare with"

    def _warn_of_noise(self, report: Report) -> None:
        """Say, once, where a map that knows nothing of noise follows it: of weights that were trained already."""
        if self._noise_aware or self.balance.metric != "alpha":
            return
        for names in self._balanced:
            if len({self.ratios[name] for name in names}) < 2:
                continue
            records = {name: report.layers[name] for name in names}
            share = _noise_share(list(records.values()))
            if share > 0.5 and "noise" not in self._warned:
                self._warned.add("noise")
                warn_once(
                    f"{share:.0%} of the variance of alpha between the layers is sampling noise, and so are their "
                    "learning rates: assign_func='noise_aware' leaves noise out",
                    self._model,
                )
            top = max(names, key=lambda name: records[name].alpha or 0.0)
            if _is_single(records[top]) and not all(map(_is_single, records.values())) and top not in self._warned:
                self._warned.add(top)
                warn_once(
                    f"{top} has the largest alpha and is a single matrix, which reads higher than a stack of "
                    f"several that is as random; the mean ratio is {self.summary['farms/ratio_mean']:.2f}. "
                    "assign_func='noise_aware' compares each layer with random ones of its shape",
                    self._model,
                )

    def _put_in_force(self, ratios: dict[str, float]) -> None:
        self.ratios = ratios
        by_id = {
            id(parameter): self._shared_ratio(self._owners.get(clean_name(name), ()))
            for name, parameter in self._model.named_parameters()
        }
        for step in self._steps:
            step.ratios = by_id

    def _shared_ratio(self, owners: Sequence[str]) -> float:
        """Return the mean of the owners' ratios: the packed q, k and v of attention have three and one lr."""
        ratios = [self.ratios.get(owner, 1.0) for owner in owners]
        if len(set(ratios)) < 2:
            return next(iter(ratios), 1.0)
        mean = math.fsum(ratios) / len(ratios)
        if self.balance.ratio_levels is not None:
            # No further ratio: the nearest of those that there are.
            return min(self.ratios.values(), key=lambda ratio: (abs(ratio - mean), ratio))
        return mean


def _noise_share(records: Sequence[LayerRecord]) -> float:
    """Return which part of the variance of alpha over the layers its standard errors make up, 0 to 1."""
    alphas = [record.alpha for record in records if record.alpha is not None]
    errors = [record.alpha_error for record in records if record.alpha_error is not None]
    if len(alphas) < 2 or not errors:
        return 0.0
    mean = math.fsum(alphas) / len(alphas)
    variance = math.fsum((alpha - mean) ** 2 for alpha in alphas) / (len(alphas) - 1)
    noise = math.fsum(error**2 for error in errors) / len(errors)
    return min(1.0, noise / variance) if variance > 0 else 0.0


def _is_single(record: LayerRecord) -> bool:
    """Tell whether each sample is one window: a 1x1 convolution, or a linear layer of a window's size."""
    return bool(record.shape) and record.shape[0] == 1 and record.num_eigenvalues <= record.shape[1]


def _raw(optimizer: Any) -> Any:
    """Return the torch optimizer inside Lightning's `LightningOptimizer`."""
    inner = getattr(optimizer, "_optimizer", None)
    return inner if not isinstance(optimizer, Optimizer) and isinstance(inner, Optimizer) else optimizer


def _matches(name: str, pattern: str) -> bool:
    """Match the whole name, or its end from some dot on: `lifting.*` matches `net.lifting.fcs.0`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _owners(layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the layers whose ratio each parameter takes."""
    owners: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        for parameter in layer.parameters:
            owners[parameter] = (*owners.get(parameter, ()), layer.name)
    return owners


def _norm_owners(
    model: nn.Module, layers: Sequence[Layer], taken: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return the layers that each parameter of a normalisation layer follows."""
    by_module: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        by_module[layer.module_name] = (*by_module.get(layer.module_name, ()), layer.name)
    owners = {}
    for norm, feeder in norm_feeders(model, list(layers)).items():
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name not in taken:
                owners[name.removeprefix(".")] = by_module[feeder]
    return owners


def _plain_records(report: Report | None) -> dict[str, dict[str, Any]]:
    records = {} if report is None else report.layers
    return {
        # Not `asdict`, which takes thirty times as long, at every checkpoint.
        name: {**vars(record), "histogram": None, "shape": list(record.shape)}
        for name, record in records.items()
    }


def _report_of_plain(records: dict[str, dict[str, Any]], options: SpectrumOptions) -> Report | None:
    read = {name: LayerRecord(**{**row, "shape": tuple(row["shape"])}) for name, row in records.items()}
    return Report(read, as_plain(options)) if read else None
