"""One stack of matrices: from its windows to the figures of its layer.

The result is a row of float64 numbers, so that processes can share the layers and merge them exactly, by adding
rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.layers import NO_VALUES
from farms_tb.matrices import MatrixStack
from farms_tb.options import SpectralOptions
from farms_tb.power_law import PowerLawFit, fit_power_law
from farms_tb.report import OK, EsdHistogram, LayerRecord
from farms_tb.spectra import window_eigenvalues
from farms_tb.standard_error import alpha_error
from farms_tb.windows import Windows, layer_windows

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""

HISTOGRAM_BINS = 64

_FIGURES = (
    "alpha",
    "ks_distance",
    "alpha_hat",
    "spectral_norm",
    "norm",
    "stable_rank",
    "norm_stable_rank",
    "entropy",
    "alpha_error",
    "xmin",
)
# A row: outcome, a number for its message, the figures, the number of eigenvalues, low, high and bins of the ESD.
_HEAD = 2 + len(_FIGURES) + 1
ROW_LENGTH = _HEAD + 2 + HISTOGRAM_BINS

_OUTCOMES = (
    "not measured",
    OK,
    "weights contain NaN or infinity",
    "all weights are zero",
    "no window of this aspect ratio fits",
    "too few eigenvalues: {} in a sample, min_eigenvalues is {}",
    "low rank: zero eigenvalues in the tail of {} sample(s)",
    "flat spectrum: the eigenvalues in the tail of {} sample(s) are all equal",
    "no eigenvalue in the range that fit='xmin_peak' searches in {} sample(s)",
    NO_VALUES,
    "the eigenvalue solver did not converge",
)
_OK, _NON_FINITE, _ZERO, _NO_WINDOW, _TOO_FEW, _LOW_RANK, _FLAT, _NO_PEAK, _NO_VALUES, _NOT_CONVERGED = range(
    1, len(_OUTCOMES)
)


@torch.no_grad()
def measure_stack(stack: MatrixStack, options: SpectralOptions, histogram: bool = False) -> Tensor:
    """Return the row `(ROW_LENGTH,)` float64 of one layer, on the device of its weight."""
    if stack.matrices.is_meta:
        return _plan(stack, options)
    stack = replace(stack, matrices=_solvable(stack.matrices))
    largest = stack.matrices.abs().amax()
    if not largest.isfinite():
        return _row(stack, _NON_FINITE)
    if largest == 0:
        return _row(stack, _ZERO)
    windows = layer_windows(stack, options)
    if windows is None:
        return _row(stack, _NO_WINDOW)
    try:
        return _measure_windows(stack, windows, largest, options, histogram)
    except LinAlgError:
        return _row(stack, _NOT_CONVERGED)


def _measure_windows(
    stack: MatrixStack, windows: Windows, largest: Tensor, options: SpectralOptions, histogram: bool
) -> Tensor:
    """Return the row of a layer that has windows, of finite numbers the largest of which is not 0.

    Raises:
        torch.linalg.LinAlgError: no solver converged on some window.
    """
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        windows = windows._replace(view=windows.view * 2.0**-exponent)
    by_window = window_eigenvalues(windows)
    eigenvalues = by_window.flatten(1).sort(dim=-1).values
    factor = torch.full_like(eigenvalues[0, 0], 2.0).pow(2 * exponent) * stack.eigenvalue_scale
    first = _first_counted(eigenvalues, factor, options)
    kept = eigenvalues.shape[-1] - first
    fits = fit_power_law(eigenvalues, options.fit, options.xmin_pos, first)
    outcome, detail = _outcome(eigenvalues, fits, kept, options)
    row = _row(stack, outcome, detail)
    # Apart from the factor, which leaves the range of float64 before its logarithm leaves anything.
    log_factor = 2 * exponent * math.log10(2) + math.log10(stack.eigenvalue_scale)
    figures = _figures(eigenvalues, fits, first, factor, log_factor)
    smallest = eigenvalues.gather(-1, first[:, None].clamp_max(eigenvalues.shape[-1] - 1))
    error = alpha_error(windows, by_window, fits, smallest, stack.matrices.numel(), options)
    xmin = eigenvalues.gather(-1, fits.tail_start[:, None]).log().mean().exp() * factor
    row[2 : _HEAD - 1] = torch.cat([figures, torch.stack([error, xmin])])
    row[_HEAD - 1] = kept.sum()
    if histogram:
        row[_HEAD:] = _histogram(eigenvalues, first, log_factor)
    return row


def alpha_of_row(row: Tensor) -> Tensor:
    """Return alpha, NaN where the layer has none."""
    return row[2].where(row[0] == _OK, torch.nan)


def _plan(stack: MatrixStack, options: SpectralOptions) -> Tensor:
    """Return the row of a weight without values: how many eigenvalues it has, or what its shape rules out."""
    row = torch.zeros(ROW_LENGTH, dtype=torch.float64)
    windows = layer_windows(stack, options)
    if windows is None:
        row[0] = _NO_WINDOW
        return row
    *lead, height, width = windows.view.shape
    number = math.prod(lead) * min(height, width)
    sample = number // windows.samples
    row[0], row[1] = (_NO_VALUES, 0) if sample >= options.min_eigenvalues else (_TOO_FEW, sample)
    row[2 : _HEAD - 1] = torch.nan
    row[_HEAD - 1] = number
    return row


def _solvable(matrices: Tensor) -> Tensor:
    """Move the matrices where they can be solved; eight-bit floats, which have no arithmetic, become float32."""
    # Detached, as a rule may forget to and threads do not inherit `no_grad`: eigenvectors would be computed too.
    matrices = matrices.detach().to(solver_device(matrices.device))
    return matrices.float() if matrices.element_size() == 1 else matrices


def solver_device(device: torch.device) -> torch.device:
    """Eigenvalues need float64, which Apple's GPUs lack and others are not tested for: the CPU stands in."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _row(stack: MatrixStack, outcome: int, detail: float = 0.0) -> Tensor:
    row = torch.zeros(ROW_LENGTH, dtype=torch.float64, device=stack.matrices.device)
    row[0], row[1] = outcome, detail
    return row


