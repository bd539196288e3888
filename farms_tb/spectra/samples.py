"""The samples of a layer: the eigenvalues of its windows, pooled, sorted and fitted.

`solve_layers` solves the windows of all layers together, each in the fastest precision that alpha allows (see
`farms_tb.spectra.precision`). It goes in rounds: first one window of each larger layer in double precision, the
pilot, which tells whether single precision will do for the others; then all windows; then, in a more accurate
precision, those for which the error bound turns out too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.eigenvalues import Chunk, solve_chunks
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
        levels: `(W,)`, how each window was solved, as a position in `PRECISIONS`.
        by_window: `(W, w)`, eigenvalues of each window, ascending.
        solver: what solved for them: `"cpu"`, `"torch"` or `"cupy"`.
        pooled: `(S, N)`, eigenvalues of each sample, ascending.
        first: `(S,)`, the index of the first eigenvalue that no cutoff drops.
        fit: the fits of the samples.
        xmin: `(S,)`, the eigenvalue at which the tail of each sample begins.
    """

    layer: PreparedLayer
    levels: npt.NDArray[np.int8]
    by_window: Array
    solver: str = ""
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
    found = [_unsolved(layer, level) for layer, level in zip(layers, levels, strict=True)]
    todo = _choose_by_pilots(found, options, threads)
    while todo:
        _solve(found, todo, options, threads)
        _fit([found[place] for place in todo], options)
        todo = _imprecise(found, todo, options)
    return found


def _unsolved(layer: PreparedLayer, level: int) -> Samples:
    shape = layer.windows.number, layer.windows.size
    return Samples(layer, np.full(shape[0], level, dtype=np.int8), np.full(shape, np.nan))


def _choose_by_pilots(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> dict[int, Index]:
    """Solve the first window of larger layers, and set the levels of the others by it.

    Returns:
        The windows that are left to solve, by the position of their layer.
    """
    todo = {place: np.arange(samples.layer.windows.number) for place, samples in enumerate(found)}
    pilots = []
    for place, samples in enumerate(found):
        if samples.levels[0] == FLOAT32 and samples.layer.windows.number >= PILOT_WINDOWS:
            samples.levels[0] = FLOAT64
            pilots.append(place)
    if not pilots:
        return todo
    _solve(found, {place: todo[place][:1] for place in pilots}, options, threads)
    for place in pilots:
        todo[place] = todo[place][1:]
        if not single_precision_suffices(found[place].by_window[:1], options):
            found[place].levels[:] = FLOAT64
    return todo


def _solve(found: Sequence[Samples], todo: Mapping[int, Index], options: SpectrumOptions, threads: int) -> None:
    """Solve some windows of some layers, each window at its level."""
    chunks = []
    for place, index in todo.items():
        levels = found[place].levels[index]
        for level in np.unique(levels):
            windows = torch.from_numpy(index[levels == level])
            layer = found[place].layer
            chunks.append(Chunk(place, layer.windows, windows, PRECISIONS[level], layer.scale))
    tables = [samples.by_window for samples in found]
    names = solve_chunks(chunks, tables, options.memory_mb * 2**20, threads, options.solver)
    for place, name in names.items():
        found[place].solver = name


def _fit(found: Sequence[Samples], options: SpectrumOptions) -> None:
    """Pool, sort and fit the samples of layers of which all windows are solved."""
    for samples in found:
        # NumPy's sort is more than ten times as fast as torch's, which computes the permutation as well.
        samples.pooled = np.sort(samples.by_window.reshape(samples.layer.windows.samples, -1), axis=-1)
        samples.first = first_kept(samples.pooled, samples.layer.exponent, options)
    for samples in found:
        pooled, first = torch.from_numpy(samples.pooled), torch.from_numpy(samples.first)
        samples.fit = fit_power_law(pooled, options.fit, options.xmin_pos, first)
        tail_start = samples.fit.tail_start.numpy()[:, None]
        samples.xmin = np.take_along_axis(samples.pooled, tail_start, axis=-1)[:, 0]


def _imprecise(found: Sequence[Samples], places: Iterable[int], options: SpectrumOptions) -> dict[int, Index]:
    """Return the windows that must be solved again, by the position of their layer, and raise their levels."""
    lowest = {place: _lowest_that_counts(found[place], options) for place in places}
    again = {}
    for place, smallest in lowest.items():
        samples = found[place]
        alpha = samples.fit.alpha.numpy()
        imprecise = imprecise_windows(samples.by_window, samples.levels, smallest, alpha, options)
        samples.levels[imprecise] += 1
        if imprecise.any():
            again[place] = np.flatnonzero(imprecise)
    return again


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
