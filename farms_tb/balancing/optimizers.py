"""The optimizers that train a model, all balanced together.

A model may have several (Muon for matrices and AdamW for the rest), and an optimizer may wrap others (SAM,
Lookahead). Those that really move parameters get a `LayerwiseStep` each, and all the same ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from farms_tb.balancing.layerwise_step import LayerwiseStep
from farms_tb.balancing.optimizer_checks import all_parameters, stepping_optimizers, unwrapped_optimizer
from farms_tb.balancing.split_groups import SplitGroup, split_groups
from farms_tb.balancing.targets import Ratio, check_decay
from farms_tb.options import RatioOptions
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import Layer

_WAY_OUT = (
    "give one that is built from the parameters of the same model (Lightning: return it from "
    "configure_optimizers), which tells the layers that are trained, also where they are only measured; "
    "farms_tb.analyze(model) measures without one"
)


class BalancedOptimizers:
    """Gives the parameters of several optimizers their learning-rate ratios.

    Args:
        optimizers: the optimizers; those that they wrap are found.
        options: what the ratios scale. Where they are all 1 by the options alone, the optimizers are left alone,
            whatever they are: only their `param_groups` are read.
        renew: called before a step of an optimizer that holds a parameter without a ratio, to `apply` them anew.

    Raises:
        TypeError: not a torch optimizer, nor, where ratios are all 1, another object with `param_groups`.
        ValueError: no optimizer.
    """

    def __init__(self, optimizers: Sequence[Any], options: RatioOptions, renew: Callable[[], None]) -> None:
        if not optimizers:
            raise ValueError(f"there is no optimizer: {_WAY_OUT}")
        self._options, self._renew = options, renew
        self._optimizers: list[Optimizer] = []
        for optimizer in map(unwrapped_optimizer, optimizers):
            self._check_type(optimizer)
            for stepping in _stepping(optimizer):
                if not _is_among(stepping, self._optimizers):
                    self._optimizers.append(stepping)
        self._steps: list[LayerwiseStep] = []

    def attach(self, layers: Sequence[Layer]) -> None:
        """Make the optimizers step with the ratios of these layers, from now on and until `detach`.

        Raises:
            ValueError: no layer has a parameter in an optimizer, or an optimizer cannot have layer-wise learning
                rates, or has them already, or has no weight decay that is to be balanced; none is attached.
        """
        of_layers: set[int] = set()
        for layer in layers:
            of_layers.update(map(id, layer.module.parameters()))
        if self._held().isdisjoint(of_layers):
            raise ValueError(f"none of the model's layers has a parameter in the optimizer: {_WAY_OUT}")
        if self._options.only_measures:
            return
        check_decay(self._optimizers, self._options)
        try:
            for optimizer in self._optimizers:
                self._steps.append(LayerwiseStep(optimizer, self._renew))
        except BaseException:
            self.detach()
            raise

    def apply(self, ratios: Mapping[int, Ratio]) -> None:
        """Let the next steps use these ratios.

        Args:
            ratios: what is scaled of a parameter, by its `id`; a parameter without an entry keeps its group's lr.
        """
        for step in self._steps:
            step.ratios = ratios

    def apply_measured(self, ratios: Mapping[int, Ratio], model: nn.Module) -> None:
        """Let the next steps use the ratios of a new measurement, as in `apply`.

        Warns, once for the model, where its weights were trained since the measurement before by steps that did
        not have layer-wise learning rates.
        """
        missed = [step.optimizer for step in self._steps if step.replace_ratios(ratios)]
        for optimizer in missed:
            name = type(optimizer).__name__
            warn_once(
                f"the weights were trained since the last measurement, but not by {name}.step(), and so "
                "without the ratios of their layers. Was the optimizer exchanged, or its step replaced? Where "
                "weights were loaded, all is well",
                model,
            )

    def detach(self) -> None:
        """Give the optimizers back as they were. Safe to call twice."""
        for step in self._steps:
            step.detach()
        self._steps = []

    @property
    def are_attached(self) -> bool:
        """Whether some optimizer steps with ratios, until `detach`."""
        return bool(self._steps)

    def parameters(self) -> list[Tensor]:
        """Return every parameter that some optimizer holds."""
        return all_parameters(group for optimizer in self._optimizers for group in optimizer.param_groups)

    def trained(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return those of a model's parameters that some optimizer trains now, by name.

        That is, those that it holds and that are not frozen, or only for the turn of another one.
        """
        held, pausing = self._held(), self._pausing()
        own = {name: parameter for name, parameter in parameters.items() if id(parameter) in held}
        return {name: one for name, one in own.items() if one.requires_grad or id(one) in pausing}

    def groups(self, optimizer: Any = None) -> list[SplitGroup]:
        """Return the groups that a step sees now.

        Args:
            optimizer: one of these, or one that wraps some of them; None for all.

        Raises:
            ValueError: the optimizer is not one of these.
        """
        chosen = self._optimizers if optimizer is None else self._inside(optimizer)
        if not chosen:
            raise ValueError(f"this {type(optimizer).__name__} is not one that is being balanced")
        ratios = {id(step.optimizer): step.ratios for step in self._steps}
        groups: list[SplitGroup] = []
        for one in chosen:
            groups += split_groups(one, ratios.get(id(one), {}))
        return groups

    def _check_type(self, optimizer: Any) -> None:
        """Raise a `TypeError` unless it is a torch optimizer or, to measure only, has `param_groups`."""
        is_readable = self._options.only_measures and hasattr(optimizer, "param_groups")
        if is_readable or isinstance(optimizer, Optimizer):
            return
        kind = type(optimizer).__name__
        raise TypeError(
            f"layer-wise learning rates need a torch.optim.Optimizer, got {kind}. To measure only, with "
            "lr_min_ratio=lr_max_ratio=1, any object with param_groups will do"
        )

    def _inside(self, optimizer: Any) -> list[Optimizer]:
        """Return those of the optimizers that step when a user's optimizer does."""
        own = list(_stepping(unwrapped_optimizer(optimizer)))
        return [one for one in self._optimizers if _is_among(one, own)]

    def _held(self) -> set[int]:
        """Return the `id` of each parameter that some optimizer holds."""
        return set(map(id, self.parameters()))

    def _pausing(self) -> set[int]:
        """Return the `id` of each parameter that is frozen while its optimizer waits for its turn.

        Loops with several optimizers, as for a GAN, freeze one network for the step of the other, and a batch may
        end so. Then all parameters of an optimizer are frozen, and it has stepped them before: they have a state.
        """
        if len(self._optimizers) == 1:
            return set()
        pausing: set[int] = set()
        for optimizer in self._optimizers:
            state = getattr(optimizer, "__dict__", {}).get("state", {})
            params = all_parameters(optimizer.param_groups)
            if isinstance(state, Mapping) and not any(parameter.requires_grad for parameter in params):
                pausing.update(id(parameter) for parameter in params if parameter in state)
        return pausing


def _stepping(optimizer: Any) -> Iterable[Any]:
    """Return the optimizers that step when a user's does; of another class than torch's it is taken as one."""
    return stepping_optimizers(optimizer) if isinstance(optimizer, Optimizer) else [optimizer]


def _is_among(optimizer: Optimizer, others: Sequence[Optimizer]) -> bool:
    """Return whether an optimizer is one of others; by identity, because a class may define equality."""
    return any(optimizer is other for other in others)
