"""Measure the layers of a model: every layer's ESD, its power-law fit and the metrics beside it.

Where there are several processes, each measures some of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.distributed import Team, merged, own_layers
from farms_tb.spectra.measurement import measure_stacks
from farms_tb.spectra.null import MAX_DRAWS, draws_for, null_of, shuffled_alphas
from farms_tb.spectra.rows import ROW_LENGTH, record_from_row
from farms_tb.spectra.windows import layer_windows
from farms_tb.weights.layers import Layer, read_stacks, stack_problem
from farms_tb.weights.matrices import MatrixStack, NoSpectrumError

Work = Callable[[Sequence[tuple[Layer, MatrixStack]]], list[Tensor]]
"""Finds the rows of some layers."""


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
        The same report on every process, to the bit.

    Raises:
        RuntimeError: the measurement failed on some process; raised on every one.
    """
    rows = _rows(
        layers,
        lambda group: measure_stacks([stack for _, stack in group], options, histogram),
        lambda layer: cost(layer, options),
        ROW_LENGTH,
        team,
        options,
    )
    return report_of(rows, layers, options)


def report_of(rows: Sequence[Sequence[float]], layers: Sequence[Layer], options: SpectrumOptions) -> Report:
    """Turn the rows of all layers into a report."""
    records = {
        layer.name: record_from_row(row, options, layer.kind, layer.shape, "" if layer.planned else layer.problem)
        for layer, row in zip(layers, rows, strict=True)
    }
    return Report(records, as_plain(options))


def cost(layer: Layer, options: SpectrumOptions) -> int:
    """Return what measuring a layer costs, n h w min(h, w) for n windows of h x w: its shape alone decides."""
    windows = layer_windows(_blank(layer), options) if layer.kind else None
    if windows is None:
        return 0
    height, width = windows.view.shape[-2:]
    return windows.view.numel() * min(height, width)


def _blank(layer: Layer) -> MatrixStack:
    """Return a stack of the layer's shape, without values."""
    return MatrixStack(torch.empty(layer.shape, device="meta"), layer.sampling)


def measure_nulls(
    layers: Sequence[Layer], report: Report, options: SpectrumOptions, *, team: Team | None = None
) -> dict[str, tuple[float, float]]:
    """Measure the null of every layer that has an alpha and no null yet: see `farms_tb.spectra.null`.

    Layers of one shape share a null, and the draws for it among them.

    Args:
        layers: the layers of the report.
        report: the measurement that is to be compared with the nulls.
        options: those of the report.
        team: the processes that share the work, as in `measure`.

    Returns:
        Mean and standard deviation by layer, the same on every process; no entry for a layer without a null.
    """
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        record = report.layers[layer.name]
        if record.alpha is not None:
            # The number of eigenvalues tells a 1x1 convolution from a linear layer of its shape.
            groups.setdefault((record.shape, record.kind, record.num_eigenvalues), []).append(layer)
    nulls: dict[str, tuple[float, float]] = {}
    turns: dict[str, tuple[int, int]] = {}
    wanted: list[Layer] = []
    for members in groups.values():
        null = next(filter(None, (report.layers[layer.name].null for layer in members)), None)
        if null is None:
            turns.update({layer.name: (turn, len(members)) for turn, layer in enumerate(members)})
            wanted += members
        else:
            nulls.update({layer.name: null for layer in members})
    if not wanted:
        return nulls  # on every process: there is nothing to share, nor a device to share it on

    def draws(layer: Layer, stack: MatrixStack) -> int:
        turn, number = turns[layer.name]
        return len(range(turn, draws_for(stack), number))

    rows = _rows(
        wanted,
        lambda group: [
            shuffled_alphas(stack, options, draws(layer, stack), seed=turns[layer.name][0])
            for layer, stack in group
        ],
        lambda layer: draws(layer, _blank(layer)) * cost(layer, options),
        MAX_DRAWS,
        team,
        options,
    )
    alphas = {layer.name: [a for a in row if a] for layer, row in zip(wanted, rows, strict=True)}
    for members in groups.values():
        null = null_of([alpha for layer in members for alpha in alphas.get(layer.name, ())])
        if null is not None:
            nulls.update({layer.name: null for layer in members})
    return nulls


