"""The difference of two models' weights, layer by layer: how large it is, of which rank, and its own alpha.

Fine-tuning changes a weight W to W + D. D is small against W and hardly moves the alpha of W, but its own spectrum
says how many directions were changed: few for a merged low-rank update, many for full fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import zip_longest

import torch

from farms_tb.cli.measuring import FAILURES, MeasureRequest, Reading, failure
from farms_tb.cli.pairing import Pair
from farms_tb.cli.sources import Source
from farms_tb.cli.tables import Row
from farms_tb.report import OK
from farms_tb.spectra.permutation_null import weight_record
from farms_tb.spectra.stored_precision import stored_roundoff
from farms_tb.weights.norms import frobenius_norm
from farms_tb.weights.stacks import MatrixStack

NO_DIFFERENCE: Row = {"difference_norm": None, "difference_rank": None, "difference_alpha": None, "status": OK}
"""The metrics of a layer whose weights have no difference D = B - A.

- `difference_norm`: ||D||_F / ||A||_F; None where A is zero, or a weight has an entry that is not finite.
- `difference_rank`: directions of the whole matrices that hold 99 % of the energy of D; 0 where it is zero.
- `difference_alpha`: that of D; None where it has none, as one of low rank, whose tail is made of the rounding
  errors that A and B were stored with.
- `status`: why D could not be measured.
"""


@dataclass
class Differences(Reading):
    """The differences of the weights that were measured so far.

    Attributes:
        by_layer: the metrics that `NO_DIFFERENCE` explains, for each layer by the name of its pair.
    """

    by_layer: dict[str, Row] = field(default_factory=dict)


def weight_differences(sources: Sequence[Source], pairs: Iterable[Pair], request: MeasureRequest) -> Differences:
    """Measure the difference of each weight that two models share.

    Both models are read once more, side by side: where their layers come in the same order, one weight of each is
    in memory at a time.

    Returns:
        What was measured until Ctrl-C or until reading failed; weights of different shapes are left out.
    """
    shared = [pair for pair in pairs if pair.in_both]
    names = ({pair.name_in_a: pair.name for pair in shared}, {pair.name_in_b: pair.name for pair in shared})
    found = Differences()
    waiting: tuple[dict[str, MatrixStack], dict[str, MatrixStack]] = ({}, {})
    with found.until_stopped():
        for layers in zip_longest(*(source.read(source.items) for source in sources)):
            for side, layer in enumerate(layers):
                if layer is None:
                    continue
                found.at, weight = layer
                name = names[side].get(found.at)
                if name is None or not isinstance(weight, MatrixStack):
                    continue
                other = waiting[1 - side].pop(name, None)
                if other is None:
                    waiting[side][name] = weight
                    continue
                first, second = (weight, other) if side == 0 else (other, weight)
                if first.matrices.shape == second.matrices.shape:
                    found.by_layer[name] = _attempt(first, second, request)
    if found.stopped:
        found.stopped = f"differences of the weights, {found.stopped}"
    return found


def _attempt(first: MatrixStack, second: MatrixStack, request: MeasureRequest) -> Row:
    """Return the metrics of the difference of two weights of one shape; where that fails, the status says why."""
    try:
        return {**NO_DIFFERENCE, **_difference(first, second, request)}
    except FAILURES as error:
        return {**NO_DIFFERENCE, "status": f"B - A: {failure(error)}"}


def _difference(first: MatrixStack, second: MatrixStack, request: MeasureRequest) -> Row:
    """Return what is known of the difference of two weights of one shape."""
    types = (stack.matrices.dtype for stack in (first, second))
    # Types of eight bits have no common type with others.
    dtype = reduce(torch.promote_types, (own for own in types if own.itemsize > 1), torch.float32)
    before, after = (stack.matrices.to(request.device, dtype) for stack in (first, second))
    change = after - before
    size, distance = float(frobenius_norm(before)), float(frobenius_norm(change))
    if not math.isfinite(size + distance):
        return {}
    if distance == 0:
        return {"difference_norm": 0.0, "difference_rank": 0}
    stack = replace(second, matrices=change)
    whole = weight_record(stack, replace(request.options, esd="full"))
    windows = weight_record(stack, request.options)
    is_rounding = windows.xmin is not None and windows.xmin < _rounding_edge(first, second)
    return {
        "difference_norm": distance / size if size else None,
        "difference_rank": whole.rank_99,
        "difference_alpha": None if is_rounding else windows.alpha,
    }


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
