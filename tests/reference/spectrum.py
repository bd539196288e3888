"""Eigenvalues, power-law fits and metrics of one sample, eigenvalue by eigenvalue."""

from __future__ import annotations

import math

import numpy as np


def eigenvalues(sample, scale=1.0):
    """Squared singular values of every matrix, in one ascending list; zero below the numerical rank."""
    pooled = []
    for matrix in sample:
        singular = np.linalg.svd(np.asarray(matrix, dtype=np.result_type(matrix, np.float64)), compute_uv=False)
        limit = max(matrix.shape) * np.finfo(np.float64).eps * singular.max()
        pooled += [scale * float(value) ** 2 if value > limit else 0.0 for value in singular]
    return sorted(pooled)


def hill(values, i):
    """Hill's alpha of the tail that starts at index i; None where it is not a finite number."""
    tail = values[i:]
    if tail[0] <= 0:
        return None
    excess = math.fsum(math.log(value) - math.log(tail[0]) for value in tail)
    return 1 + len(tail) / excess if excess > 0 else None


def ks_distance(values, i, alpha):
    """Largest distance between the tail from index i and the law of exponent alpha."""
    tail = values[i:]
    return max(abs(1 - (value / tail[0]) ** (1 - alpha) - j / len(tail)) for j, value in enumerate(tail))


def fit(values, method="median", xmin_pos=2.0):
    """Return (alpha, D) of a sample, or (None, None)."""
    if method == "median":
        start = int(len(values) / xmin_pos)
        alpha = hill(values, start)
        return (alpha, ks_distance(values, start, alpha)) if alpha is not None else (None, None)
    low, high = peak_range(values) if method == "xmin_peak" else (-math.inf, math.inf)
    best_alpha, best_distance = None, 1.0
    for i in range(len(values) - 1):
        alpha = hill(values, i) if low <= values[i] <= high else None
        if alpha is not None and alpha > 1:
            distance = ks_distance(values, i, alpha)
            if distance < best_distance:
                best_alpha, best_distance = alpha, distance
    return (best_alpha, best_distance) if best_alpha is not None else (None, None)


def peak_range(values):
    """Where xmin_peak looks for the tail's start: from log10(0.95 p) to 1.5 p."""
    peak = histogram_peak(values)
    return math.log10(0.95 * peak), 1.5 * peak


def histogram_peak(values, bins=100):
    """Left edge of the fullest of 100 equal bins of log10 of the positive values."""
    logs = [np.log10(value) for value in values if value > 0]
    low, high = min(logs), max(logs)
    width = (high - low) / bins
    counts = [0] * bins
    for log in logs:
        counts[min(int((log - low) / width), bins - 1) if width else 0] += 1
    return float(10 ** (low + counts.index(max(counts)) * width))


def metrics(values, method="median", xmin_pos=2.0, number=None):
    """Every figure of one sample by its name in a report; `number` counts eigenvalues before some were dropped."""
    alpha, distance = fit(values, method, xmin_pos)
    largest, total = values[-1], math.fsum(values)
    entropy = -math.fsum(v / total * math.log(v / total) for v in values if v > 0) / math.log(len(values))
    return {
        "alpha": alpha,
        "ks_distance": distance,
        "alpha_hat": alpha and alpha * math.log10(largest),
        "spectral_norm": largest,
        "norm": total,
        "pooled_stable_rank": total / largest,
        "norm_stable_rank": total / (number or len(values)),
        "entropy": entropy,
    }


def layer_metrics(samples, scale=1.0, method="median", xmin_pos=2.0, zero_cutoff=0.0):
    """The mean over samples of each figure, and the number of eigenvalues."""
    spectra = [eigenvalues(sample, scale) for sample in samples]
    numbers = [len(values) for values in spectra]
    spectra = [[value for value in values if value >= zero_cutoff] or values for values in spectra]
    found = [metrics(values, method, xmin_pos, n) for values, n in zip(spectra, numbers, strict=True)]
    figures = {name: sum(figure[name] for figure in found) / len(found) for name in found[0]}
    return figures | {"num_eigenvalues": sum(map(len, spectra))}
