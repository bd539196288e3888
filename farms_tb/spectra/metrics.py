"""From the fitted samples of a layer to its record: each metric, or why there is none.

A metric of a layer is the mean over its samples. For a sample of N eigenvalues lam_1 <= ... <= lam_N, the tail of
which has the exponent alpha:

    spectral_norm = lam_N                    norm = sum_j lam_j
    stable_rank = norm / lam_N               norm_stable_rank = norm / N
    alpha_hat = alpha * log10(lam_N)         entropy = -sum_j p_j ln p_j / ln N,  p_j = lam_j / norm

Sources: TempBalance, Zhou et al., NeurIPS 2023 (arXiv 2312.00359); alpha_hat: Martin, Peng and Mahoney, Nature
Communications 2021.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import OK, EsdHistogram, LayerRecord
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.spectra.precision import Array
from farms_tb.spectra.samples import Samples, first_kept
from farms_tb.spectra.uncertainty import alpha_variance, independent_windows

HISTOGRAM_BINS = 64

EQUAL = 1e-4
"""Two largest eigenvalues that differ by less, relative to each other, make a tail flat."""


def layer_record(samples: Samples, entries: int, options: SpectrumOptions) -> LayerRecord:
    """Return the record of a layer, but for its kind, shape and histogram.

    Args:
        samples: its fitted samples.
        entries: number of entries of the weight, K * R * C.
        options: how alpha was measured.
    """
    solver = f"{samples.solver} {samples.precision}"
    if np.isnan(samples.pooled[:, -1]).any():
        return LayerRecord(status="the eigenvalue solver did not converge", solver=solver)
    status = _status(samples, options)
    metrics = _metrics(samples)
    if status == OK:
        metrics |= _fit_metrics(samples, entries, options)
    # Squares of very large weights may leave the range of float64, which leaves no number to show.
    known: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    number = int(samples.pooled.size - samples.first.sum())
    return LayerRecord(**known, num_eigenvalues=number, solver=solver, status=status)


def _status(samples: Samples, options: SpectrumOptions) -> str:
    """Say why the layer has no alpha; it has one if every sample has one."""
    kept = samples.pooled.shape[-1] - int(samples.first.max())
    if kept < options.min_eigenvalues:
        return f"too few eigenvalues: {kept} in a sample, min_eigenvalues is {options.min_eigenvalues}"
    missing = np.isnan(samples.fit.alpha.numpy())
    if not missing.any():
        return OK
    # The searches leave the last eigenvalue out as a start of the tail.
    start = samples.xmin if options.fit == "median" else samples.pooled[:, -2]
    zero = missing & (start == 0)
    if zero.any():
        return f"low rank: zero eigenvalues in the tail of {zero.sum()} sample(s)"
    flat = missing & (samples.pooled[:, -1] <= samples.pooled[:, -2] * (1 + EQUAL))
    if options.fit == "xmin_peak" and not flat.any():
        return f"no eigenvalue in the range that fit='xmin_peak' searches in {missing.sum()} sample(s)"
    return f"flat spectrum: the eigenvalues in the tail of {missing.sum()} sample(s) are all equal"


def _metrics(samples: Samples) -> dict[str, float]:
    """Return the metrics that need no fit."""
    kept = samples.pooled.shape[-1] - samples.first
    dropped = np.arange(samples.pooled.shape[-1]) < samples.first[:, None]
    eigenvalues = np.where(dropped, 0.0, samples.pooled)
    largest, total = eigenvalues[:, -1], eigenvalues.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = eigenvalues / total[:, None]
        # The smallest normal number in place of 0, whose logarithm is finite: p ln p is 0 in either case.
        logs = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
        entropy = -(shares * logs).sum(axis=-1) / np.log(kept)
        factor = _factor(samples)
        return {
            "spectral_norm": float(largest.mean()) * factor,
            "norm": float(total.mean()) * factor,
            "stable_rank": float((total / largest).mean()),
            "norm_stable_rank": float((total / kept).mean()) * factor,
            "entropy": float(entropy.mean()),
        }


def _factor(samples: Samples) -> float:
    """Return what the eigenvalues of the scaled weights are multiplied by, 4^exponent."""
    try:
        return math.ldexp(1.0, 2 * samples.exponent)
    except OverflowError:
        return math.inf


def _fit_metrics(samples: Samples, entries: int, options: SpectrumOptions) -> dict[str, float]:
    """Return alpha and what follows from the fits, all samples having one."""
    alpha = samples.fit.alpha.numpy()
    # As logarithms, which stay within range where 4^exponent does not.
    log_factor = 2 * samples.exponent * math.log10(2)
    log_largest = np.log10(samples.pooled[:, -1]) + log_factor
    return {
        "alpha": float(alpha.mean()),
        "ks_distance": float(samples.fit.ks_distance.numpy().mean()),
        "alpha_hat": float((alpha * log_largest).mean()),
        "alpha_error": _alpha_error(samples, entries, options),
        "xmin": math.exp(np.log(samples.xmin).mean()) * _factor(samples),
    }


def _alpha_error(samples: Samples, entries: int, options: SpectrumOptions) -> float:
    """Return the standard error of the layer's alpha, the mean of S independent alphas."""
    pieces = samples.by_window if samples.of_quarters is None else samples.of_quarters
    number = len(pieces) // samples.windows.samples
    independent = independent_windows(samples.windows, entries)
    room = independent if samples.of_quarters is None else number * independent
    # The tail of overlapping windows holds each eigenvalue several times.
    overlap = independent / (samples.windows.number // samples.windows.samples)
    tails = (samples.pooled.shape[-1] - samples.fit.tail_start.numpy()) * overlap
    alphas = _alphas_of_pieces(samples, pieces, options).reshape(-1, number).tolist()
    variances = map(alpha_variance, samples.fit.alpha.tolist(), tails.tolist(), alphas, [room] * len(tails))
    return math.sqrt(sum(variances)) / len(tails)


def _alphas_of_pieces(samples: Samples, pieces: Array, options: SpectrumOptions) -> Array:
    """Return alpha of each window, or quarter of one, without the eigenvalues that a cutoff drops."""
    smallest_kept = np.take_along_axis(samples.pooled, samples.first[:, None], axis=-1)[:, 0]
    # Without a cutoff all count: quarters of a window may have smaller eigenvalues than any window.
    cutoff = np.where(samples.first > 0, smallest_kept, 0.0)
    first = np.sum(pieces < np.repeat(cutoff, len(pieces) // len(cutoff))[:, None], axis=-1)
    fit = fit_power_law(
        torch.from_numpy(pieces), options.fit, options.xmin_pos, torch.from_numpy(first), distance=False
    )
    return np.asarray(fit.alpha.numpy())


def esd_histogram(pooled: Array, exponent: int, options: SpectrumOptions) -> EsdHistogram | None:
    """Count log10 of the positive eigenvalues of all samples that no cutoff drops; None where there are none.

    Args:
        pooled: `(S, N)`, ascending.
        exponent: see `Samples`.
        options: the cutoffs.
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
