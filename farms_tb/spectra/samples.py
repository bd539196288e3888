"""The samples of a layer: the eigenvalues of its windows, pooled, sorted and fitted.

`solve_layers` solves the windows of all layers together, each in the fastest precision that alpha allows (see
`farms_tb.spectra.precision`). It goes in rounds: first one window of each larger layer in double precision, the
pilot, which tells whether single precision will do for the others; then all windows; then, in a more accurate
precision, those for which the error bound turns out too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from farms_tb.spectra.uncertainty import quarters_of
from farms_tb.spectra.windows import Windows

Index = npt.NDArray[np.int64]

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""


@dataclass(frozen=True)
class Prepared:
    """A layer that has windows of finite numbers, not all of them zero.

    Attributes:
        windows: the layer's windows.
        independent: how many windows of one sample would fit into the weight without overlap.
        largest: largest absolute value of the weight.
        scale: what the eigenvalues of the windows are multiplied by, `MatrixStack.eigenvalue_scale`.
        exponent: the weights were divided by 2^exponent, so that no square leaves the range of float64.
        roundoff: unit roundoff of the type in which the weight is stored.
    """

    windows: Windows
    independent: float
    largest: float
    scale: float
    exponent: int
    roundoff: float


@dataclass
class Samples:
    """The eigenvalues of one layer, in S samples of N eigenvalues, W windows of w in all.

    Attributes:
        layer: where they are from.
        levels: `(W,)`, how each window was solved, as a position in `PRECISIONS`.
        by_window: `(W, w)`, eigenvalues of each window, ascending.
        of_quarters: `(4 S, v)`, eigenvalues of the quarters of the first window of each sample, where they are
            needed for the standard error; else None.
        solver: what solved for them: `"cpu"`, `"torch"` or `"cupy"`.
        pooled: `(S, N)`, eigenvalues of each sample, ascending.
        first: `(S,)`, the index of the first eigenvalue that no cutoff drops.
        fit: the fits of the samples.
        xmin: `(S,)`, the eigenvalue at which the tail of each sample begins.
    """

    layer: Prepared
    levels: npt.NDArray[np.int8]
    by_window: Array
    of_quarters: Array | None = None
    solver: str = ""
    pooled: Array = field(init=False)
    first: Index = field(init=False)
    fit: PowerLawFit = field(init=False)
    xmin: Array = field(init=False)

    def pool(self, options: SpectrumOptions) -> Index:
        """Sort and fit the samples, all windows being solved.

        Returns:
            The windows that must be solved again, whose levels are raised.
        """
        # NumPy's sort is more than ten times as fast as torch's, which computes the permutation as well.
        self.pooled = np.sort(self.by_window.reshape(self.layer.windows.samples, -1), axis=-1)
        cutoff = cutoff_of(self.pooled, self.layer.exponent, options)
        self.first = np.sum(self.pooled < cutoff[:, None], axis=-1)
        self.fit = fit_power_law(
            torch.from_numpy(self.pooled), options.fit, options.xmin_pos, torch.from_numpy(self.first)
        )
        self.xmin = np.take_along_axis(self.pooled, self.fit.tail_start.numpy()[:, None], axis=-1)[:, 0]
        # Near a cutoff a rounding error decides whether an eigenvalue is kept, so the bound must hold there, too.
        near = self.pooled[:, 0] < 2 * cutoff
        lowest = np.where(near, np.minimum(self.xmin, cutoff), self.xmin)
        imprecise = imprecise_windows(self.by_window, self.levels, lowest, self.fit.alpha.numpy(), options)
        self.levels[imprecise] += 1
        return np.flatnonzero(imprecise)


def cutoff_of(pooled: Array, exponent: int, options: SpectrumOptions) -> Array:
    """Return the value `(S,)` below which eigenvalues of each sample `(S, N)` are dropped; 0 for none."""
    cutoff = np.zeros(len(pooled))
    if options.filter_zeros:
        # Eigenvalues times 4^exponent may leave the range of float64, so the cutoff is divided; it may become
        # infinite.
        with np.errstate(over="ignore"):
            absolute = np.ldexp(ZERO_CUTOFF, -2 * exponent)
        cutoff = np.where(pooled[:, -1] < absolute, 0.0, absolute)
    return np.maximum(cutoff, options.relative_cutoff * pooled[:, -1])


def first_kept(pooled: Array, exponent: int, options: SpectrumOptions) -> Index:
    """Return the index `(S,)` of the first eigenvalue of each sample `(S, N)` that no cutoff drops."""
    first: Index = np.sum(pooled < cutoff_of(pooled, exponent, options)[:, None], axis=-1)
    return first


def solve_layers(layers: Sequence[Prepared], options: SpectrumOptions, threads: int) -> list[Samples]:
    """Solve the windows of several layers together, and fit their samples.

    Args:
        layers: the layers; no result depends on which other layers are solved with it.
        options: how alpha is measured.
        threads: number of threads on the CPU.
    """
    found = [_unsolved(layer, options) for layer in layers]
    _solve_quarters(found, options, threads)
    todo = _choose_by_pilots(found, options, threads)
    while todo:
        _solve(found, todo, options, threads)
        again = {place: found[place].pool(options) for place in todo}
        todo = {place: windows for place, windows in again.items() if len(windows)}
    return found


def _unsolved(layer: Prepared, options: SpectrumOptions) -> Samples:
    shape = layer.windows.number, layer.windows.size
    levels = np.full(shape[0], first_level(layer.windows, layer.largest, options), dtype=np.int8)
    return Samples(layer, levels, np.full(shape, np.nan))


def _choose_by_pilots(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> dict[int, Index]:
    """Solve the first window of larger layers, and set the levels of the others by it.

    Returns:
        The windows that are left to solve, by the position of their layer.
    """
    todo = {place: np.arange(samples.layer.windows.number) for place, samples in enumerate(found)}
    pilots = [
        place
        for place, samples in enumerate(found)
        if samples.levels[0] == FLOAT32 and samples.layer.windows.number >= PILOT_WINDOWS
    ]
    for place in pilots:
        found[place].levels[0] = FLOAT64
    _solve(found, {place: todo[place][:1] for place in pilots}, options, threads)
    for place in pilots:
        todo[place] = todo[place][1:]
        if not single_precision_will_do(found[place].by_window[:1], options):
            found[place].levels[:] = FLOAT64
    return todo


def single_precision_will_do(pilot: Array, options: SpectrumOptions) -> bool:
    """Tell by one window `(1, w)`, solved in double precision, whether single precision suits its layer."""
    fit = fit_power_law(torch.from_numpy(pilot), options.fit, options.xmin_pos)
    xmin = pilot[:, int(fit.tail_start)]
    level = np.array([FLOAT32], dtype=np.int8)
    return not imprecise_windows(pilot, level, xmin, fit.alpha.numpy(), options).any()


def _solve(found: Sequence[Samples], todo: Mapping[int, Index], options: SpectrumOptions, threads: int) -> None:
    """Solve some windows of some layers, each window at its level."""
    chunks = []
    for place, index in todo.items():
        levels = found[place].levels[index]
        for level in np.unique(levels):
            windows = torch.from_numpy(index[levels == level])
            chunks.append(Chunk(place, found[place].layer.windows, windows, PRECISIONS[level]))
    solve_into([samples.by_window for samples in found], chunks, found, options, threads)


def _solve_quarters(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> None:
    """Solve the quarters of windows that standard errors need, always in double precision: they are small."""
    chunks = []
    tables = {}
    for place, samples in enumerate(found):
        quarters = quarters_of(samples.layer.windows, samples.layer.independent, options)
        if quarters is not None:
            chunks.append(Chunk(place, quarters, torch.arange(quarters.number, device="cpu"), "float64"))
            tables[place] = samples.of_quarters = np.full((quarters.number, quarters.size), np.nan)
    solve_into(tables, chunks, found, options, threads)


def solve_into(
    tables: Sequence[Array] | Mapping[int, Array],
    chunks: Sequence[Chunk],
    found: Sequence[Samples],
    options: SpectrumOptions,
    threads: int,
) -> None:
    """Solve chunks, and write their eigenvalues, scaled, into the tables of their layers.

    Args:
        tables: by the position of a layer, `(W, w)`, a row for each window; those of the chunks are written.
        chunks: what to solve; `Chunk.layer` is a position in `found`.
        found: the layers. What solved for a layer is noted there.
        options: memory and solver.
        threads: number of threads on the CPU.
    """
    for solved in solve_chunks(chunks, options.memory_mb * 2**20, threads, options.solver):
        samples = found[solved.chunk.layer]
        tables[solved.chunk.layer][solved.chunk.index.numpy()] = samples.layer.scale * solved.values
        samples.solver = solved.solver
