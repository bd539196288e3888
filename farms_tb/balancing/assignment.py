"""Who takes part in balancing, and which parameter takes which layer's learning-rate ratio.

A layer (`farms_tb.weights.layers.Layer`) has matrices and so an alpha and a ratio. A parameter takes the ratio of
the layer that it is part of: weight and bias alike. A matrix has one ratio, whatever layers share it: what leaves
one of them out leaves out all. Norms may follow the layer before them, or the block that they are in. All other
parameters keep ratio 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from farms_tb.balancing.norms import layers_before_norms
from farms_tb.balancing.selection import (
    blocks_of_layers,
    check_packed,
    check_patterns,
    fixed_ratios,
    heads,
    layers_matching,
    names_by,
    packed_layers,
)
from farms_tb.options import Adapters, Kind, RatioOptions
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import Layer, checked_layers, has_adapters, own_matrices
from farms_tb.weights.names import clean_name, counted, named_parameters

Owners = Mapping[str, tuple[str, ...]]
"""Names of the layers that a parameter belongs to, by the parameter's name."""


@dataclass(frozen=True)
class Assignment:
    """The layers of a model and their parameters.

    Attributes:
        layers: the layers, in order of registration.
        owners: the layers that each parameter is part of. The packed q, k and v of attention have three.
        followed: the layers whose ratio each parameter takes: its owners, and for the parameters of a
            normalisation layer with `norms="follow"` the layer before it. With `unit="block"` a parameter of
            no layer that is inside a block follows the block, by its path.
        packed: the layers of each parameter that holds several, as q, k and v of attention or gates of an LSTM.
        held_by: the layers that hold the matrix of each layer that has none of its own: the embedding for a tied
            head, or the other way round.
        excluded: the layers that `exclude` and `exclude_heads` leave out.
        fixed_layers: the ratio of each layer that the option `fixed` names; these take no part in the map.
        fixed_parameters: the ratio of each parameter that `fixed` names, whatever layer it follows.
        blocks: with `unit="block"` the block of each layer that is in one; None with `unit="layer"`.
    """

    layers: Sequence[Layer]
    owners: Owners
    followed: Owners
    packed: Owners
    held_by: Owners
    excluded: frozenset[str]
    fixed_layers: Mapping[str, float]
    fixed_parameters: Mapping[str, float]
    blocks: Mapping[str, str] | None


def assign(model: nn.Module, options: RatioOptions, *, embeddings: bool, adapters: Adapters) -> Assignment:
    """Find the layers of a model, and which parameter takes whose ratio.

    Args:
        model: the model.
        options: `exclude`, `exclude_heads`, `fixed` and `norms` are used.
        embeddings: whether lookup tables count as layers.
        adapters: what a layer with adapters is measured on.

    Raises:
        TypeError: not a module.
        ValueError: no layer that can be analysed; a pattern of `exclude` or `fixed` that matches nothing; patterns
            that name a part of the layers that are one parameter; or `exclude_heads` with a model that is none of
            transformers.
    """
    layers = checked_layers(model, embeddings=embeddings, adapters=adapters)
    _warn_of_adapters(model, layers)
    check_patterns(layers, "exclude", options.exclude)
    packed, held_by = packed_layers(layers), _held_by(model, layers)
    of_layers, of_parameters = fixed_ratios(model, layers, options.fixed_pairs, held_by)
    owners = names_by(layers, lambda layer: layer.parameters)
    excluded = {name for pattern in options.exclude for name in layers_matching(layers, pattern)}
    check_packed(packed, "exclude", dict.fromkeys(excluded, 1.0))
    check_packed(packed, "fixed", of_layers)
    if options.exclude_heads:
        excluded.update(heads(model, layers))
    blocks, followed = None, {}
    if options.unit == "block":
        blocks = blocks_of_layers(layers, options.blocks)
        followed = _parameters_inside(model, set(blocks.values()))
    elif options.norms == "follow":
        followed = _norm_parameters(model, layers)
    # A parameter that is shared with a layer stays with it.
    followed |= owners
    return Assignment(
        layers, owners, followed, packed, held_by, frozenset(excluded), of_layers, of_parameters, blocks
    )