def _safe_exponent(dtype: torch.dtype, largest: Tensor) -> int:
    """Power of two to divide the weights by so that squares neither overflow nor vanish in float64."""
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = int(torch.frexp(largest).exponent)
    return 0 if abs(exponent) < 400 else max(-1000, min(exponent, 1000))


def _first_counted(eigenvalues: Tensor, factor: Tensor, options: SpectralOptions) -> Tensor:
    """Return `(S,)` how many of the smallest eigenvalues of each sample are left out."""
    size = eigenvalues.shape[-1]
    first = eigenvalues.new_zeros(len(eigenvalues), dtype=torch.int64)
    if options.filter_zeros:
        below = (eigenvalues * factor < ZERO_CUTOFF).sum(-1)
        first = below.where(below < size, 0)
    if options.relative_cutoff > 0:
        cut = (eigenvalues < options.relative_cutoff * eigenvalues[:, -1:]).sum(-1)
        first = torch.maximum(first, cut)
    return first


def _outcome(eigenvalues: Tensor, fits: PowerLawFit, kept: Tensor, options: SpectralOptions) -> tuple[int, float]:
    """Say whether the layer has an alpha, which it has when every sample has; or why not, and a number for it."""
    if int(kept.min()) < options.min_eigenvalues:
        return _TOO_FEW, float(kept.min())
    missing = fits.alpha.isnan()
    if not missing.any():
        return _OK, 0.0
    if options.fit == "median":
        zero = missing & (eigenvalues.gather(-1, fits.tail_start[:, None])[:, 0] == 0)
    else:
        zero = missing & (eigenvalues[:, -2] == 0)
    if zero.any():
        return _LOW_RANK, float(zero.sum())
    flat = eigenvalues[:, -1] <= eigenvalues[:, -2] * (1 + 1e-4)
    no_peak = options.fit == "xmin_peak" and not (missing & flat).any()
    return (_NO_PEAK if no_peak else _FLAT), float(missing.sum())


def _figures(eigenvalues: Tensor, fits: PowerLawFit, first: Tensor, factor: Tensor, log_factor: float) -> Tensor:
    """Return the mean over samples of each of `_FIGURES` but the last two."""
    counted = torch.arange(eigenvalues.shape[-1], device=first.device) >= first[:, None]
    values = eigenvalues.where(counted, 0)
    # In double precision: the logarithm of an integer tensor is single.
    number = counted.sum(-1).to(values.dtype)
    largest, total = values[:, -1], values.sum(-1)
    shares = values / total[:, None]
    figures = (
        fits.alpha,
        fits.ks_distance,
        fits.alpha * (largest.log10() + log_factor),
        largest * factor,
        total * factor,
        total / largest,
        total * factor / number,
        torch.special.entr(shares).sum(-1) / number.log(),
    )
    return torch.stack(figures).mean(-1)


def _histogram(eigenvalues: Tensor, first: Tensor, log_factor: float) -> Tensor:
    """Return low, high and counts of log10 of all positive eigenvalues that count; zeros where there are none."""
    index = torch.arange(eigenvalues.shape[-1], device=first.device)
    logs = eigenvalues[(index >= first[:, None]) & (eigenvalues > 0)].log10() + log_factor
    if not len(logs):
        return logs.new_zeros(2 + HISTOGRAM_BINS)
    low, high = logs.min(), logs.max()
    position = ((logs - low) / (high - low) * HISTOGRAM_BINS).nan_to_num(0).long()
    counts = torch.bincount(position.clamp(0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    return torch.cat([torch.stack([low, high]), counts.to(logs.dtype)])


def record_from_row(
    row: Sequence[float], options: SpectralOptions, kind: str, shape: tuple[int, ...], problem: str
) -> LayerRecord:
    """Turn a row back into a record."""
    if problem:
        return LayerRecord(status=problem, kind=kind, shape=shape)
    outcome, detail = int(row[0]), int(row[1])
    figures: dict[str, Any] = {
        name: value if math.isfinite(value) else None
        for name, value in zip(_FIGURES, row[2 : _HEAD - 1], strict=True)
    }
    number = int(row[_HEAD - 1])
    if outcome != _OK:
        figures.update(dict.fromkeys(("alpha", "ks_distance", "alpha_hat", "alpha_error", "xmin")))
    if number == 0:
        figures = {}
    low, high, *counts = row[_HEAD:]
    return LayerRecord(
        **figures,
        num_eigenvalues=number,
        status=_OUTCOMES[outcome].format(detail, options.min_eigenvalues),
        kind=kind,
        shape=shape,
        histogram=EsdHistogram(tuple(map(int, counts)), low, high) if any(counts) else None,
    )
