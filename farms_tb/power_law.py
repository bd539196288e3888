"""Power-law fit of eigenvalues: where the tail begins, its exponent alpha, and how well the law fits.

For a sample of N ascending eigenvalues and a tail that starts at index i, with n = N - i, the Hill estimator is

    alpha = 1 + n / (sum_{j >= i} ln lam_j - n ln lam_i)

and the Kolmogorov-Smirnov distance

    D = max_{j >= i} | 1 - (lam_j / lam_i)^(1 - alpha) - (j - i) / n |.

The three fits differ in how they choose i. All samples of a layer are fitted at once, without a loop over
eigenvalues. Sources: Hill, Annals of Statistics 1975; Clauset, Shalizi and Newman, SIAM Review 2009; TempBalance
(arXiv 2312.00359) for `median`; WeightWatcher (Martin, Peng and Mahoney 2021) for `xmin_peak`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farms_tb.options import Fit

FLAT_ALPHA = 1e4
"""A larger alpha is no exponent: the eigenvalues of the tail agree to four digits, as in an orthogonal matrix."""

_SEARCH_BYTES = 2**27
_PEAK_BINS = 100


class PowerLawFit(NamedTuple):
    """Fits of S samples; see `fit_power_law`.

    Attributes:
        alpha: `(S,)` float64, above 1; NaN where the sample has no fit.
        ks_distance: `(S,)` float64; NaN where the sample has no fit.
        tail_start: `(S,)` int64, the index of the first eigenvalue of the tail.
    """

    alpha: Tensor
    ks_distance: Tensor
    tail_start: Tensor


def fit_power_law(
    eigenvalues: Tensor, fit: Fit = "median", xmin_pos: float = 2.0, first: Tensor | None = None
) -> PowerLawFit:
    """Fit a power law to the tail of each sample.

    Args:
        eigenvalues: `(S, N)` float64, ascending along the last dimension, not negative.
        fit: `"median"` starts the tail at index int(N / xmin_pos); `"goodness-of-fit"` where D is smallest,
            the last eigenvalue left out; `"xmin_peak"` does the same search only among eigenvalues between
            log10(0.95 p) and 1.5 p, where p is the left edge of the fullest of 100 equal bins of log10 lam.
            (A logarithm as the lower bound of plain values is how the reference implementation has it; it is
            kept so that alphas compare.)
        xmin_pos: the divisor of the median fit.
        first: `(S,)` int64, the index of the first eigenvalue that counts in each sample; those before it are
            ignored as if they were not there. None for 0.

    Returns:
        alpha, D and the tail's start of each sample. A sample has no fit where its tail holds zeros, is flat
        (alpha above 1e4) or where the search finds no candidate.

    Example:
        >>> fit_power_law(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)).alpha
        tensor([3.8854], dtype=torch.float64)
    """
    if first is None:
        first = torch.zeros(len(eigenvalues), dtype=torch.int64, device=eigenvalues.device)
    logs = eigenvalues.log()
    alphas = _hill_alphas(logs)
    if fit == "median":
        size = eigenvalues.shape[-1]
        # Truncated in the way of int(N / xmin_pos), in double precision: a quotient of integers is single.
        # The clamp only matters for samples of no eigenvalues.
        start = (first + ((size - first).to(logs.dtype) / xmin_pos).long()).clamp_max(size - 1)
        alpha = alphas.gather(-1, start[:, None])
        distance = _ks_distances(logs, alpha, start[:, None])
    else:
        candidates = _candidates(eigenvalues, alphas, first, fit)
        distances = _search(logs, alphas, candidates)
        start = distances.argmin(-1)
        alpha, distance = (values.gather(-1, start[:, None]) for values in (alphas, distances))
        alpha = alpha.where(candidates.gather(-1, start[:, None]), torch.nan)
    alpha = alpha[:, 0]
    valid = (alpha > 1) & (alpha <= FLAT_ALPHA)
    return PowerLawFit(alpha.where(valid, torch.nan), distance[:, 0].where(valid, torch.nan), start)


def _hill_alphas(logs: Tensor) -> Tensor:
    """Return the Hill estimate `(S, N)` for a tail that starts at each index; not finite where there is none."""
    length = torch.arange(logs.shape[-1], 0, -1, dtype=logs.dtype, device=logs.device)
    # On the CPU, where a running sum adds up in one order: CUDA's differs from run to run.
    tail_sums = logs.cpu().flip(-1).cumsum(-1).flip(-1).to(logs.device)
    return 1 + length / (tail_sums - length * logs)


def _candidates(eigenvalues: Tensor, alphas: Tensor, first: Tensor, fit: Fit) -> Tensor:
    """Tell at which of the `(S, N)` indices a searched tail may start."""
    index = torch.arange(eigenvalues.shape[-1], device=eigenvalues.device)
    allowed = (index >= first[:, None]) & (index < len(index) - 1) & alphas.isfinite() & (alphas > 1)
    if fit == "xmin_peak":
        peak = _histogram_peak(eigenvalues, index >= first[:, None])
        allowed &= (eigenvalues >= (0.95 * peak).log10()) & (eigenvalues <= 1.5 * peak)
    return allowed


def _histogram_peak(eigenvalues: Tensor, counted: Tensor) -> Tensor:
    """Return the left edge `(S, 1)` of the fullest of 100 equal bins of log10 of the positive eigenvalues."""
    counted = counted & (eigenvalues > 0)
    logs = eigenvalues.log10()
    low = logs.where(counted, torch.inf).amin(-1, keepdim=True)
    high = logs.where(counted, -torch.inf).amax(-1, keepdim=True)
    width = (high - low) / _PEAK_BINS
    bins = ((logs - low) / width).nan_to_num(0, 0, 0).long().clamp(0, _PEAK_BINS - 1)
    counts = logs.new_zeros(len(logs), _PEAK_BINS).scatter_add(-1, bins, counted.to(logs.dtype))
    return 10 ** (low + counts.argmax(-1, keepdim=True) * width)


def _search(logs: Tensor, alphas: Tensor, candidates: Tensor) -> Tensor:
    """Return D `(S, N)` for a tail that starts at each candidate; 1, the worst, elsewhere."""
    samples, size = logs.shape
    distances = torch.ones_like(logs)
    step = max(1, _SEARCH_BYTES // (logs.element_size() * samples * size))
    for start in range(0, size, step):
        stop = min(start + step, size)
        if not candidates[:, start:stop].any():
            continue
        # A tail never reaches back before its start, so the columns before this chunk are not needed.
        tail_start = torch.arange(stop - start, device=logs.device).expand(samples, -1)
        found = _ks_distances(logs[:, start:], alphas[:, start:stop], tail_start)
        distances[:, start:stop] = found.where(candidates[:, start:stop], 1)
    return distances


def _ks_distances(logs: Tensor, alphas: Tensor, starts: Tensor) -> Tensor:
    """Return D `(S, c)` for c tails of each sample, given by their alphas and starts, both `(S, c)`."""
    index = torch.arange(logs.shape[-1], device=logs.device)
    offset = index - starts[..., None]
    rise = logs[:, None, :] - logs.gather(-1, starts)[..., None]
    fitted = 1 - ((1 - alphas)[..., None] * rise).exp()
    # In double precision: a quotient of integer tensors is single.
    empirical = offset / (logs.shape[-1] - starts)[..., None].to(logs.dtype)
    return (fitted - empirical).abs().where(offset >= 0, 0).amax(-1)
