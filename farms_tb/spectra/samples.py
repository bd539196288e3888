"""The samples of a layer: the eigenvalues of its windows, pooled, sorted and fitted.

`solve_layers` solves the windows of all layers together, each in the fastest precision that alpha allows (see
`farms_tb.spectra.precision`). It goes in rounds: first one window of each larger layer in double precision, the
pilot, which tells whether single precision will do for the others; then all windows; then, in a more accurate
precision, those for which the error bound turns out too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
Levels = npt.NDArray[np.int8]

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""


@dataclass(frozen=True)
class Samples:
    """The eigenvalues of one layer, in S samples of N eigenvalues, W windows of w in all.

    Attributes:
        layer: where they are from.
        table: the eigenvalues of each window, ascending.
        levels: `(W,)`, how each window was solved, as a position in `PRECISIONS`.
        pooled: `(S, N)`, eigenvalues of each sample, ascending.
        first: `(S,)`, the index of the first eigenvalue that no cutoff drops.
        fit: the fits of the samples.
        xmin: `(S,)`, the eigenvalue at which the tail of each sample begins.
    """

    layer: PreparedLayer
    table: EigenvalueTable
    levels: Levels
    pooled: Array
    first: Index
    fit: PowerLawFit
    xmin: Array


@dataclass
class _Unsolved:
    """A layer while its windows are solved.

    Attributes:
        layer: the layer.
        table: the eigenvalues of each window, as far as they are solved.
        levels: `(W,)`, how each window is solved, as a position in `PRECISIONS`.
        todo: the windows that are yet to solve, or to solve again, ascending.
    """

    layer: PreparedLayer
    table: EigenvalueTable
    levels: Levels
    todo: Index


def solve_layers(layers: Sequence[PreparedLayer], options: SpectrumOptions, threads: int) -> list[Samples]:
    """Solve the windows of several layers together, and fit their samples.

    No result depends on which other layers are solved with it.
    """
    unsolved = [_unsolved(layer, options) for layer in layers]
    _solve_pilots(unsolved, options, threads)
    found: dict[int, Samples] = {}
    left = dict(enumerate(unsolved))
    while left:
        _solve(list(left.values()), options, threads)
        for place, one in left.items():
            found[place] = _fitted(one, options)
            one.todo = _imprecise(found[place], options)
            one.levels[one.todo] += 1
        left = {place: one for place, one in left.items() if len(one.todo)}
    return [found[place] for place in range(len(layers))]


def _unsolved(layer: PreparedLayer, options: SpectrumOptions) -> _Unsolved:
    """Return a layer, all windows of which are to be solved at the first level that is worth a try."""
    values = np.full((layer.windows.number, layer.windows.size), np.nan)
    levels = np.full(len(values), first_level(layer.windows, layer.largest, options), dtype=np.int8)
    table = EigenvalueTable(layer.windows, layer.stack.eigenvalue_scale, values)
    return _Unsolved(layer, table, levels, np.arange(len(values)))


def _solve_pilots(unsolved: Sequence[_Unsolved], options: SpectrumOptions, threads: int) -> None:
    """Solve the first window of larger layers, and set the levels of the others by it."""
    pilots = [one for one in unsolved if one.levels[0] == FLOAT32 and len(one.todo) >= PILOT_WINDOWS]
    for one in pilots:
        one.levels[0] = FLOAT64
        one.todo = one.todo[:1]
    if pilots:
        _solve(pilots, options, threads)
    for one in pilots:
        one.todo = np.arange(1, len(one.levels))
        if not single_precision_suffices(one.table.values[:1], options):
            one.levels[:] = FLOAT64


def _solve(unsolved: Sequence[_Unsolved], options: SpectrumOptions, threads: int) -> None:
    """Solve the windows that are to do, each at its level."""
    chunks = []
    for one in unsolved:
        levels = one.levels[one.todo]
        for level in np.unique(levels):
            index = torch.from_numpy(one.todo[levels == level])
            chunks.append(Chunk(one.table, index, PRECISIONS[level]))
    solve_chunks(chunks, options.memory_bytes, threads, options.solver)


def _fitted(solved: _Unsolved, options: SpectrumOptions) -> Samples:
    """Pool, sort and fit the samples of a layer of which all windows are solved."""
    layer, table = solved.layer, solved.table
    # NumPy's sort is more than ten times as fast as torch's, which computes the permutation as well.
    pooled = np.sort(table.values.reshape(layer.windows.samples, -1), axis=-1)
    first = first_kept(pooled, layer.exponent, options)
    fit = fit_power_law(torch.from_numpy(pooled), options.fit, options.xmin_pos, torch.from_numpy(first))
    xmin = np.take_along_axis(pooled, fit.tail_start.numpy()[:, None], axis=-1)[:, 0]
    return Samples(layer, table, solved.levels, pooled, first, fit, xmin)


def _imprecise(samples: Samples, options: SpectrumOptions) -> Index:
    """Return the windows that are not precise enough, ascending: they are solved again at the next level."""
    # Near a cutoff a rounding error decides whether an eigenvalue is kept: there, too, they have to be precise.
    cutoff = _cutoff(samples.pooled, samples.layer.exponent, options)
    near = samples.pooled[:, 0] < 2 * cutoff
    lowest = np.where(near, np.minimum(samples.xmin, cutoff), samples.xmin)
    alpha = samples.fit.alpha.numpy()
    return np.flatnonzero(imprecise_windows(samples.table.values, samples.levels, lowest, alpha, options))


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
