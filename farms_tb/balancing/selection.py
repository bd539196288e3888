"""Which layers and parameters an option names: by pattern, or as heads of a language model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from farms_tb.printable import printable
from farms_tb.weights.blocks import blocks_of
from farms_tb.weights.layers import Layer
from farms_tb.weights.names import clean_name, named_parameters

_K = TypeVar("_K", bound=Hashable)


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a whole name, or its end from some dot on.

    `lifting.*` matches `net.lifting.fcs.0`, and `embed*` matches `model.embed_tokens`.

    Args:
        name: name of a layer, module or parameter.
        pattern: a pattern of `fnmatch`, in which case counts.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def layers_matching(layers: Sequence[Layer], pattern: str) -> list[str]:
    """Return the names of the layers that a pattern matches, see `matches`.

    The name of a module that holds several weights, such as `attention` or `lstm`, stands for all of them.
    """
    return [layer.name for layer in layers if matches(layer.name, pattern) or matches(layer.module_name, pattern)]


def parameters_matching(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of the parameters that a pattern matches, see `matches`, or whose module it matches."""
    found = []
    for name in named_parameters(model):
        module = name.rpartition(".")[0]
        if matches(name, pattern) or matches(module, pattern):
            found.append(name)
    return found


def check_patterns(layers: Sequence[Layer], argument: str, patterns: Iterable[str]) -> None:
    """Raise a ValueError that lists the layers where a pattern of an option, `argument`, matches none."""
    for pattern in patterns:
        if not layers_matching(layers, pattern):
            raise ValueError(f"{argument}={pattern!r} matches no layer; the layers are {_listed(layers)}")


def names_by(layers: Sequence[Layer], keys: Callable[[Layer], Iterable[_K]]) -> dict[_K, tuple[str, ...]]:
    """Return the names of the layers that have each key, in the order of the layers.

    Args:
        layers: the layers of a model.
        keys: returns the keys of a layer, the names of its parameters for example.
    """
    names: dict[_K, tuple[str, ...]] = {}
    for layer in layers:
        for key in keys(layer):
            names[key] = (*names.get(key, ()), layer.name)
    return names


def packed_layers(layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the layers whose matrices are one parameter, by its name: q, k and v of attention say."""
    owners = names_by(layers, lambda layer: layer.matrices)
    return {matrix: together for matrix, together in owners.items() if len(together) > 1}


def check_packed(packed: Mapping[str, Sequence[str]], argument: str, named: Mapping[str, float]) -> None:
    """Raise where some of the layers that are one parameter are named and others not, or with another ratio.

    Args:
        packed: the layers of each such parameter.
        argument: name of the option, for the message.
        named: the layers that the option names, with their ratio.

    Raises:
        ValueError: the message names the layers and the parameter.
    """
    for matrix, together in packed.items():
        if len({named.get(layer) for layer in together}) > 1:
            raise ValueError(
                f"{argument} names a part of {', '.join(map(printable, together))}, which are one parameter, "
                f"{printable(matrix)}, and take steps together: name all of them, or their module"
            )


def fixed_ratios(
    model: nn.Module,
    layers: Sequence[Layer],
    fixed: Iterable[tuple[str, float]],
    held_by: Mapping[str, Sequence[str]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ratios that the option `fixed` gives to layers and to parameters, by their names.

    A layer whose matrices are all named as parameters is fixed as well, and so is a matrix whose layers are all
    named: it may have the name of another module that shares it. Where several patterns match, the first counts.

    Args:
        model: the model.
        layers: its layers.
        fixed: patterns and their ratios.
        held_by: for layers that share the matrix of others the names of these.

    Raises:
        ValueError: a pattern matches neither a layer nor a parameter.
    """
    of_layers: dict[str, float] = {}
    of_parameters: dict[str, float] = {}
    matrices = {layer.name: set(layer.matrices) for layer in layers}
    for pattern, ratio in fixed:
        named = set(layers_matching(layers, pattern))
        named = named.union(*(held_by.get(name, ()) for name in named))
        parameters = {*parameters_matching(model, pattern), *_held_by_these_alone(named, matrices)}
        matched = named | {layer for layer, own in matrices.items() if own and own <= parameters}
        if not matched and not parameters:
            raise ValueError(
                f"fixed={{{pattern!r}: {ratio!r}}} matches no layer and no parameter; the layers are "
                f"{_listed(layers)}"
            )
        of_layers = dict.fromkeys(sorted(matched), ratio) | of_layers
        of_parameters = dict.fromkeys(sorted(parameters), ratio) | of_parameters
    return of_layers, of_parameters


def _held_by_these_alone(names: Collection[str], matrices: Mapping[str, set[str]]) -> set[str]:
    """Return the matrices of these layers that no other layer has a part of, as q, k and v of attention have."""
    held: set[str] = set()
    of_others: set[str] = set()
    for layer, own in matrices.items():
        (held if layer in names else of_others).update(own)
    return held - of_others


def blocks_of_layers(layers: Sequence[Layer], patterns: Sequence[str]) -> dict[str, str]:
    """Return the block that each layer is in; layers outside of blocks are left out.

    Args:
        layers: the layers of the model.
        patterns: the option `blocks`; empty to find them.

    Raises:
        ValueError: there are no blocks, or a pattern matches none that another one leaves.
    """
    shapes = {layer.name: layer.shape for layer in layers if layer.has_rule}
    found = blocks_of(shapes, patterns or None)
    if not found and not patterns:
        raise ValueError(
            "unit='block' finds no repeated blocks in the model: name them, as in blocks=['encoder.layer.*']; the "
            f"layers are {_listed(layers)}"
        )
    for pattern in patterns:
        own = set(blocks_of(shapes, [pattern]).values())
        if not own:
            raise ValueError(f"blocks={pattern!r} matches no block of layers; the layers are {_listed(layers)}")
        inside = sorted(own - set(found.values()))
        if inside:
            first = printable(inside[0])
            raise ValueError(f"blocks={pattern!r} overlaps another pattern: {first} is inside another block")
    return found


def heads(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Return the layers of a transformers model that are not in its base model, such as `lm_head`.

    Args:
        model: the model, or one that holds it.
        layers: the layers of `model`.

    Returns:
        Their names; none where the base model itself is trained.

    Raises:
        ValueError: no module is a transformers model, which says by `base_model_prefix` where its base model is.
    """
    wholes = {}  # the name of the base model in each model, by the path of the model
    for path, module in model.named_modules():
        prefix = getattr(module, "base_model_prefix", None)
        if isinstance(prefix, str):
            wholes[clean_name(path)] = prefix if isinstance(getattr(module, prefix, None), nn.Module) else ""
    if not wholes:
        raise ValueError(
            "exclude_heads=True needs a transformers model, whose base_model_prefix tells its heads: name the "
            "heads in exclude=[...] instead"
        )
    return [layer.name for layer in layers if _is_head(layer.module_name, wholes)]


def _is_head(name: str, wholes: Mapping[str, str]) -> bool:
    """Return whether a module is inside a transformers model, and outside of its base model."""
    for path, prefix in wholes.items():
        inside = f"{path}." if path else ""
        if prefix and name.startswith(inside) and not name.startswith(f"{inside}{prefix}."):
            return True
    return False


def _listed(layers: Sequence[Layer]) -> str:
    return ", ".join(printable(layer.name) for layer in layers)
