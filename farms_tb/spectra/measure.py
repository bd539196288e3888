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
from farms_tb.spectra.metrics import layer_records
from farms_tb.spectra.prepare import prepare_stacks
from farms_tb.spectra.samples import solve_layers
from farms_tb.spectra.standard_error import alpha_errors
from farms_tb.spectra.whole_matrix import with_matrix_metrics
from farms_tb.spectra.windows import windows_of
from farms_tb.spectra.workers import single_threaded_torch
from farms_tb.weights.layers import Layer, read_layers
from farms_tb.weights.stacks import MatrixStack

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
        layers, records = prepare_stacks(stacks, options, threads)
        samples = solve_layers(list(layers.values()), options, threads)
        errors = alpha_errors(samples, options, threads)
        solved = with_matrix_metrics(layer_records(samples, errors, options), samples, whole=whole)
        if histogram:
            esds = esd_histograms(samples, options, threads)
            solved = [replace(record, histogram=esd) for record, esd in zip(solved, esds, strict=True)]
    records |= dict(zip(layers, solved, strict=True))
    return [
        replace(records[place], kind=stack.kind, shape=tuple(stack.matrices.shape), adapter_change=stack.change)
        for place, stack in enumerate(stacks)
    ]


@torch.no_grad()
def measure_alphas(stacks: Sequence[MatrixStack], options: SpectrumOptions) -> list[LayerRecord]:
    """Measure stacks `(K, R, C)` as `measure_stacks` does, without standard errors and metrics of whole matrices.

    These take from a quarter to half of the time, and a permutation null does without them.
    """
    with single_threaded_torch(options.threads) as threads:
        layers, records = prepare_stacks(stacks, options, threads)
        samples = solve_layers(list(layers.values()), options, threads)
        solved = layer_records(samples, [math.nan] * len(samples), options)
    records |= dict(zip(layers, solved, strict=True))
    return [records[place] for place in range(len(stacks))]


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
    """Return a report of all layers in their order, those that were not measured among them with the reason."""
    every = {
        layer.name: records.get(layer.name)
        or LayerRecord(status=layer.problem or "not measured", kind=layer.kind, shape=layer.shape)
        for layer in layers
    }
    return Report(every, as_plain(options))


def cost(layer: Layer, options: SpectrumOptions) -> int:
    """Return what measuring a layer costs: its shape alone decides.

    Solving for the eigenvalues of a window of h rows and w columns takes O(h w min(h, w)) operations, the sum of
    which is returned, constants left out. It is 0 for a layer that is no matrix, or has no window.
    """
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

    Args:
        layers: all layers, the same on every process.
        own: the names of the layers that fall to this process.
        work: takes the stacks of some layers by name, and returns a result for each.
        options: `memory_mb` is used.

    Returns:
        The results of this process's layers, by name.

    Raises:
        Exception: the first one that reading a layer or the work raised.
    """
    found: dict[str, Result] = {}
    error: Exception | None = None
    group: dict[str, MatrixStack] = {}
    held = 0  # bytes

    def finish() -> None:
        """Work on the group, unless something has failed before, and release it."""
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
            if held > options.memory_bytes:
                finish()
    finish()
    if error is not None:
        raise error
    return found
