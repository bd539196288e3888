"""The ESD of a layer as a histogram, for pages and loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import EsdHistogram
from farms_tb.spectra.eigenvalues import Chunk, solve_chunks
from farms_tb.spectra.precision import FLOAT32, Array
from farms_tb.spectra.samples import Samples, first_kept

HISTOGRAM_BINS = 64


def esd_histograms(found: Sequence[Samples], options: SpectrumOptions, threads: int) -> list[EsdHistogram | None]:
    """Return the ESD of each layer, of eigenvalues in double precision.

    A histogram shows the smallest eigenvalues as well, which single precision does not know. The samples stay as
    they are: alpha must not depend on what is logged. None stands for a layer without a positive eigenvalue.
    """
    tables, chunks = [], []
    for samples in found:
        table = replace(samples.table, values=samples.table.values.copy())
        tables.append(table)
        single = np.flatnonzero(samples.levels == FLOAT32)
        if len(single):
            chunks.append(Chunk(table, torch.from_numpy(single), "float64"))
    solve_chunks(chunks, options.memory_bytes, threads, options.solver)
    histograms = []
    for samples, table in zip(found, tables, strict=True):
        pooled = np.sort(table.values.reshape(samples.layer.windows.samples, -1), axis=-1)
        histograms.append(_histogram(pooled, samples.layer.exponent, options))
    return histograms


def _histogram(pooled: Array, exponent: int, options: SpectrumOptions) -> EsdHistogram | None:
    """Count log10 of the positive eigenvalues of all samples that no cutoff drops.

    Args:
        pooled: `(S, N)`, ascending in each sample.
        exponent: the weights were divided by 2^exponent; the histogram shows the eigenvalues as they were before.
        options: the cutoffs are used.

    Returns:
        64 bins of equal width from the smallest logarithm to the largest one.
    """
    kept = np.arange(pooled.shape[-1]) >= first_kept(pooled, exponent, options)[:, None]
    logs = np.log10(pooled[kept & (pooled > 0)]) + 2 * exponent * math.log10(2)
    if not len(logs) or not np.isfinite(logs).all():
        return None
    low, high = float(logs.min()), float(logs.max())
    # Of equal values there is no range to divide: all fall into the first bin.
    position = np.zeros(len(logs)) if low == high else (logs - low) / (high - low) * HISTOGRAM_BINS
    bins = np.minimum(position.astype(np.int64), HISTOGRAM_BINS - 1)
    counts = np.bincount(bins, minlength=HISTOGRAM_BINS)
    return EsdHistogram(tuple(counts.tolist()), low, high)
