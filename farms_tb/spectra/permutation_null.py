"""The permutation null of a layer: what alpha it would have if nothing had been learnt.

The alpha of a small stack of matrices is a noisy number with a bias of its own; both depend on how many matrices
there are and how large, not on the aspect ratio alone. So a layer is compared with random layers of just its
shape: its own entries, shuffled, which keeps their distribution and destroys every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.distributed import Team, layers_of_this_process, results_of_all
from farms_tb.spectra.measure import blank, cost, for_own_layers, measure_stacks
from farms_tb.weights.layers import Layer, stack_problem
from farms_tb.weights.matrices import MatrixStack

Null = tuple[float, float]
"""Mean and standard deviation of alpha over the permutation null."""

Nulls = dict[Hashable, Null | None]
"""The permutation null of each shape of layer, None where it has none."""

MIN_DRAWS, MAX_DRAWS = 8, 32
"""Shuffles of a layer that make up its permutation null."""

DRAWS_WORK = 2 * 10**8
"""Entries * columns of all shuffles together, beyond which a layer gets fewer of them. `null_of` allows for the
uncertainty that this leaves."""


def measure_nulls(
    layers: Sequence[Layer], report: Report, options: SpectrumOptions, *, team: Team | None = None
) -> dict[str, Null]:
    """Measure the permutation null of every layer that has an alpha and no null yet.

    Layers of one shape get one permutation null. Its shuffles are dealt out among them in turn, so that together
    they make as many as one layer would.

    Args:
        layers: the layers of the report.
        report: the measurement that is to be compared with the nulls.
        options: those of the report.
        team: the processes that share the work, as in `measure`.

    Returns:
        Mean and standard deviation by layer, the same on every process; no entry for a layer without a null.
    """
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        record = report.layers[layer.name]
        if record.alpha is not None:
            # The number of eigenvalues tells a 1x1 convolution from a linear layer of its shape.
            groups.setdefault((record.shape, record.kind, record.num_eigenvalues), []).append(layer)
    known = {key: _known_null(members, report) for key, members in groups.items()}
    alphas = _alphas_of_shuffles([members for key, members in groups.items() if known[key] is None], options, team)
    nulls: dict[str, Null] = {}
    for key, members in groups.items():
        null = known[key] or null_of([alpha for layer in members for alpha in alphas.get(layer.name, ())])
        if null is not None:
            nulls.update(dict.fromkeys((layer.name for layer in members), null))
    return nulls


def _known_null(members: Sequence[Layer], report: Report) -> Null | None:
    return next((null for layer in members if (null := report.layers[layer.name].null) is not None), None)


def _alphas_of_shuffles(
    groups: Sequence[Sequence[Layer]], options: SpectrumOptions, team: Team | None
) -> dict[str, list[float]]:
    """Return the alphas of the shuffles of each layer, the layers of each group sharing the draws in turn."""
    if not groups:
        return {}  # on every process, which so agree that there is nothing to gather
    seeds = {layer.name: seed for members in groups for seed, layer in enumerate(members)}
    draws = {
        layer.name: len(range(seed, draws_for(blank(layer)), len(members)))
        for members in groups
        for seed, layer in enumerate(members)
    }

    def work(group: Mapping[str, MatrixStack]) -> dict[str, list[float]]:
        return {
            name: alphas_of_shuffles(stack, options, draws[name], seeds[name]) for name, stack in group.items()
        }

    layers = [layer for members in groups for layer in members]
    own = layers_of_this_process(layers, lambda layer: draws[layer.name] * cost(layer, options), team)
    return results_of_all(team, lambda: for_own_layers(layers, own, work, options))


def alphas_of_shuffles(stack: MatrixStack, options: SpectrumOptions, draws: int, seed: int = 0) -> list[float]:
    """Return the alphas of a stack with its entries shuffled, without those that have none.

    Args:
        stack: the layer's matrices.
        options: how alpha is measured.
        draws: number of shuffles.
        seed: that of the shuffles, which touch no other random state.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    # As many at a time as there is memory for.
    together = max(1, options.memory_mb * 2**20 // stack.matrices.nbytes)
    alphas: list[float] = []
    for begin in range(0, draws, together):
        stacks = [shuffled(stack, generator) for _ in range(begin, min(begin + together, draws))]
        alphas += [record.alpha for record in measure_stacks(stacks, options) if record.alpha is not None]
    return alphas


def with_nulls(report: Report, nulls: Mapping[str, Null]) -> Report:
    """Return the report with mean and standard deviation of the permutation null of these layers."""
    records = dict(report.layers)
    for name, (mean, std) in nulls.items():
        if name in records:
            records[name] = replace(records[name], null_mean=mean, null_std=std)
    return replace(report, layers=records)


def weight_record(
    stack: MatrixStack, options: SpectrumOptions, *, histogram: bool = False, nulls: Nulls | None = None
) -> LayerRecord:
    """Measure one weight that belongs to no module.

    Args:
        stack: the weight.
        options: how alpha is measured.
        histogram: also count its ESD.
        nulls: the permutation nulls of the shapes so far; that of a new shape is measured and added. None to leave
            them out.
    """
    problem = stack_problem(stack)
    if problem:
        return LayerRecord(status=problem, kind=stack.kind, shape=tuple(stack.matrices.shape))
    (record,) = measure_stacks([stack], options, histogram=histogram)
    if nulls is None or record.alpha is None:
        return record
    shape = record.shape, record.kind, record.num_eigenvalues
    if shape not in nulls:
        nulls[shape] = null_of(alphas_of_shuffles(stack, options, draws_for(stack)))
    mean, std = nulls[shape] or (None, None)
    return replace(record, null_mean=mean, null_std=std)


def draws_for(stack: MatrixStack) -> int:
    """Return the number of shuffles for the permutation null of stacks of this shape."""
    return max(MIN_DRAWS, min(MAX_DRAWS, DRAWS_WORK // (stack.matrices.numel() * stack.matrices.shape[-1])))


def shuffled(stack: MatrixStack, generator: torch.Generator) -> MatrixStack:
    """Return the stack with all its entries in random order.

    Args:
        stack: the layer's matrices `(K, R, C)`.
        generator: of the CPU; no other random state is touched.
    """
    entries = stack.matrices.detach().flatten()
    if entries.element_size() == 1:
        entries = entries.float()  # torch before 2.7 cannot index eight-bit floats
    order = torch.randperm(len(entries), generator=generator, device="cpu").to(entries.device)
    return replace(stack, matrices=entries[order].view(stack.matrices.shape))


def null_of(alphas: Sequence[float]) -> tuple[float, float] | None:
    """Return mean m and standard deviation s of the alphas of shuffled layers; None where there are too few.

    s is widened so that z = (alpha - m) / s has variance 1 for a random layer although m and s are estimates: its
    square by (1 + 1/n) (n - 1) / (n - 3) for n draws, the variance of Student's t.
    """
    number = len(alphas)
    if number <= MIN_DRAWS // 2:
        return None
    mean, variance = fmean(alphas), pvariance(alphas) * number / (number - 3) * (1 + 1 / number)
    return (mean, math.sqrt(variance)) if variance > 0 else None
