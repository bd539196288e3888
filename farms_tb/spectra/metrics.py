"""From the fitted samples of a layer to its record: each metric, or why there is none.

A metric of a layer is the mean over its samples. For a sample of N eigenvalues lam_1 <= ... <= lam_N, the tail of
which begins at xmin and has the exponent alpha:

    spectral_norm = lam_N                    norm = sum_j lam_j
    pooled_stable_rank = norm / lam_N        norm_stable_rank = norm / N
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

from farms_tb.options import SpectrumOptions
from farms_tb.report import COLLAPSED, OK, LayerRecord
from farms_tb.spectra.power_law import searches
from farms_tb.spectra.precision import FLOAT64, PRECISIONS, SVD
from farms_tb.spectra.samples import Samples
from farms_tb.spectra.stored_precision import tail_is_rounding
from farms_tb.verdicts import FLAT_SPECTRUM, Verdict

EQUAL = 1e-4
"""Two largest eigenvalues that differ by less, relative to each other, make a tail flat."""

ENERGY = 0.99
"""Share of the sum of the eigenvalues that `rank_99` is about."""


def layer_records(
    found: Sequence[Samples], alpha_errors: Sequence[float], options: SpectrumOptions
) -> list[LayerRecord]:
    """Return the record of each layer, but for its kind, shape, histogram and the metrics of whole matrices."""
    roundings = [tail_is_rounding(samples, options.xmin_pos) for samples in found]
    problems = [_problem(samples, rounding, options) for samples, rounding in zip(found, roundings, strict=True)]
    return [_layer_record(*of_layer) for of_layer in zip(found, problems, alpha_errors, strict=True)]


def _layer_record(samples: Samples, status: str, alpha_error: float) -> LayerRecord:
    solver = f"{samples.table.solver} {_precision(samples)}"
    if np.isnan(samples.pooled[:, -1]).any():
        return LayerRecord(status="the eigenvalue solver did not converge", solver=solver)
    # What the eigenvalues of the scaled weights are multiplied by; it may become infinite.
    with np.errstate(over="ignore"):
        factor = float(np.ldexp(1.0, 2 * samples.layer.exponent))
    metrics = _metrics(samples, factor)
    if not status:
        metrics |= {**_fit_metrics(samples, factor), "alpha_error": alpha_error}
        status = _collapse(metrics["tail_floor"], metrics["rank_99"], samples)
    # Squares of very large weights may leave the range of float64, which leaves no number to show.
    known: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    number = int(samples.pooled.size - samples.first.sum())
    return LayerRecord(**known, num_eigenvalues=number, solver=solver, status=status or OK)


def _precision(samples: Samples) -> str:
    """Name the precision of most windows, and `svd` where some needed their singular values."""
    # Singular values are those of windows that double precision was not enough for.
    usual = PRECISIONS[np.bincount(np.minimum(samples.levels, FLOAT64)).argmax()]
    return f"{usual} svd" if (samples.levels == SVD).any() else usual


def _problem(samples: Samples, rounding: bool, options: SpectrumOptions) -> str:
    """Say why the layer has no alpha, or one of rounding errors; empty if every sample has one."""
    kept = samples.pooled.shape[-1] - int(samples.first.max())
    if kept < options.min_eigenvalues:
        return f"too few eigenvalues: {kept} in a sample, min_eigenvalues is {options.min_eigenvalues}"
    missing = np.isnan(samples.fit.alpha.numpy())
    # The last start of a tail that a search may find.
    start = samples.pooled[:, -2] if searches(options.fit) else samples.xmin
    zero = missing & (start == 0)
    if zero.any():
        return f"{Verdict.LOW_RANK}: zero eigenvalues in the tail of {zero.sum()} sample(s)"
    if not missing.any():
        of_rounding = f"{Verdict.LOW_RANK}: the tail is made of the rounding errors of the stored weights"
        return of_rounding if rounding else ""
    flat = missing & (samples.pooled[:, -1] <= samples.pooled[:, -2] * (1 + EQUAL))
    if options.fit == "xmin_peak" and not flat.any():
        return f"no eigenvalue in the range that fit='xmin_peak' searches in {missing.sum()} sample(s)"
    return f"{FLAT_SPECTRUM}: the eigenvalues in the tail of {missing.sum()} sample(s) are all equal"


def _collapse(tail_floor: float, rank_99: float, samples: Samples) -> str:
    """Say that a spectrum has collapsed; empty if it has not."""
    if not tail_floor < COLLAPSED:
        return ""
    return (
        f"{Verdict.COLLAPSED}: the tail begins at {tail_floor:.0e} of the largest eigenvalue, and {rank_99:.0f} "
        f"of {samples.pooled.size} directions hold 99 % of the energy; alpha is small for that reason"
    )


def _metrics(samples: Samples, factor: float) -> dict[str, float]:
    """Return the metrics that need no fit, of eigenvalues that are multiplied by `factor`."""
    kept = samples.pooled.shape[-1] - samples.first
    dropped = np.arange(samples.pooled.shape[-1]) < samples.first[:, None]
    eigenvalues = np.where(dropped, 0.0, samples.pooled)
    largest, total = eigenvalues[:, -1], eigenvalues.sum(axis=-1)
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
            "pooled_stable_rank": float((total / largest).mean()),
            # As in the papers' code, by the number before a cutoff drops some.
            "norm_stable_rank": float(total.mean() / eigenvalues.shape[-1]) * factor,
            "entropy": float(entropy.mean()),
            "rank_99": int(rank_99.sum()),
        }


def _fit_metrics(samples: Samples, factor: float) -> dict[str, float]:
    """Return alpha and what follows from the fits, all samples having one, in the same unit."""
    alpha = samples.fit.alpha.numpy()
    largest = samples.pooled[:, -1]
    # As logarithms, which stay within range where 4^exponent does not.
    log_largest = np.log10(largest) + 2 * samples.layer.exponent * math.log10(2)
    log_xmin = np.log(samples.xmin)
    return {
        "alpha": float(alpha.mean()),
        "ks_distance": float(samples.fit.ks_distance.numpy().mean()),
        "alpha_hat": float((alpha * log_largest).mean()),
        "xmin": math.exp(log_xmin.mean()) * factor,
        "tail_floor": math.exp((log_xmin - np.log(largest)).mean()),
    }
