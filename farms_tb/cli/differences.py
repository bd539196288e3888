"""The difference of two models' weights, layer by layer: how large it is, of which rank, and its own alpha.

Fine-tuning changes a weight W to W + D. D is small against W and hardly moves the alpha of W, but its own spectrum
says how many directions were changed: few for a merged low-rank update, many for full fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch

from farms_tb.cli.measuring import MeasureRequest
from farms_tb.cli.messages import say
from farms_tb.cli.pairing import Pair
from farms_tb.cli.sources import Source
from farms_tb.cli.tables import Row
from farms_tb.spectra.permutation_null import weight_record
from farms_tb.spectra.stored_precision import stored_roundoff
from farms_tb.weights.stacks import MatrixStack


@dataclass(frozen=True)
class Difference:
    """The difference D = B - A of a weight in two models.

    Attributes:
        relative_norm: ||D||_F / ||A||_F; None where A is zero, or a weight has an entry that is not finite.
        rank: directions of the whole matrices that hold 99 % of the energy of D; 0 where it is zero.
        alpha: that of D; None where it has none, as one of low rank, whose tail is made of the rounding errors
            that A and B were stored with.
    """

    relative_norm: float | None
    rank: int | None
    alpha: float | None


def with_differences(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[Row]:
    """Add the differences of the weights to the rows of a comparison; None where there is none.

    Args:
        rows: one for each layer.
        differences: by the name that a row has.
    """
    added: list[Row] = []
    for row in rows:
        found = differences.get(row["layer"], Difference(None, None, None))
        metrics = {
            "difference_norm": found.relative_norm,
            "difference_rank": found.rank,
            "difference_alpha": found.alpha,
        }
        added.append({**row, **metrics, "status": row["status"]})
    return added


def weight_differences(
    sources: Sequence[Source], pairs: Iterable[Pair], request: MeasureRequest
) -> dict[str, Difference]:
    """Measure the difference of each weight that two models share.

    Both models are read once more, side by side: where their layers come in the same order, one weight of each is
    in memory at a time.

    Args:
        sources: the two models.
        pairs: the layers of both; those of one alone are left out.
        request: what is measured, and on which device.

    Returns:
        By the name of the pair. What was measured, with a sentence on stderr, where reading fails; weights of
        different shapes are left out.
    """
    shared = [pair for pair in pairs if pair.in_both]
    names = ({pair.name_in_a: pair.name for pair in shared}, {pair.name_in_b: pair.name for pair in shared})
    found: dict[str, Difference] = {}
    waiting: tuple[dict[str, MatrixStack], dict[str, MatrixStack]] = ({}, {})
    try:
        for layers in zip_longest(*(source.read(source.items) for source in sources)):
            for side, layer in enumerate(layers):
                if layer is None or not isinstance(layer[1], MatrixStack):
                    continue
                name, weight = names[side].get(layer[0]), layer[1]
                if name is None:
                    continue
                other = waiting[1 - side].pop(name, None)
                if other is None:
                    waiting[side][name] = weight
                    continue
                first, second = (weight, other) if side == 0 else (other, weight)
                if first.matrices.shape == second.matrices.shape:
                    found[name] = _difference(first, second, request)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"The differences of the weights are not complete: {error}", style="red")
    return found


def _difference(first: MatrixStack, second: MatrixStack, request: MeasureRequest) -> Difference:
    """Return the metrics of the difference of two weights of one shape."""
    # Types of eight bits have no common type with others.
    widened = [torch.promote_types(_widened(stack.matrices.dtype), torch.float32) for stack in (first, second)]
    dtype = torch.promote_types(*widened)
    before, after = (stack.matrices.to(request.device, dtype) for stack in (first, second))
    change = after - before
    size, distance = float(before.norm()), float(change.norm())
    if not math.isfinite(size + distance):
        return Difference(None, None, None)
    if distance == 0:
        return Difference(0.0, 0, None)
    stack = replace(second, matrices=change)
    whole = weight_record(stack, replace(request.options, esd="full"))
    windows = weight_record(stack, request.options)
    is_rounding = windows.xmin is not None and windows.xmin < _rounding_edge(first, second)
    return Difference(
        relative_norm=distance / size if size else None,
        rank=whole.rank_99,
        alpha=None if is_rounding else windows.alpha,
    )


def _widened(dtype: torch.dtype) -> torch.dtype:
    """Return single precision for a type of eight bits."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def _rounding_edge(*stacks: MatrixStack) -> float:
    """Return the largest eigenvalue that the rounding errors of stored weights make in their difference.

    Entries of mean square s^2, stored with unit roundoff u, have errors of variance u^2 s^2 / 3, and a random
    R x C matrix of these the largest eigenvalue u^2 s^2 / 3 (sqrt(R) + sqrt(C))^2.
    """
    _, rows, columns = stacks[0].matrices.shape
    variance = 0.0
    for stack in stacks:
        mean_square = float(stack.matrices.abs().double().square().mean())
        variance += stored_roundoff(stack.matrices.dtype) ** 2 / 3 * mean_square
    return stacks[0].eigenvalue_scale * variance * (math.sqrt(rows) + math.sqrt(columns)) ** 2