def with_nulls(report: Report, nulls: Mapping[str, tuple[float, float]]) -> Report:
    """Return the report with mean and standard deviation of the null beside the alphas of these layers."""
    records = dict(report.layers)
    for name, (mean, std) in nulls.items():
        if name in records:
            records[name] = replace(records[name], null_mean=mean, null_std=std)
    return replace(report, layers=records)


def stack_record(
    stack: MatrixStack, options: SpectrumOptions, *, histogram: bool = False, null: bool = False
) -> LayerRecord:
    """Measure one weight that belongs to no module."""
    problem = stack_problem(stack)
    row = [] if problem else measure_stacks([stack], options, histogram)[0].tolist()
    record = record_from_row(row, options, stack.kind, tuple(stack.matrices.shape), problem)
    if null and record.alpha is not None:
        null_draws = shuffled_alphas(stack, options, draws_for(stack)).tolist()
        found = null_of([alpha for alpha in null_draws if alpha])
        record = record if found is None else replace(record, null_mean=found[0], null_std=found[1])
    return record


def _rows(
    layers: Sequence[Layer],
    work: Work,
    cost: Callable[[Layer], int],
    length: int,
    team: Team | None,
    options: SpectrumOptions,
) -> list[list[float]]:
    """Return a row of `length` numbers for each layer, on every process where there are several."""
    own = own_layers(layers, cost, team)
    table, error = _own_rows(layers, work, length, own, options.memory_mb * 2**20)
    return merged(table, error, layers, team)


def _own_rows(
    layers: Sequence[Layer], work: Work, length: int, own: set[int], memory: int
) -> tuple[Tensor, Exception | None]:
    """Return a row for each layer, zeros but for this rank's `own`, and the error that stopped the work if any.

    Args:
        layers: all layers.
        work: finds the rows of some of them.
        length: length of a row.
        own: positions of the layers that are measured here.
        memory: bytes of weights that are worked on at a time: gathered from shards, they are whole for that long.
    """
    table = torch.zeros(len(layers), length, dtype=torch.float64, device="cpu")
    error: Exception | None = None
    group: dict[int, MatrixStack] = {}
    size = 0

    def finish() -> None:
        nonlocal error, size
        try:
            if error is None and group:
                rows = work([(layers[index], stack) for index, stack in group.items()])
                table[list(group)] = torch.stack(rows)
        except Exception as caught:
            error = caught
        group.clear()
        size = 0

    for index, stack in read_layers(layers):
        if isinstance(stack, Exception):
            error = error or stack
        elif index in own:
            group[index] = stack
            size += stack.matrices.nbytes
            if size > memory:
                finish()
    finish()
    return table, error


def read_layers(layers: Sequence[Layer]) -> Iterator[tuple[int, MatrixStack | Exception]]:
    """Yield position and matrices of each layer that has some, or the error that reading it raised.

    With several processes each reads every layer, to the end: gathering a sharded weight is a collective call.
    """
    module, stacks = None, []
    for index, layer in enumerate(layers):
        if layer.problem and not layer.planned:
            continue
        try:
            if layer.module is not module:
                module, stacks = layer.module, read_stacks(layer.module)
            yield index, stacks[layer.index]
        except NoSpectrumError:
            continue
        except Exception as caught:
            yield index, caught


Nulls = dict[object, LayerRecord]
"""A record with the null of each shape of layer."""


def weight_record(
    stack: MatrixStack, options: SpectrumOptions, *, histogram: bool = False, nulls: Nulls | None = None
) -> LayerRecord:
    """Measure one of many weights that belong to no module.

    Args:
        stack: the weight.
        options: how alpha is measured.
        histogram: also count its ESD.
        nulls: the nulls of the shapes so far, which grow; layers of one shape share that of the first. None for
            no null.
    """
    record = stack_record(stack, options, histogram=histogram)
    if nulls is None or record.alpha is None:
        return record
    # The number of eigenvalues tells a 1x1 convolution from a linear layer of its shape.
    shape = record.shape, record.kind, record.num_eigenvalues
    if shape not in nulls:
        nulls[shape] = stack_record(stack, options, null=True)
    return replace(record, null_mean=nulls[shape].null_mean, null_std=nulls[shape].null_std)
