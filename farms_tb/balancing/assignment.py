"""Who takes part in balancing, and which parameter takes which layer's learning-rate ratio."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from farms_tb.balancing.norms import norm_feeders
from farms_tb.options import Kind, RatioOptions
from farms_tb.weights.layers import Layer, checked_layers, clean_name

Owners = Mapping[str, tuple[str, ...]]
"""Names of the layers that a parameter belongs to, by the parameter's name."""


@dataclass(frozen=True)
class Assignment:
    """The layers of a model and their parameters.

    Attributes:
        layers: the layers, in order of registration.
        owners: the layers that each parameter is part of. The packed q, k and v of attention have three.
        followed: the layers whose ratio each parameter takes: its owners, and for the parameters of a
            normalisation layer with `norms="follow"` the layer that feeds it.
    """

    layers: Sequence[Layer]
    owners: Owners
    followed: Owners


def assign(model: nn.Module, options: RatioOptions) -> Assignment:
    """Find the layers of a model, and which parameter takes whose ratio.

    Raises:
        TypeError: not a module.
        ValueError: no layer that can be analysed, or a pattern of `exclude` that matches none.
    """
    layers = checked_layers(model)
    for pattern in options.exclude:
        if not any(_matches(layer.name, pattern) for layer in layers):
            names = ", ".join(layer.name for layer in layers)
            raise ValueError(f"exclude={pattern!r} matches no layer; the layers are {names}")
    owners: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        for parameter in layer.parameters:
            owners[parameter] = (*owners.get(parameter, ()), layer.name)
    follow = _norm_parameters(model, layers) if options.norms == "follow" else {}
    return Assignment(layers, owners, {**follow, **owners})


def members(
    layers: Sequence[Layer], options: RatioOptions, trained: Mapping[str, nn.Parameter]
) -> dict[Kind, list[str]]:
    """Return the names of the layers that are balanced, for each kind that is balanced within itself.

    A layer takes part where it is trained, can be measured, and is not excluded.

    Args:
        layers: all layers of the model.
        options: `exclude`, `exclude_first`, `exclude_last` and the kinds.
        trained: the parameters that an optimizer trains, by name.
    """
    excluded = _excluded(layers, options, {id(parameter) for parameter in trained.values()})
    taking_part = [
        layer
        for layer in layers
        if not layer.problem and layer.name not in excluded and any(name in trained for name in layer.parameters)
    ]
    return {kind: [layer.name for layer in taking_part if layer.kind == kind] for kind in options.balance}


def ratio_of_parameter(followed: Iterable[str], ratios: Mapping[str, float], options: RatioOptions) -> float:
    """Return the ratio of a parameter: the mean of those of the layers that it follows, and 1 where there is none.

    With `ratio_levels` a mean of several is rounded to the nearest of the layers' ratios, so that no further
    learning rate comes up.
    """
    own = [ratios.get(layer, 1.0) for layer in followed]
    if len(set(own)) < 2:
        return own[0] if own else 1.0
    mean = math.fsum(own) / len(own)
    if options.ratio_levels is None:
        return mean
    return min(ratios.values(), key=lambda ratio: (abs(ratio - mean), ratio))


def ratios_of_parameters(
    model: nn.Module, followed: Owners, ratios: Mapping[str, float], options: RatioOptions
) -> dict[str, float]:
    """Return `ratio_of_parameter` of each parameter of a model by name, in its order."""
    names = [clean_name(raw) for raw, _ in model.named_parameters()]
    return {name: ratio_of_parameter(followed.get(name, ()), ratios, options) for name in names}


def _excluded(layers: Sequence[Layer], options: RatioOptions, trained: Collection[int]) -> set[str]:
    """Return the names of the excluded layers.

    The first and the last are those of the layers that are trained: excluding a layer that is frozen would change
    nothing. A weight that is shared with another layer counts for both.
    """
    matrix_layers = [layer for layer in layers if layer.has_rule]
    own = [layer for layer in matrix_layers if any(id(p) in trained for p in layer.module.parameters())]
    ends = set()
    if own and options.exclude_first:
        ends.add(own[0].module_name)
    if own and options.exclude_last:
        ends.add(own[-1].module_name)
    excluded = {layer.name for layer in matrix_layers if layer.module_name in ends}
    for pattern in options.exclude:
        excluded |= {layer.name for layer in layers if _matches(layer.name, pattern)}
    return excluded


def _matches(name: str, pattern: str) -> bool:
    """Match the whole name, or its end from some dot on: `lifting.*` matches `net.lifting.fcs.0`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _norm_parameters(model: nn.Module, layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the layers that the parameters of each normalisation layer follow."""
    by_module: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        by_module[layer.module_name] = (*by_module.get(layer.module_name, ()), layer.name)
    modules = {clean_name(raw): module for raw, module in model.named_modules()}
    followed: dict[str, tuple[str, ...]] = {}
    for norm, feeder in norm_feeders(model, layers).items():
        for own in modules[norm]._parameters:
            followed[f"{norm}.{own}".removeprefix(".")] = by_module[feeder]
    return followed
