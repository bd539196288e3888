"""Carry out a plan: zero the entries of a model's weights, block after block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from farms_tb.options import check_choice
from farms_tb.printable import printable
from farms_tb.sparsity.calibration import Batch, checked_batches
from farms_tb.sparsity.checkpoint import Checkpoint, open_checkpoint
from farms_tb.sparsity.evaluating import evaluating
from farms_tb.sparsity.methods import (
    Pruned,
    PruneTarget,
    Structure,
    check_groups,
    prune_targets,
    prune_weight,
)
from farms_tb.sparsity.options import PRUNE_METHODS, PruneMethod
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.prunable import PrunableWeight, plan_for_names, planned_weights, to_matrix
from farms_tb.sparsity.prune_report import PrunedLayer, PruneReport
from farms_tb.sparsity.sequential import Block, planned_blocks, visit_blocks
from farms_tb.sparsity.sparsegpt import DAMPING
from farms_tb.sparsity.statistics import InputStatistics, relative_output_error
from farms_tb.warnings import warn_once


def prune(
    model: nn.Module,
    plan: SparsityPlan,
    method: PruneMethod = "wanda",
    *,
    calibration: Iterable[Batch] | None = None,
    structure: Structure = "unstructured",
    in_place: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PruneReport:
    """Make entries of a model's weights zero, as many of each layer as a plan says.

    Of each matrix exactly round(n * sparsity) of its n entries are pruned; those of equal score in the order of
    their index. Entries that were zero before and are not among these stay zero: a matrix that was sparser than
    the plan has more zeros than planned. SparseGPT alone gives them values, as it corrects all entries that it
    does not prune. The blocks of the plan are pruned one after the other, each with
    statistics of the inputs that it gets from the blocks before it, pruned already. Any architecture works: the
    arguments of the blocks are captured from the model's own forward pass. Same model, plan and calibration
    data: same masks.

    Args:
        model: any module, on any device. It runs in evaluation mode and without gradients; modes are put back.
        plan: from `farms_tb.sparsity.allocate` or `SparsityPlan.load`. Layers that it does not name stay dense.
        method: which entries become zero. `"magnitude"`: the smallest of the matrix. `"wanda"`: in each row, the
            smallest |W_ij| ||x_j||, the norm over all calibration tokens. `"sparsegpt"`: those that cost least by
            the second-order error of the output, and the others are corrected for it.
        calibration: batches, each a dict of keyword arguments for the model: `[{"input_ids": ids}, ...]`. Without
            padding: padded positions count like all others. Needed but for `"magnitude"`, for which it only adds
            the output errors to the report.
        structure: `"unstructured"`; `"2:4"` and `"4:8"`: so many zeros in each group of consecutive inputs, for a
            plan of 50 % everywhere; `"mixed:8"`: N zeros in each 8, N for each block by the plan.
        in_place: write zeros into the weights; False adds masks by `torch.nn.utils.prune` instead, which survive
            fine-tuning and are made permanent by `torch.nn.utils.prune.remove(module, "weight")`.
        checkpoint: a folder, made where it is missing, to which each block is written once it is pruned. A run
            that finds blocks of an interrupted run of the same kind there takes them over and goes on after them.
            It needs the dense model again: load it anew where the interrupted run has pruned a part of it.
        progress: called with the number of finished blocks and of all blocks, first before any is pruned.

    Returns:
        For each matrix what was planned and achieved, the relative error of its output, and seconds.

    Raises:
        TypeError: `model` is no module, `plan` no `SparsityPlan`, or `calibration` holds other things than dicts.
        RuntimeError: there are calibration data, and this is called in `torch.inference_mode`.
        ValueError: the plan was made for another model or cannot be carried out with this structure; a weight is
            tied, quantised or not finite; calibration data are missing, too short or of the wrong vocabulary; or
            the checkpoint belongs to another run. All of this is checked before the first weight is changed.
            Later, inputs that are not finite raise it: then blocks before are pruned already.

    Example:
        >>> from farms_tb.sparsity import PlannedLayer, SparsityPlan
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> layers = {"0": PlannedLayer(48, 0.5), "2": PlannedLayer(24, 0.75)}
        >>> report = prune(model, SparsityPlan(layers, 0.58, "alpha"), "magnitude")
        >>> [int((layer.weight == 0).sum()) for layer in (model[0], model[2])]
        [24, 18]
    """
    check_choice("method", method, PruneMethod)
    check_choice("structure", structure, Structure)
    if not isinstance(plan, SparsityPlan):
        raise TypeError(
            f"plan must be a SparsityPlan, of farms_tb.sparsity.allocate say, got {type(plan).__name__}"
        )
    weights = planned_weights(model, plan)
    targets = prune_targets(plan_for_names(plan, {weight.name: weight for weight in weights}), structure)
    for weight in weights:
        check_groups(weight.name, tuple(weight.tensor.shape), weight.layout, targets[weight.name])
    batches = checked_batches(model, calibration, required=PRUNE_METHODS[method].needs_inputs)
    show = progress or (lambda finished, blocks: None)
    start = time.perf_counter()
    with evaluating(model):
        blocks = planned_blocks(model, weights)
        saved, layers = None, dict[str, PrunedLayer]()
        if checkpoint is not None:
            facts = {"method": method, "structure": structure, "plan": plan.to_json()}
            saved = open_checkpoint(Path(checkpoint), facts, weights, model, batches)
            layers = _taken_over(saved, blocks, in_place)
        done = {block.path for block in blocks if block.weights[0].name in layers}
        show(len(done), len(blocks))
        visits = _visit(model, blocks, done, batches, method)
        for finished, (block, statistics) in enumerate(visits, len(done) + 1):
            layers.update(_prune_block(block, statistics, targets, method, in_place, saved))
            show(finished, len(blocks))
    in_order = {weight.name: layers[weight.name] for weight in weights}
    if batches:
        _warn_of(in_order, method, model)
    return PruneReport(in_order, method, structure, time.perf_counter() - start)


def _visit(
    model: nn.Module, blocks: Sequence[Block], done: set[str], batches: Sequence[Batch], method: PruneMethod
) -> Iterator[tuple[Block, Mapping[str, InputStatistics]]]:
    """Yield the blocks that are not pruned yet, with statistics of their inputs if there are calibration data."""
    if batches:
        return visit_blocks(model, blocks, batches, hessian=PRUNE_METHODS[method].needs_hessian, done=done)
    return ((block, {}) for block in blocks if block.path not in done)


def _taken_over(saved: Checkpoint, blocks: Sequence[Block], in_place: bool) -> dict[str, PrunedLayer]:
    """Apply the blocks that an interrupted run had finished; return what it reported of them."""
    layers: dict[str, PrunedLayer] = {}
    for block in blocks:
        if saved.has(block.path):
            chosen, reported = saved.read(block)
            _apply(block, chosen, in_place)
            layers.update(reported)
    return layers


def _prune_block(
    block: Block,
    statistics: Mapping[str, InputStatistics],
    targets: Mapping[str, PruneTarget],
    method: PruneMethod,
    in_place: bool,
    saved: Checkpoint | None,
) -> dict[str, PrunedLayer]:
    """Prune the weights of a block, and report of each."""
    chosen: dict[str, Pruned] = {}
    reported: dict[str, PrunedLayer] = {}
    for weight in block.weights:
        start = time.perf_counter()
        of_inputs = statistics.get(weight.name)
        result = prune_weight(weight, targets[weight.name], method, of_inputs)
        seconds = time.perf_counter() - start
        chosen[weight.name] = result
        reported[weight.name] = _report(weight, targets[weight.name], result, of_inputs, seconds)
    _apply(block, chosen, in_place)
    if saved is not None:
        saved.write(block, chosen, reported)
    return reported


def _report(
    weight: PrunableWeight, target: PruneTarget, result: Pruned, statistics: InputStatistics | None, seconds: float
) -> PrunedLayer:
    """Return what is reported of a weight that is still dense."""
    dense = weight.tensor
    kept = dense if result.corrected is None else result.corrected.to(dense.dtype)
    pruned = kept.masked_fill(result.mask, 0)
    error = None
    if statistics is not None:
        before, after = (to_matrix(tensor, weight.layout) for tensor in (dense, pruned))
        error = relative_output_error(before, after, statistics)
    return PrunedLayer(
        block=weight.block,
        size=dense.numel(),
        planned=target.sparsity,
        sparsity=int((pruned == 0).sum()) / dense.numel(),
        columns=to_matrix(dense, weight.layout).shape[1],
        inputs=0 if statistics is None else statistics.inputs,
        output_error=error,
        method=result.method,
        damping=result.damping,
        seconds=seconds,
    )


def _apply(block: Block, chosen: Mapping[str, Pruned], in_place: bool) -> None:
    """Write the corrected weights of a block, and zeros where `in_place`, else masks."""
    masks: dict[tuple[nn.Module, str], Tensor] = {}
    for weight in block.weights:
        result, stored = chosen[weight.name], weight.tensor
        if result.corrected is not None:
            stored.copy_(result.corrected)
        if in_place:
            stored.masked_fill_(result.mask, 0)
            continue
        # Packed q, k and v have one mask together.
        whole = getattr(weight.module, weight.parameter)
        keep = masks.setdefault((weight.module, weight.parameter), torch.ones_like(whole, requires_grad=False))
        keep.chunk(weight.parts)[weight.part].masked_fill_(result.mask, 0)
    for (module, parameter), keep in masks.items():
        torch_prune.custom_from_mask(module, parameter, keep)  # type: ignore[no-untyped-call]


def _warn_of(layers: Mapping[str, PrunedLayer], method: PruneMethod, model: nn.Module) -> None:
    """Warn of matrices that could not be pruned as asked for, or of which the data say too little."""
    unseen = [name for name, layer in layers.items() if layer.method != method]
    if unseen:
        warn_once(
            f"{_named(unseen)} pruned by magnitude: the calibration data show no inputs, or only zeros", model
        )
    raised = [name for name, layer in layers.items() if layer.damping is not None and layer.damping > DAMPING]
    if raised:
        warn_once(
            f"the Hessians of {_named(raised)} nearly singular: their damping was raised, see `damping` of the "
            "report. More calibration data help",
            model,
        )
    short = [name for name, layer in layers.items() if 0 < layer.inputs < layer.columns]
    if short and PRUNE_METHODS[method].needs_hessian:
        warn_once(
            f"calibration is short for SparseGPT: {_named(short)} calibrated with fewer inputs than the matrix "
            "has columns, so that the corrections are mostly damping. Pass more batches",
            model,
        )


def _named(names: Sequence[str]) -> str:
    """Return how many layers there are with the name of the first, as the subject of a sentence."""
    if len(names) == 1:
        return f"{printable(names[0])} is"
    return f"{len(names)} layers ({printable(names[0])}, ...) are"
