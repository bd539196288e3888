"""The layers that an allocation is about, as arrays, after their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farms_tb.options import check_integer, check_number, plain_value
from farms_tb.sparsity.filling import Floats
from farms_tb.sparsity.options import Granularity
from farms_tb.weights.blocks import BlockRule, blocks_of, name_in_block, split_number

Sizes = Mapping[str, int | Sequence[int]]
"""Entries of each layer, or the shape of its weight or of its stack of matrices."""


@dataclass(frozen=True)
class Layers:
    """The layers that share a target.

    Attributes:
        names: name of each layer, in order of depth.
        shapes: shape of each; empty where only its size is known.
        sizes: `(n,)` entries of each.
        alphas: `(n,)` power-law exponents; NaN where a layer has none.
        errors: `(n,)` their standard errors; NaN where they are not known.
        blocks: name of the block of each layer; empty strings where there are no blocks.
        units: `(n,)` which unit each layer belongs to, from 0 on; a unit has one sparsity.
        unit_names: name of each unit: a block's or a layer's.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: Floats
    alphas: Floats
    errors: Floats
    blocks: tuple[str, ...]
    units: NDArray[np.intp]
    unit_names: tuple[str, ...]

    @property
    def depths(self) -> NDArray[np.intp]:
        """Depth of each layer: the position of its block, or its own where there are no blocks."""
        return depths(self.names, self.blocks)

    @property
    def roles(self) -> tuple[str, ...]:
        """Name of each layer inside its block: `"mlp.up_proj"`."""
        return tuple(map(name_in_block, self.names, self.blocks))

    def unit_means(self, values: Floats) -> Floats:
        """Return the plain mean of a value of the layers over each unit, NaN for a unit without values.

        Args:
            values: `(n,)`, NaN where a layer has none.

        Returns:
            `(units,)` means.
        """
        known = np.isfinite(values)
        counts = np.bincount(self.units[known], minlength=len(self.unit_names))
        sums = np.bincount(self.units[known], weights=values[known], minlength=len(self.unit_names))
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def depths(names: Sequence[str], blocks: Sequence[str]) -> NDArray[np.intp]:
    """Return the depth of each layer: the position of its block, or its own where it is in none.

    Args:
        names: names of the layers, in order of depth.
        blocks: the block of each; empty for none.

    Returns:
        `(n,)` integers from 0 on, equal for layers of one block.
    """
    return positions([block or name for name, block in zip(names, blocks, strict=True)])


def positions(keys: Sequence[str]) -> NDArray[np.intp]:
    """Return the position of each key among the different ones, in order of first appearance."""
    index = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    return np.array([index[key] for key in keys], dtype=np.intp)


def checked_layers(
    alphas: Mapping[str, float | None],
    sizes: Sizes,
    blocks: Mapping[str, str] | BlockRule | None,
    errors: Mapping[str, float | None] | None,
    granularity: Granularity,
) -> Layers:
    """Check what was given of the layers, and return it as arrays.

    Args:
        alphas: alpha of each layer; None, NaN or no entry where it has none.
        sizes: entries or shape of each layer.
        blocks: block of each layer, or what tells it, see `farms_tb.weights.blocks.blocks_of`.
        errors: standard errors of the alphas.
        granularity: what gets a sparsity of its own.

    Returns:
        The layers in blocks; all layers where there are no blocks and none are needed.

    Raises:
        ValueError: a size is not positive, an alpha infinite, an error negative; there are no layers or no blocks.
        TypeError: `sizes` is not a mapping of names to integers or shapes, or an alpha is no number.
    """
    if not isinstance(sizes, Mapping) or not sizes:
        raise TypeError(f"sizes must hold the entries or the shape of each layer by name, got {sizes!r}")
    shapes = {name: _checked_shape(name, size) for name, size in sizes.items()}
    found = _checked_blocks(shapes, blocks, granularity)
    names = _in_depth(found)
    _check_same_names(alphas, names)
    own = tuple(map(found.__getitem__, names))
    keys = own if granularity == "block" else names
    return Layers(
        names=names,
        shapes=tuple(shapes[name] if isinstance(sizes[name], Sequence) else () for name in names),
        sizes=np.array([math.prod(shapes[name]) for name in names], dtype=np.float64),
        alphas=numbers("alphas", alphas, names),
        errors=numbers("errors", errors or {}, names, at_least=0),
        blocks=own,
        units=positions(keys),
        unit_names=tuple(dict.fromkeys(keys)),
    )


def _checked_shape(name: str, size: int | Sequence[int]) -> tuple[int, ...]:
    """Return a shape as plain integers, and a number of entries as a shape of one dimension."""
    sides = size if isinstance(size, Sequence) else (size,)
    shape = tuple(map(plain_value, sides))
    for side in shape:
        check_integer(f"sizes[{name!r}]", side, at_least=1)
    return shape


def _checked_blocks(
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Mapping[str, str] | BlockRule | None,
    granularity: Granularity,
) -> dict[str, str]:
    """Return the block of each layer that takes part, in the order of `shapes`.

    The names of the blocks are empty where there are none and none are needed.
    """
    found = _given(blocks, shapes) if isinstance(blocks, Mapping) else blocks_of(shapes, blocks)
    if found:
        return found
    if granularity == "matrix" and blocks is None:
        return dict.fromkeys(shapes, "")
    listed = ", ".join(map(repr, list(shapes)[:4]))
    raise ValueError(
        f"no blocks were found among the layers {listed}, ...: pass blocks, patterns of their paths such as "
        "['encoder.layers.*'] or the block of each layer by name; or granularity='matrix'"
    )


def _given(blocks: Mapping[str, str], shapes: Mapping[str, object]) -> dict[str, str]:
    """Return the blocks of a mapping; a layer whose block is None or empty takes no part."""
    unknown = [name for name in blocks if name not in shapes]
    if unknown:
        raise ValueError(f"blocks names {unknown[0]!r}, which sizes does not: pass the size of each layer")
    # A block may be called 0.
    return {name: str(blocks[name]) for name in shapes if blocks.get(name) not in (None, "")}


def _check_same_names(alphas: Mapping[str, float | None], names: Sequence[str]) -> None:
    """Refuse alphas of other layers: they would all count as missing."""
    if alphas and not any(name in alphas for name in names):
        raise ValueError(
            f"alphas and sizes have no layer in common: alphas has {next(iter(alphas))!r}, the layers to prune "
            f"begin with {names[0]!r}"
        )


def numbers(argument: str, values: Mapping[str, float | None], names: Sequence[str], **bounds: float) -> Floats:
    """Return a number for each name, NaN where there is none.

    Args:
        argument: what the values are called, for messages.
        values: by name; None, NaN or no entry for none.
        names: of layers, or of units.
        bounds: as for `check_number`.

    Raises:
        TypeError: not a number.
        ValueError: infinite, or out of bounds.
    """
    found = np.full(len(names), np.nan)
    for index, name in enumerate(names):
        value = plain_value(values.get(name))
        if value is None or value != value:
            continue
        check_number(f"{argument}[{name!r}]", value, **bounds)
        found[index] = value
    return found


def _in_depth(blocks: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of layers in order of depth, as far as names tell.

    Blocks of one list go by their numbers, `layers.2` before `layers.10` in whatever order the layers come. Lists,
    blocks without a number, and the layers of one block keep the order in which they come.
    """
    first: dict[str, int] = {}
    for position, block in enumerate(blocks.values()):
        first.setdefault(split_number(block)[0], position)

    def depth(name: str) -> tuple[int, int]:
        before, number = split_number(blocks[name])
        return first[before], number

    return tuple(sorted(blocks, key=depth))
