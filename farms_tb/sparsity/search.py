"""The allocation that the data prefer.

Alpha, a straight line in depth and the uniform allocation are hypotheses on where a model can spare weights. Here
the model decides: with directions d_k, each from -1 to 1 over the layers, the candidates are

    r = max(0, 1 + sum_k c_k d_k),    sparsities in proportion to r, scaled to the target,

where d is the line in depth, the linear map of alpha and that of its shrunk effects. All c = 0 is the uniform
allocation. Each candidate is carried out on the model, and judged by the loss on batches held back from the
pruning; the weights are put back afterwards. The coefficients are found by compass search, within a budget of
candidates.

The best of many candidates looks better than it is on the batches that chose it. So a part of the batches takes no
part in the search: the winner is taken only where it beats the uniform allocation on these in a one-sided paired
t-test at the significance level of 2.5 %. With a margin of one standard error, an allocation that is no better
would pass one time in six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from farms_tb.sparsity import ratios
from farms_tb.sparsity.calibration import Batch, checked_batches
from farms_tb.sparsity.compass import Point, compass_search
from farms_tb.sparsity.evaluating import call_on_copy, evaluating
from farms_tb.sparsity.filling import Filling, Floats
from farms_tb.sparsity.layers import Layers
from farms_tb.sparsity.options import PRUNE_METHODS, SparsityOptions
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.prunable import planned_weights
from farms_tb.sparsity.prune import prune
from farms_tb.sparsity.shrinkage import by_shrinkage
from farms_tb.sparsity.student import standard_error, t_quantile

FEWEST_BATCHES = 12
"""Half of the batches prune, a quarter chooses, a quarter confirms, which takes at least three for an error."""


def searched(
    layers: Layers,
    filling: Filling,
    options: SparsityOptions,
    make_plan: Callable[[Floats], SparsityPlan],
    model: nn.Module | None,
    calibration: Iterable[Batch] | None,
) -> SparsityPlan:
    """Search for the allocation with the smallest loss.

    Args:
        layers: the layers, their alphas as they are mapped.
        filling: target and bounds.
        options: how to prune, the budget, and the first step (`epsilon`).
        make_plan: returns the plan of sparsities `(n,)`.
        model: the model; its weights are put back after each candidate.
        calibration: batches, dicts of keyword arguments for the model.

    Returns:
        The best plan, or the uniform one. Its options hold the coefficients, and the losses in the entry `search`.

    Raises:
        TypeError: `model` is no module.
        ValueError: model or data are missing, there are too few batches, or a batch has no loss.
    """
    if model is None or calibration is None:
        raise ValueError(
            "method='search' tries allocations on the model: pass model and calibration, an iterable of dicts of "
            "keyword arguments for it"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    pruning, choosing, confirming = _split(checked_batches(model, calibration, required=True))
    directions, method = _directions(layers), options.prune_method
    confirmed: dict[Point, Floats] = {}

    def plan_of(point: Point) -> SparsityPlan:
        shift = np.zeros(len(layers.names))
        for c, direction in zip(point, directions.values(), strict=True):
            shift += c * direction
        return make_plan(filling.proportional(np.maximum(1 + shift, 0.0)))

    def loss_of(point: Point) -> float:
        """Return the mean loss of a candidate, infinity where it is not finite; note what confirms it."""
        plan = plan_of(point)
        with weights_put_back(model, plan):
            # Magnitude would run the batches only to report errors that nobody reads.
            prune(model, plan, method, calibration=pruning if PRUNE_METHODS[method].needs_inputs else None)
            loss = float(np.mean(_losses(model, choosing)))
            confirmed[point] = _losses(model, confirming)
        return loss if math.isfinite(loss) else math.inf

    uniform = (0.0,) * len(directions)
    if directions:
        values = compass_search(loss_of, uniform, options.evaluations, options.epsilon, options.epsilon / 8)
    else:
        values = {uniform: loss_of(uniform)}
    best = min(values, key=values.__getitem__)
    differences = confirmed[best] - confirmed[uniform]
    difference, error = float(np.mean(differences)), standard_error(differences)
    is_better = difference < -error * t_quantile(len(confirming) - 1)
    if not is_better:
        best, difference, error = uniform, 0.0, 0.0
    found = {
        "coefficients": dict(zip(directions, best, strict=True)),
        "evaluations": len(values),
        "difference": difference,
        "difference_error": error,
        "prune_method": method,
    }
    plan = plan_of(best)
    return replace(
        plan,
        epsilon=_half_width(plan),
        options={**plan.options, "search": found},
        notes=(*plan.notes, _note(found, is_better)),
    )


def model_loss(model: nn.Module, batch: Batch) -> float:
    """Return the loss of a model on a batch: its own, or that of predicting the next token.

    Args:
        model: called with the batch as keyword arguments.
        batch: with `labels`, for a model of transformers that returns a loss; or with `input_ids` `(N, T)`, for
            one that returns logits `(N, T, vocabulary)`; padding, where an `attention_mask` `(N, T)` is zero, is
            not predicted then.

    Returns:
        The mean loss over the batch.

    Raises:
        ValueError: the model returns neither a loss nor such logits, or all tokens are padding.
    """
    output = call_on_copy(model, batch)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return float(loss)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    ids = batch.get("input_ids")
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}: add labels to each "
            "batch, or wrap the model in one whose output has a loss"
        )
    predicted = _predicted(batch, ids).to(logits.device)
    targets = ids[:, 1:].to(logits.device)[predicted]
    return float(functional.cross_entropy(logits[:, :-1][predicted].float(), targets).detach())


def _predicted(batch: Batch, ids: Tensor) -> Tensor:
    """Return which tokens after the first are predicted, `(N, T - 1)`: those that follow one, no padding."""
    mask = batch.get("attention_mask")
    known = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    predicted = known[:, 1:] & known[:, :-1]
    if not predicted.any():
        raise ValueError(
            f"a batch of calibration has no token to predict: expected input_ids with two tokens in a row that "
            f"attention_mask shows, got shape {tuple(ids.shape)}; leave the batch out"
        )
    return predicted


@contextmanager
def weights_put_back(model: nn.Module, plan: SparsityPlan) -> Iterator[None]:
    """Put the planned weights of a model back when the block ends, however it ends.

    Args:
        model: a model whose weights are changed in place.
        plan: which of them; a copy of these is in memory meanwhile.
    """
    before = [(weight, weight.tensor.clone()) for weight in planned_weights(model, plan)]
    try:
        yield
    finally:
        for weight, values in before:
            weight.tensor.copy_(values)


def _losses(model: nn.Module, batches: Sequence[Batch]) -> Floats:
    """Return the loss of each batch, in evaluation mode and without gradients."""
    with evaluating(model):
        return np.array([model_loss(model, batch) for batch in batches], dtype=np.float64)


def _split(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch], Sequence[Batch]]:
    """Deal batches in turn to their purposes: pruning, choosing among candidates, confirming the winner."""
    if len(batches) < FEWEST_BATCHES:
        raise ValueError(
            f"method='search' needs at least {FEWEST_BATCHES} batches of calibration, got {len(batches)}: half of "
            "them prune, a quarter chooses, a quarter confirms"
        )
    return batches[0::2], batches[1::4], batches[3::4]


def _directions(layers: Layers) -> dict[str, Floats]:
    """Return the directions by name, `(n,)` each, from -1 to 1.

    Those that are zero, without alphas for example, and those that are the same as another one are left out.
    """
    found = {
        "line": ratios.line(layers.depths, 1.0) - 1,
        "alpha": ratios.by_alpha(layers, 1.0) - 1,
        "shrinkage": by_shrinkage(layers, 1.0) - 1,
    }
    kept: dict[str, Floats] = {}
    for name, direction in found.items():
        known = any(np.allclose(direction, other) for other in kept.values())
        if np.any(direction) and not known:
            kept[name] = direction
    return kept


def _half_width(plan: SparsityPlan) -> float:
    """Return the half-width of the sparsities of a plan, relative to their middle; 0 for an empty range."""
    low, high = min(plan.sparsity.values()), max(plan.sparsity.values())
    return 0.0 if high == low else (high - low) / (high + low)


def _note(found: Mapping[str, Any], is_better: bool) -> str:
    """Return what the search cost and found, as a sentence."""
    cost = f"search pruned the model {found['evaluations']} times by {found['prune_method']}"
    apart = "on batches that took no part in it"
    if not is_better:
        return f"{cost}: no allocation was better than uniform {apart}, so this is uniform"
    gain = f"{-found['difference']:.4f} ± {found['difference_error']:.4f}"
    return f"{cost}: the loss is {gain} below uniform, {apart}"
