"""From the fitted samples of a layer to its record: each metric, or why there is none.

A metric of a layer is the mean over its samples. For a sample of N eigenvalues lam_1 <= ... <= lam_N, the tail of
which begins at xmin and has the exponent alpha:

    spectral_norm = lam_N                    norm = sum_j lam_j
    stable_rank = norm / lam_N               norm_stable_rank = norm / N
    alpha_hat = alpha * log10(lam_N)         entropy = -sum_j p_j ln p_j / ln N,  p_j = lam_j / norm
    tail_floor = xmin / lam_N                rank_99 = the number of largest lam_j that add up to 0.99 norm

A small alpha alone does not say that a layer is well trained: alpha tends to 1 when a spectrum collapses, for any
cause. `tail_floor` and `rank_99` tell the two apart, and a layer whose tail reaches below `COLLAPSED` is marked.

Sources: TempBalance, Zhou et al., NeurIPS 2023 (arXiv 2312.00359); alpha_hat: Martin, Peng and Mahoney, Nature
Communications 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import COLLAPSED, OK, EsdHistogram, LayerRecord
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.spectra.precision import FLOAT64, PRECISIONS, SVD, Array
from farms_tb.spectra.samples import Samples, first_kept
from farms_tb.spectra.stored_precision import tail_is_rounding
from farms_tb.spectra.uncertainty import alpha_variances

HISTOGRAM_BINS = 64

EQUAL = 1e-4
"""Two largest eigenvalues that differ by less, relative to each other, make a tail flat."""

ENERGY = 0.99
"""Share of the sum of the eigenvalues that `rank_99` is about."""


def layer_records(found: Sequence[Samples], options: SpectrumOptions) -> list[LayerRecord]:
    """Return the record of each layer, but for its kind, shape and histogram.

    Args:
        found: the fitted samples of the layers.
        options: how alpha was measured.
    """
    return [_layer_record(samples, options) for samples in found]


def _layer_record(samples: Samples, options: SpectrumOptions) -> LayerRecord:
    solver = f"{samples.solver} {_precision(samples)}"
    if np.isnan(samples.pooled[:, -1]).any():
        return LayerRecord(status="the eigenvalue solver did not converge", solver=solver)
    metrics = _metrics(samples)
    status = _problem(samples, options)
    if not status:
        metrics |= _fit_metrics(samples, options)
        status = _collapse(metrics["tail_floor"], metrics["rank_99"], samples)
    # Squares of very large weights may leave the range of float64, which leaves no number to show.
    known: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    number = int(samples.pooled.size - samples.first.sum())
    return LayerRecord(**known, num_eigenvalues=number, solver=solver, status=status or OK)


def _precision(samples: Samples) -> str:
    """Name the precision of most windows, and `svd` where some needed their singular values."""
    fastest = PRECISIONS[min(int(samples.levels.min()), FLOAT64)]
    return f"{fastest} svd" if (samples.levels == SVD).any() else fastest


def _problem(samples: Samples, options: SpectrumOptions) -> str:
    """Say why the layer has no alpha; empty if every sample has one."""
    kept = samples.pooled.shape[-1] - int(samples.first.max())
    if kept < options.min_eigenvalues:
        return f"too few eigenvalues: {kept} in a sample, min_eigenvalues is {options.min_eigenvalues}"
    missing = np.isnan(samples.fit.alpha.numpy())
    # The searches leave the last eigenvalue out as a start of the tail.
    start = samples.xmin if options.fit == "median" else samples.pooled[:, -2]
    zero = missing & (start == 0)
    if zero.any():
        return f"low rank: zero eigenvalues in the tail of {zero.sum()} sample(s)"
    if not missing.any():
        rounding = tail_is_rounding(samples, options.xmin_pos)
        return "low rank: the tail is made of the rounding errors of the stored weights" if rounding else ""
    flat = missing & (samples.pooled[:, -1] <= samples.pooled[:, -2] * (1 + EQUAL))
    if options.fit == "xmin_peak" and not flat.any():
        return f"no eigenvalue in the range that fit='xmin_peak' searches in {missing.sum()} sample(s)"
    return f"flat spectrum: the eigenvalues in the tail of {missing.sum()} sample(s) are all equal"


def _collapse(tail_floor: float, rank_99: float, samples: Samples) -> str:
    """Say that a spectrum has collapsed; empty if it has not."""
    if not tail_floor < COLLAPSED:
        return ""
    return (
        f"collapsed: the tail begins at {tail_floor:.0e} of the largest eigenvalue, and {rank_99:.0f} of "
        f"{samples.pooled.size} directions hold 99 % of the energy; alpha is small for that reason"
    )


def _metrics(samples: Samples) -> dict[str, float]:
    """Return the metrics that need no fit."""
    kept = samples.pooled.shape[-1] - samples.first
    dropped = np.arange(samples.pooled.shape[-1]) < samples.first[:, None]
    eigenvalues = np.where(dropped, 0.0, samples.pooled)
    largest, total = eigenvalues[:, -1], eigenvalues.sum(axis=-1)
    factor = _factor(samples)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = eigenvalues / total[:, None]
        # The smallest normal number in place of 0, whose logarithm is finite: p ln p is 0 in either case.
        logs = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
        entropy = -(shares * logs).sum(axis=-1) / np.log(kept)
        # The largest ones before the one with which they add up to the share, and that one.
        held = np.cumsum(shares[:, ::-1], axis=-1)
        rank_99 = np.sum(held < ENERGY, axis=-1) + 1
        return {
            "spectral_norm": float(largest.mean()) * factor,
            "norm": float(total.mean()) * factor,
            "stable_rank": float((total / largest).mean()),
            "norm_stable_rank": float((total / kept).mean()) * factor,
            "entropy": float(entropy.mean()),
            "rank_99": int(rank_99.sum()),
        }


def _factor(samples: Samples) -> float:
    """Return what the eigenvalues of the scaled weights are multiplied by, 4^exponent."""
    try:
        return math.ldexp(1.0, 2 * samples.layer.exponent)
    except OverflowError:
        return math.inf


def _fit_metrics(samples: Samples, options: SpectrumOptions) -> dict[str, float]:
    """Return alpha and what follows from the fits, all samples having one."""
    alpha = samples.fit.alpha.numpy()
    largest = samples.pooled[:, -1]
    # As logarithms, which stay within range where 4^exponent does not.
    log_largest = np.log10(largest) + 2 * samples.layer.exponent * math.log10(2)
    log_xmin = np.log(samples.xmin)
    return {
        "alpha": float(alpha.mean()),
        "ks_distance": float(samples.fit.ks_distance.numpy().mean()),
        "alpha_hat": float((alpha * log_largest).mean()),
        "alpha_error": _alpha_error(samples, options),
        "xmin": math.exp(log_xmin.mean()) * _factor(samples),
        "tail_floor": math.exp((log_xmin - np.log(largest)).mean()),
    }


def _alpha_error(samples: Samples, options: SpectrumOptions) -> float:
    """Return the standard error of the layer's alpha, the mean of S independent alphas."""
    windows = samples.layer.windows
    pieces = samples.by_window if samples.of_quarters is None else samples.of_quarters
    number = len(pieces) // windows.samples
    independent = samples.layer.independent
    room = independent if samples.of_quarters is None else number * independent
    # The tail of overlapping windows holds each eigenvalue several times.
    overlap = independent / (windows.number // windows.samples)
    tail = (samples.pooled.shape[-1] - samples.fit.tail_start.numpy()) * overlap
    of_pieces = _alphas_of_pieces(samples, pieces, options).reshape(-1, number)
    variances = alpha_variances(samples.fit.alpha.numpy(), tail, of_pieces, room)
    return math.sqrt(variances.sum()) / len(tail)


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
        exponent: see `Prepared`.
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