def _warn_of_adapters(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Warn of layers whose adapters are trained and cannot be measured."""
    unclear = [layer for layer in layers if layer.problem and has_adapters(layer)]
    if unclear:
        first = unclear[0]
        warn_once(
            f"ratio 1 for {counted(len(unclear), 'layer')} with adapters that cannot be measured. The first is "
            f"{first.name}: {first.problem}",
            model,
        )


def _held_by(model: nn.Module, layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return which layers hold the matrices of each layer that holds none itself, as of a tied head."""
    parameters = named_parameters(model)
    holders = names_by(layers, lambda layer: [id(parameters[name]) for name in layer.parameters])
    found = {}
    for layer in layers:
        of_matrices = [holders.get(id(matrix), ()) for matrix in own_matrices(layer)]
        names = dict.fromkeys(name for own in of_matrices for name in own)
        if names and layer.name not in names:
            found[layer.name] = tuple(names)
    return found


def _norm_parameters(model: nn.Module, layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the layers that the parameters of each normalisation layer follow."""
    by_module = names_by(layers, lambda layer: [layer.module_name])
    modules = {clean_name(raw): module for raw, module in model.named_modules()}
    followed: dict[str, tuple[str, ...]] = {}
    for norm, before in layers_before_norms(model, layers).items():
        prefix = f"{norm}." if norm else ""
        for own in modules[norm]._parameters:
            followed[prefix + own] = by_module[before]
    return followed


def _parameters_inside(model: nn.Module, blocks: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the block that each parameter inside of one follows."""
    followed: dict[str, tuple[str, ...]] = {}
    for name in named_parameters(model):
        for block in blocks:
            if name.startswith(f"{block}."):
                followed[name] = (block,)
    return followed


def trained_layers(layers: Sequence[Layer], trained: Mapping[str, nn.Parameter]) -> list[Layer]:
    """Return the layers that have a parameter which is trained, in their order."""
    return [layer for layer in layers if not trained.keys().isdisjoint(layer.parameters)]


def members(
    assignment: Assignment, options: RatioOptions, trained: Mapping[str, nn.Parameter]
) -> dict[Kind, list[str]]:
    """Return the names of the layers that are balanced, for each kind that is balanced within itself.

    A layer takes part where it is trained, can be measured, is not excluded and has no fixed ratio; with
    `unit="block"` only where it is in a block.

    Args:
        assignment: the layers of the model, and which are excluded or fixed.
        options: `exclude_first`, `exclude_last` and the kinds are used.
        trained: the parameters that an optimizer trains, by name.

    Returns:
        A list for each kind of `options.balance`, in the order of the layers; empty where no layer takes part.
    """
    left_out = assignment.excluded | assignment.fixed_layers.keys()
    if assignment.blocks is None:
        left_out |= _first_and_last(assignment.layers, options, trained)
    else:
        left_out |= {layer.name for layer in assignment.layers} - assignment.blocks.keys()
    # A matrix that one of its layers keeps at the base rate is kept there.
    left_out = left_out.union(*(assignment.held_by.get(name, ()) for name in left_out))
    taking_part: dict[Kind, list[str]] = {kind: [] for kind in options.balance}
    for layer in trained_layers(assignment.layers, trained):
        if layer.problem or layer.name in left_out:
            continue
        if layer.kind in taking_part:
            taking_part[layer.kind].append(layer.name)
    return taking_part


def _first_and_last(
    layers: Sequence[Layer], options: RatioOptions, trained: Mapping[str, nn.Parameter]
) -> set[str]:
    """Return the names of the layers that `exclude_first` and `exclude_last` mean.

    They are those of the layers that are trained: excluding a layer that is frozen would change nothing. A weight
    that is shared with another layer counts for both.
    """
    if not (options.exclude_first or options.exclude_last):
        return set()
    ids = set(map(id, trained.values()))
    with_matrices = [layer for layer in layers if layer.has_rule]
    own = [layer.module_name for layer in with_matrices if _is_trained(layer, ids)]
    ends: set[str] = set()
    if options.exclude_first:
        ends.update(own[:1])
    if options.exclude_last:
        ends.update(own[-1:])
    # By module, because the parts of one module (q, k and v) are excluded together.
    return {layer.name for layer in with_matrices if layer.module_name in ends}


def _is_trained(layer: Layer, trained: Collection[int]) -> bool:
    """Return whether the module of a layer has a parameter that is trained."""
    return any(id(parameter) in trained for parameter in layer.module.parameters())


def block_leaders(assignment: Assignment, taking_part: Mapping[Kind, Sequence[str]]) -> dict[str, str]:
    """Return for each block one layer that has its ratio; empty with `unit="layer"`.

    Args:
        assignment: the blocks of the layers.
        taking_part: the layers that are balanced, by kind, as `members` returns them.

    Returns:
        The first layer of each block that takes part, by the block's path. A block without any is left out.
    """
    if assignment.blocks is None:
        return {}
    balanced = {name for names in taking_part.values() for name in names}
    leaders: dict[str, str] = {}
    for layer in assignment.layers:
        if layer.name in balanced:
            leaders.setdefault(assignment.blocks[layer.name], layer.name)
    return leaders


def with_shared_ratios(
    ratios: Mapping[str, float], assignment: Assignment, options: RatioOptions, counted: Collection[str]
) -> dict[str, float]:
    """Return ratios of layers as their matrices are stepped with: layers that share a matrix have one ratio.

    Those whose matrices are one parameter, as q, k and v of attention can be, have the mean of their ratios, see
    `ratio_of_parameter`; a layer that shares the matrix of another one has that one's.

    Args:
        ratios: ratio of each layer by name.
        assignment: which layers share what.
        options: `ratio_levels` is used.
        counted: the layers whose ratios count in a mean. A layer without an alpha has none to add.
    """
    shared = dict(ratios)
    for names in assignment.packed.values():
        having = [name for name in names if name in counted] or names
        shared.update(dict.fromkeys(names, ratio_of_parameter(having, ratios, options)))
    for name, holders in assignment.held_by.items():
        if name in shared:
            shared[name] = ratio_of_parameter(holders, shared, options)
    return shared


def ratio_of_parameter(followed: Iterable[str], ratios: Mapping[str, float], options: RatioOptions) -> float:
    """Return the ratio of a parameter: the mean of those of the layers that it follows, and 1 where there is none.

    With `ratio_levels` a mean of several is rounded to the nearest of the layers' ratios, so that no further
    learning rate comes up.

    Args:
        followed: names of the layers, or of the block, that the parameter follows.
        ratios: ratio of each layer and block by name.
        options: `ratio_levels` is used.
    """
    own = [ratios.get(layer, 1.0) for layer in followed]
    if not own:
        return 1.0
    if len(set(own)) == 1:
        return own[0]
    mean = fmean(own)
    if options.ratio_levels is None:
        return mean
    return min(ratios.values(), key=lambda ratio: (abs(ratio - mean), ratio))


def ratios_of_parameters(
    names: Iterable[str], assignment: Assignment, ratios: Mapping[str, float], options: RatioOptions
) -> dict[str, float]:
    """Return the ratio of each parameter of a model by name: the fixed one, else see `ratio_of_parameter`.

    Args:
        names: names of the model's parameters.
        assignment: the layers that each parameter follows, and the fixed ratios.
        ratios: ratio of each layer by name, and of each block by path.
        options: `ratio_levels` is used.
    """
    followed = assignment.followed
    found = {name: ratio_of_parameter(followed.get(name, ()), ratios, options) for name in names}
    return found | dict(assignment.fixed_parameters)
