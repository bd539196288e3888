"""The standard error of alpha: how far alpha would move if the weights were drawn again.

Windows that do not overlap are as good as independent, so the spread of their own alphas tells. Measured on random
weights, the standard error is within a quarter of the true deviation for convolutions and up to twice it for
overlapping windows; for the two search fits, whose tail may jump elsewhere, it is up to half too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.eigenvalues import Chunk, EigenvalueTable, solve_chunks
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.spectra.precision import Array
from farms_tb.spectra.samples import Samples
from farms_tb.spectra.windows import quarters_of

FEW_WINDOWS = 4
"""With fewer independent windows than this their spread tells little, and that of their quarters is taken."""


def alpha_errors(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> list[float]:
    """Return the standard error of each layer's alpha, the mean of the alphas of S independent samples.

    It is NaN where a sample has no alpha.
    """
    quarters = _solve_quarters(found, options, threads)
    return [_alpha_error(samples, quarters.get(place), options) for place, samples in enumerate(found)]


def _alpha_error(samples: Samples, quarters: Array | None, options: SpectrumOptions) -> float:
    """Return the standard error of a layer's alpha, by its windows, or by quarters `(4 S, v)` of the first."""
    pieces = samples.table.values if quarters is None else quarters
    first = _first_kept(pieces, samples)
    fit = fit_power_law(torch.from_numpy(pieces), options.fit, options.xmin_pos, first, distance=False)
    of_pieces = fit.alpha.numpy().reshape(len(samples.pooled), -1)
    independent = samples.layer.independent
    if quarters is not None:
        independent *= of_pieces.shape[1]
    variances = alpha_variances(samples.fit.alpha.numpy(), _tail_lengths(samples), of_pieces, independent)
    return math.sqrt(variances.sum()) / len(variances)


def alpha_variances(alpha: Array, tail: Array, of_pieces: Array, independent: float) -> Array:
    """Return the squared standard error of the alpha of each sample.

    With m independent pieces, the variance of alpha over the pieces divided by m. Where there are fewer than four,
    or where some piece has no alpha, the square of Hill's (alpha - 1) / sqrt(n) for n eigenvalues in the tail.
    That formula takes them for independent, but eigenvalues of one matrix repel each other: it is about threefold
    too large.

    Args:
        alpha: `(S,)`, that of each sample.
        tail: `(S,)`, number n of eigenvalues in the tail, of windows that do not overlap.
        of_pieces: `(S, P)`, alpha of each window of a sample, or of the quarters of one; NaN where it has none.
        independent: number m of such pieces that fit without overlap.

    Returns:
        `(S,)`.

    Source: Hill, A simple general approach to inference about the tail of a distribution, Annals of Statistics
    1975.
    """
    hill: Array = (alpha - 1) ** 2 / tail
    if of_pieces.shape[1] < 2 or independent < FEW_WINDOWS:
        return hill
    spread = of_pieces.var(axis=1, ddof=1) / independent
    return np.where(np.isfinite(spread), spread, hill)


def _solve_quarters(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> dict[int, Array]:
    """Solve the quarters of the first window of each sample, where a layer has too few windows for a spread.

    Returns:
        Eigenvalues `(4 S, v)` by the position of the layer, in double precision, as quarters are small; no entry
        for layers with enough windows, or with quarters that would be too small.
    """
    tables = {}
    for place, samples in enumerate(found):
        windows = samples.layer.windows
        if samples.layer.independent < FEW_WINDOWS and windows.size // 2 >= options.min_eigenvalues:
            quarters = quarters_of(windows)
            values = np.full((quarters.number, quarters.size), np.nan)
            tables[place] = EigenvalueTable(quarters, samples.layer.stack.eigenvalue_scale, values)
    chunks = [Chunk(table, torch.arange(len(table.values), device="cpu"), "float64") for table in tables.values()]
    solve_chunks(chunks, options.memory_bytes, threads, options.solver)
    return {place: table.values for place, table in tables.items()}


def _tail_lengths(samples: Samples) -> Array:
    """Return the number of eigenvalues `(S,)` in the tail of each sample, counted once where windows overlap."""
    windows = samples.layer.windows
    of_all_windows = samples.pooled.shape[-1] - samples.fit.tail_start.numpy()
    lengths: Array = of_all_windows * samples.layer.independent / (windows.number // windows.samples)
    return lengths


def _first_kept(pieces: Array, samples: Samples) -> Tensor:
    """Return the index `(S * P,)` of the first eigenvalue of each piece that no cutoff of its sample drops.

    Args:
        pieces: `(S * P, v)`, eigenvalues of the windows of each sample, or of quarters, ascending.
        samples: the samples that they are of.
    """
    smallest_kept = np.take_along_axis(samples.pooled, samples.first[:, None], axis=-1)[:, 0]
    # Without a cutoff all count: quarters of a window may have smaller eigenvalues than any window.
    cutoff = np.where(samples.first > 0, smallest_kept, 0.0)
    cutoff = np.repeat(cutoff, len(pieces) // len(cutoff))
    return torch.from_numpy(np.sum(pieces < cutoff[:, None], axis=-1))
