"""Power-law fit of eigenvalues: where the tail begins, its exponent alpha, and how well the law fits.

For a sample of N ascending eigenvalues and a tail that starts at index i, with n = N - i, the Hill estimator is

    alpha = 1 + n / (sum_{j >= i} ln lam_j - n ln lam_i)

and the Kolmogorov-Smirnov distance

    D = max_{j >= i} | 1 - (lam_j / lam_i)^(1 - alpha) - (j - i) / n |.

The three fits differ in how they choose i. All samples of a layer are fitted at once, without a loop over
eigenvalues; a search computes D in full for those few tails only that may have the smallest.

Sources: Hill, Annals of Statistics 1975; Clauset, Shalizi and Newman, SIAM Review 2009; TempBalance (arXiv
2312.00359) for `median`; WeightWatcher (Martin, Peng and Mahoney 2021) for `xmin_peak`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farms_tb.options import Fit

FLAT_ALPHA = 1e4
"""A larger alpha is no exponent: the eigenvalues of the tail agree to four digits, as in an orthogonal matrix."""

# Memory for the points of the tails that are looked at together: they fit a processor's cache.
_SEARCH_BYTES = 2**22
# A search looks at each tail in this many points; at those left in this many times as many; and so on.
_FIRST_POINTS, _GROWTH = 32, 8
# A bound may exceed the smallest D by this much: rounding, which is far smaller, must not decide.
_SLACK = 1e-12
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
    eigenvalues: Tensor,
    fit: Fit = "median",
    xmin_pos: float = 2.0,
    first: Tensor | None = None,
    *,
    distance: bool = True,
) -> PowerLawFit:
    """Fit a power law to the tail of each sample.

    Args:
        eigenvalues: `(S, N)` float64 on the CPU, ascending along the last dimension, not negative.
        fit: `"median"` starts the tail at index int(N / xmin_pos); `"goodness-of-fit"` where D is smallest,
            the last eigenvalue left out; `"xmin_peak"` does the same search only among eigenvalues between
            log10(0.95 p) and 1.5 p, where p is the left edge of the fullest of 100 equal bins of log10 lam.
            (A logarithm as the lower bound of plain values is how the reference implementation has it; it is
            kept so that alphas compare.)
        xmin_pos: the divisor of the median fit.
        first: `(S,)` int64, the index of the first eigenvalue that counts in each sample; those before it are
            ignored as if they were not there. None for 0.
        distance: whether D is wanted; without it, it is NaN after a median fit, which takes half the time.

    Returns:
        alpha, D and the tail's start of each sample. A sample has no fit where its tail holds zeros, is flat
        (alpha above 1e4) or where the search finds no candidate.

    Example:
        >>> fit_power_law(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)).alpha
        tensor([3.8854], dtype=torch.float64)
    """
    if first is None:
        first = torch.zeros(len(eigenvalues), dtype=torch.int64, device=eigenvalues.device)
    if fit == "median":
        size = eigenvalues.shape[-1]
        # Truncated in the way of int(N / xmin_pos), in double precision: a quotient of integers is single.
        # The clamp only matters for samples of no eigenvalues.
        start = (first + ((size - first).to(eigenvalues.dtype) / xmin_pos).long()).clamp_max(size - 1)
        alpha, distances = _fit_tails(eigenvalues, start[:, None], distance)
    else:
        logs = eigenvalues.log()
        alphas = _hill_alphas(logs)
        candidates = _candidates(eigenvalues, alphas, first, fit)
        distances = _search(logs, alphas, candidates)
        start = distances.argmin(-1)
        alpha, distances = (values.gather(-1, start[:, None]) for values in (alphas, distances))
        alpha = alpha.where(candidates.gather(-1, start[:, None]), torch.nan)
    alpha = alpha[:, 0]
    valid = (alpha > 1) & (alpha <= FLAT_ALPHA)
    return PowerLawFit(alpha.where(valid, torch.nan), distances[:, 0].where(valid, torch.nan), start)


def searches(fit: Fit) -> bool:
    """Return whether a fit looks for the start of the tail by its KS distances, and not at a given rank.

    Then the smallest change of an eigenvalue may start the tail elsewhere, and the last one never starts it.
    """
    return fit != "median"


def _fit_tails(eigenvalues: Tensor, start: Tensor, with_distance: bool) -> tuple[Tensor, Tensor]:
    """Return alpha and D, `(S, 1)` each, of one tail of each sample; D is NaN where it is not wanted.

    Args:
        eigenvalues: `(S, N)`, ascending.
        start: `(S, 1)` int64, the index of the first eigenvalue of the tail.
        with_distance: whether D is wanted.
    """
    left_out = int(start.min())
    logs, start = eigenvalues[:, left_out:].log(), start - left_out
    index = torch.arange(logs.shape[-1], device=logs.device)
    length = (len(index) - start).to(logs.dtype)
    rise = logs - logs.gather(-1, start)
    inside = index >= start
    # Summed in one order: that of torch's own sum depends on the number of threads.
    alpha = 1 + length / rise.where(inside, 0).cumsum(-1)[:, -1:]
    if not with_distance:
        return alpha, torch.full_like(alpha, torch.nan)
    distance = 1 - ((1 - alpha) * rise).exp() - (index - start) / length
    return alpha, distance.abs().where(inside, 0).amax(-1, keepdim=True)


def _hill_alphas(logs: Tensor) -> Tensor:
    """Return the Hill estimate `(S, N)` for a tail that starts at each index; not finite where there is none.

    Args:
        logs: `(S, N)`, ln of the eigenvalues, ascending.
    """
    length = torch.arange(logs.shape[-1], 0, -1, dtype=logs.dtype, device=logs.device)
    # All sums over tails at once, from the largest eigenvalue down.
    tail_sums = logs.flip(-1).cumsum(-1).flip(-1)
    return 1 + length / (tail_sums - length * logs)


def _candidates(eigenvalues: Tensor, alphas: Tensor, first: Tensor, fit: Fit) -> Tensor:
    """Return at which of the `(S, N)` indices a searched tail may start.

    Args:
        eigenvalues: `(S, N)`, ascending.
        alphas: `(S, N)`, the Hill estimate for a start at each.
        first: `(S,)`, the index of the first eigenvalue that counts.
        fit: `"xmin_peak"` leaves a range about the peak of the histogram.
    """
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
    """Return D `(S, N)` for a tail that starts at each candidate that may be the best; 1, the worst, elsewhere.

    D is a maximum over the points of a tail, so the maximum over some of them is a lower bound. A candidate is out
    as soon as its bound exceeds the smallest D found in its sample; those left are looked at in ever more points.
    That is twice as fast as D of all for 512 eigenvalues, and 60 times as fast for 4096.

    Args:
        logs: `(S, N)`, ln of the eigenvalues, ascending.
        alphas: `(S, N)`, the Hill estimate for a start at each.
        candidates: `(S, N)` bool, where a tail may start.
    """
    size = logs.shape[-1]
    length = torch.arange(size, 0, -1, device=logs.device)
    distances = torch.ones_like(logs)
    left, known, points = candidates, torch.zeros_like(candidates), _FIRST_POINTS
    while left.any():
        distances[left] = _ks_distances(logs, alphas, left, points)
        known = known | (left & (length <= points))
        # The most promising candidate of each sample, in full: its D is what the others must not exceed.
        first = distances.where(left, torch.inf).argmin(-1, keepdim=True)
        promising = torch.zeros_like(left).scatter(-1, first, True) & left & ~known
        distances[promising] = _ks_distances(logs, alphas, promising, size)
        known = known | promising
        smallest = distances.where(known, torch.inf).amin(-1, keepdim=True)
        left = left & ~known & (distances <= smallest + _SLACK)
        points *= _GROWTH
    return distances.where(known, 1)


def _ks_distances(logs: Tensor, alphas: Tensor, tails: Tensor, points: int) -> Tensor:
    """Return D of each tail whose start is marked in `tails` `(S, N)`, in order; a lower bound of D in long tails.

    Tails of more than `points` eigenvalues are looked at in about as many, evenly spaced by rank.

    Args:
        logs: `(S, N)`, ln of the eigenvalues, ascending.
        alphas: `(S, N)`, the Hill estimate for a start at each.
        tails: `(S, N)` bool, T of which are true.
        points: number of points of a tail.

    Returns:
        `(T,)`, sample by sample.
    """
    points = min(points, logs.shape[-1])
    step = max(1, _SEARCH_BYTES // (logs.element_size() * points))
    index = torch.arange(points, device=logs.device)
    found = []
    for chunk in torch.split(tails.nonzero(), step):
        row, start = chunk[:, :1], chunk[:, 1:]
        length = logs.shape[-1] - start
        spacing = (length + points - 1) // points
        # The last eigenvalue stands in for points beyond it, and is one of the tail's own.
        offset = torch.minimum(index * spacing, length - 1)
        rise = logs[row, start + offset] - logs[row, start]
        fitted = 1 - ((1 - alphas[row, start]) * rise).exp()
        # In double precision: a quotient of integer tensors is single.
        empirical = offset / length.to(logs.dtype)
        found.append((fitted - empirical).abs().amax(-1))
    return torch.cat(found)
