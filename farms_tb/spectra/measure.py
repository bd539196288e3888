"""Measure layers: from stacks of matrices to records, and from the layers of a model to a report.

`measure_stacks` is the method from top to bottom: windows, eigenvalues and fits, standard errors, metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.distributed import Team, layers_of_this_process, results_of_all
from farms_tb.spectra.histogram import esd_histograms
from farms_tb.spectra.metrics import layer_record
from farms_tb.spectra.prepare import PreparedLayer, prepare_stacks
from farms_tb.spectra.samples import solve_layers
from farms_tb.spectra.standard_error import alpha_errors
from farms_tb.spectra.whole_matrix import with_matrix_metrics
from farms_tb.spectra.windows import windows_of
from farms_tb.spectra.workers import single_threaded_torch
from farms_tb.weights.layers import Layer, read_layers
from farms_tb.weights.matrices import MatrixStack

Result = TypeVar("Result")


@torch.no_grad()
def measure_stacks(
    stacks: Sequence[MatrixStack], options: SpectrumOptions, *, histogram: bool = False, whole: bool = False
) -> list[LayerRecord]:
    """Measure stacks of matrices together.

    Args:
        stacks: `(K, R, C)` each, on any device, also the meta device.
        options: how alpha is measured.
        histogram: also count the ESD of each.
        whole: also solve for the eigenvalues of whole matrices, where windows are parts of them.

    Returns:
        The record of each stack; it does not depend on which others are measured with it.
    """
    with single_threaded_torch(options.threads) as threads:
        prepared = prepare_stacks(stacks, options, threads)
        layers = [found for found in prepared if isinstance(found, PreparedLayer)]
        samples = solve_layers(layers, options, threads)
        errors = alpha_errors(samples, options, threads)
        solved = [stack for stack, one in zip(stacks, prepared, strict=True) if isinstance(one, PreparedLayer)]
        records = [layer_record(one, error, options) for one, error in zip(samples, errors, strict=True)]
        records = with_matrix_metrics(records, solved, samples, whole=whole)
        if histogram:
            esds = esd_histograms(samples, options, threads)
            records = [replace(record, histogram=esd) for record, esd in zip(records, esds, strict=True)]
    measured = iter(records)
    found = [next(measured) if isinstance(one, PreparedLayer) else one for one in prepared]
    return [
        replace(record, kind=stack.kind, shape=tuple(stack.matrices.shape), adapter_change=_adapter_change(stack))
        for record, stack in zip(found, stacks, strict=True)
    ]


def _adapter_change(stack: MatrixStack) -> float | None:
    """Return by how much adapters change the weight; None where that is no number, for one of zeros say."""
    if stack.adapter_change is None or stack.adapter_change.is_meta:
        return None
    change = float(stack.adapter_change)
    return change if math.isfinite(change) else None


def measure(
    layers: Sequence[Layer],
    options: SpectrumOptions,
    *,
    histogram: bool = False,
    whole: bool = False,
    team: Team | None = None,
) -> Report:
    """Measure layers, shared among processes where there are several.

    Args:
        layers: what `find_layers` returned, the same on every process.
        options: how alpha is measured.
        histogram: also count each layer's ESD.
        whole: also solve for the eigenvalues of whole matrices, where windows are parts of them.
        team: the processes; None where this one is alone.

    Returns:
        The same report on every process, bitwise.

    Raises:
        RuntimeError: the measurement failed on some process; raised on every one.
    """

    def work(group: Mapping[str, MatrixStack]) -> dict[str, LayerRecord]:
        records = measure_stacks(list(group.values()), options, histogram=histogram, whole=whole)
        return dict(zip(group, records, strict=True))

    own = layers_of_this_process(layers, lambda layer: cost(layer, options), team)
    return report_of(results_of_all(team, lambda: for_own_layers(layers, own, work, options)), layers, options)


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
    windows = windows_of(blank(layer), options) if layer.kind else None
    return 0 if windows is None else windows.view.numel() * windows.size


def blank(layer: Layer) -> MatrixStack:
    """Return a stack of the layer's shape, without values."""
    return MatrixStack(torch.empty(layer.shape, device="meta"), layer.sampling)


def for_own_layers(
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
