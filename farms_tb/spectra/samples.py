"""The samples of a layer: the eigenvalues of its windows, pooled, sorted and fitted.

`solve_layers` solves the windows of all layers together, each in the fastest precision that alpha allows (see
`farms_tb.spectra.precision`). It goes in rounds: first one window of each larger layer in double precision, the
pilot, which tells whether single precision will do for the others; then all windows; then, in a more accurate
precision, those for which the error bound turns out too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.eigenvalues import Chunk, EigenvalueTable, solve_chunks
from farms_tb.spectra.power_law import PowerLawFit, fit_power_law
from farms_tb.spectra.precision import (
    FLOAT32,
    FLOAT64,
    PILOT_WINDOWS,
    PRECISIONS,
    Array,
    first_level,
    imprecise_windows,
    single_precision_suffices,
)
from farms_tb.spectra.prepare import PreparedLayer

Index = npt.NDArray[np.int64]

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""


@dataclass
class Samples:
    """The eigenvalues of one layer, in S samples of N eigenvalues, W windows of w in all.

    Attributes:
        layer: where they are from.
        table: the eigenvalues of each window, ascending.
        levels: `(W,)`, how each window was solved, as a position in `PRECISIONS`.
        todo: the windows that are yet to solve, or to solve again, ascending.
        pooled: `(S, N)`, eigenvalues of each sample, ascending.
        first: `(S,)`, the index of the first eigenvalue that no cutoff drops.
        fit: the fits of the samples.
        xmin: `(S,)`, the eigenvalue at which the tail of each sample begins.
    """

    layer: PreparedLayer
    table: EigenvalueTable
    levels: npt.NDArray[np.int8]
    todo: Index
    pooled: Array = field(init=False)
    first: Index = field(init=False)
    fit: PowerLawFit = field(init=False)
    xmin: Array = field(init=False)


def solve_layers(layers: Sequence[PreparedLayer], options: SpectrumOptions, threads: int) -> list[Samples]:
    """Solve the windows of several layers together, and fit their samples.

    Args:
        layers: the layers; no result depends on which other layers are solved with it.
        options: how alpha is measured.
        threads: number of threads on the CPU.
    """
    levels = [first_level(layer.windows, layer.largest, options) for layer in layers]
    found = []
    for layer, level in zip(layers, levels, strict=True):
        values = np.full((layer.windows.number, layer.windows.size), np.nan)
        table = EigenvalueTable(layer.windows, layer.scale, values)
        found.append(Samples(layer, table, np.full(len(values), level, dtype=np.int8), np.arange(len(values))))
    _solve_pilots(found, options, threads)
    todo = found
    while todo:
        _solve(todo, options, threads)
        _fit(todo, options)
        _look_for_imprecise(todo, options)
        todo = [samples for samples in todo if len(samples.todo)]
    return found


def _solve_pilots(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> None:
    """Solve the first window of larger layers, and set the levels of the others by it."""
    pilots = [samples for samples in found if samples.levels[0] == FLOAT32 and len(samples.todo) >= PILOT_WINDOWS]
    for samples in pilots:
        samples.levels[0] = FLOAT64
        samples.todo = samples.todo[:1]
    if pilots:
        _solve(pilots, options, threads)
    for samples in pilots:
        samples.todo = np.arange(1, len(samples.levels))
        if not single_precision_suffices(samples.table.values[:1], options):
            samples.levels[:] = FLOAT64


def _solve(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> None:
    """Solve the windows that are to do, each at its level."""
    chunks = []
    for samples in found:
        levels = samples.levels[samples.todo]
        for level in np.unique(levels):
            index = torch.from_numpy(samples.todo[levels == level])
            chunks.append(Chunk(samples.table, index, PRECISIONS[level]))
    solve_chunks(chunks, options.memory_mb * 2**20, threads, options.solver)


def _fit(found: Sequence[Samples], options: SpectrumOptions) -> None:
    """Pool, sort and fit the samples of layers of which all windows are solved."""
    for samples in found:
        # NumPy's sort is more than ten times as fast as torch's, which computes the permutation as well.
        samples.pooled = np.sort(samples.table.values.reshape(samples.layer.windows.samples, -1), axis=-1)
        samples.first = first_kept(samples.pooled, samples.layer.exponent, options)
        pooled, first = torch.from_numpy(samples.pooled), torch.from_numpy(samples.first)
        samples.fit = fit_power_law(pooled, options.fit, options.xmin_pos, first)
        tail_start = samples.fit.tail_start.numpy()[:, None]
        samples.xmin = np.take_along_axis(samples.pooled, tail_start, axis=-1)[:, 0]


def _look_for_imprecise(found: Sequence[Samples], options: SpectrumOptions) -> None:
    """Let the windows that are not precise enough be solved again, at the next level."""
    for samples in found:
        smallest = _lowest_that_counts(samples, options)
        alpha = samples.fit.alpha.numpy()
        imprecise = imprecise_windows(samples.table.values, samples.levels, smallest, alpha, options)
        samples.levels[imprecise] += 1
        samples.todo = np.flatnonzero(imprecise)


def _lowest_that_counts(samples: Samples, options: SpectrumOptions) -> Array:
    """Return the smallest eigenvalue `(S,)` of each sample that has a say in alpha.

    That is where the tail begins, or a cutoff near which there are eigenvalues: there a rounding error decides
    whether an eigenvalue is kept.
    """
    cutoff = _cutoff(samples.pooled, samples.layer.exponent, options)
    near = samples.pooled[:, 0] < 2 * cutoff
    return np.where(near, np.minimum(samples.xmin, cutoff), samples.xmin)


def first_kept(pooled: Array, exponent: int, options: SpectrumOptions) -> Index:
    """Return the index `(S,)` of the first eigenvalue of each sample `(S, N)` that no cutoff drops."""
    first: Index = np.sum(pooled < _cutoff(pooled, exponent, options)[:, None], axis=-1)
    return first


def _cutoff(pooled: Array, exponent: int, options: SpectrumOptions) -> Array:
    """Return the value `(S,)` below which eigenvalues of each sample `(S, N)` are dropped; 0 for none."""
    cutoff = np.zeros(len(pooled))
    if options.filter_zeros:
        # Eigenvalues times 4^exponent may leave the range of float64, so the cutoff is divided; it may become
        # infinite.
        with np.errstate(over="ignore"):
            absolute = np.ldexp(ZERO_CUTOFF, -2 * exponent)
        cutoff = np.where(pooled[:, -1] < absolute, 0.0, absolute)
    return np.maximum(cutoff, options.relative_cutoff * pooled[:, -1])
