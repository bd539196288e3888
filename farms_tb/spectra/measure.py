"""Measure layers: from stacks of matrices to records, and from the layers of a model to a report.

`measure_stacks` is the method from top to bottom: windows, eigenvalues and fits, standard errors, metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.distributed import Team, share, shared_out
from farms_tb.spectra.histogram import esd_histograms
from farms_tb.spectra.metrics import layer_records
from farms_tb.spectra.prepare import PreparedLayer, prepare_stacks
from farms_tb.spectra.samples import solve_layers
from farms_tb.spectra.standard_error import alpha_errors
from farms_tb.spectra.uncertainty import draws_for, null_of, shuffled
from farms_tb.spectra.windows import windows_of
from farms_tb.spectra.workers import single_threaded_torch
from farms_tb.weights.layers import Layer, read_layers, stack_problem
from farms_tb.weights.matrices import MatrixStack

Result = TypeVar("Result")
Null = tuple[float, float]
"""Mean and standard deviation of alpha over the permutation null."""


@torch.no_grad()
def measure_stacks(
    stacks: Sequence[MatrixStack], options: SpectrumOptions, *, histogram: bool = False
) -> list[LayerRecord]:
    """Measure stacks of matrices together.

    Args:
        stacks: `(K, R, C)` each, on any device, also the meta device.
        options: how alpha is measured.
        histogram: also count the ESD of each.

    Returns:
        The record of each stack; it does not depend on which others are measured with it.
    """
    with single_threaded_torch(options.threads) as threads:
        prepared = prepare_stacks(stacks, options, threads)
        layers = [found for found in prepared if isinstance(found, PreparedLayer)]
        samples = solve_layers(layers, options, threads)
        errors = alpha_errors(samples, options, threads)
        records = layer_records(samples, errors, options)
        if histogram:
            esds = esd_histograms(samples, options, threads)
            records = [replace(record, histogram=esd) for record, esd in zip(records, esds, strict=True)]
    measured = iter(records)
    found = [next(measured) if isinstance(one, PreparedLayer) else one for one in prepared]
    return [
        replace(record, kind=stack.kind, shape=tuple(stack.matrices.shape))
        for record, stack in zip(found, stacks, strict=True)
    ]


def measure(
    layers: Sequence[Layer], options: SpectrumOptions, *, histogram: bool = False, team: Team | None = None
) -> Report:
    """Measure layers, shared among processes where there are several.

    Args:
        layers: what `find_layers` returned, the same on every process.
        options: how alpha is measured.
        histogram: also count each layer's ESD.
        team: the processes; None where this one is alone.

    Returns:
        The same report on every process, bitwise.

    Raises:
        RuntimeError: the measurement failed on some process; raised on every one.
    """

    def work(group: Mapping[str, MatrixStack]) -> dict[str, LayerRecord]:
        return dict(zip(group, measure_stacks(list(group.values()), options, histogram=histogram), strict=True))

    own = share(layers, lambda layer: cost(layer, options), team)
    return report_of(shared_out(team, lambda: _for_own_layers(layers, own, work, options)), layers, options)


def report_of(records: Mapping[str, LayerRecord], layers: Sequence[Layer], options: SpectrumOptions) -> Report:
    """Put the records of the layers that were measured in order, between those that have a problem."""
    every = {
        layer.name: records.get(layer.name)
        or LayerRecord(status=layer.problem or "not measured", kind=layer.kind, shape=layer.shape)
        for layer in layers
    }
    return Report(every, as_plain(options))


def cost(layer: Layer, options: SpectrumOptions) -> int:
    """Return what measuring a layer costs, n h w min(h, w) for n windows of h x w: its shape alone decides."""
    windows = windows_of(_blank(layer), options) if layer.kind else None
    return 0 if windows is None else windows.view.numel() * windows.size


def _blank(layer: Layer) -> MatrixStack:
    """Return a stack of the layer's shape, without values."""
    return MatrixStack(torch.empty(layer.shape, device="meta"), layer.sampling)


def _for_own_layers(
    layers: Sequence[Layer],
    own: set[str],
    work: Callable[[Mapping[str, MatrixStack]], dict[str, Result]],
    options: SpectrumOptions,
) -> dict[str, Result]:
    """Do some work for the layers of this process, as many at a time as there is memory for.

    Every process reads every layer, to the end and in the same order: gathering a sharded weight is a collective
    call. So an error is raised only once all have been read.
    """
    found: dict[str, Result] = {}
    error: Exception | None = None
    group: dict[str, MatrixStack] = {}
    held = 0  # bytes

    def finish() -> None:
        nonlocal error, held
        try:
            if error is None:
                found.update(work(group))
        except Exception as caught:
            error = caught
        group.clear()
        held = 0

    for layer, stack in read_layers(layers):
        if isinstance(stack, Exception):
            error = error or stack
        elif layer.name in own:
            group[layer.name] = stack
            held += stack.matrices.nbytes
            # A gathered weight stays in memory while its stack is in the group: measure before they exceed
            # memory_mb.
            if held > options.memory_mb * 2**20:
                finish()
    finish()
    if error is not None:
        raise error
    return found


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
        layer.name: len(range(seed, draws_for(_blank(layer)), len(members)))
        for members in groups
        for seed, layer in enumerate(members)
    }

    def work(group: Mapping[str, MatrixStack]) -> dict[str, list[float]]:
        return {
            name: alphas_of_shuffles(stack, options, draws[name], seeds[name]) for name, stack in group.items()
        }

    layers = [layer for members in groups for layer in members]
    own = share(layers, lambda layer: draws[layer.name] * cost(layer, options), team)
    return shared_out(team, lambda: _for_own_layers(layers, own, work, options))


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


Nulls = dict[Hashable, Null | None]
"""The permutation null of each shape of layer, None where it has none."""


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
