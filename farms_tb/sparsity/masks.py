"""Which entries of a matrix are pruned: scores in, a mask out.

A mask is a boolean tensor of the weight's shape, True where an entry becomes zero. All functions here are pure.
They select by count, not by a threshold, so that ties (4-bit and 16-bit weights are full of them) cannot move the
sparsity: entries of equal score are pruned in the order of their index.

The matrices are oriented as `(out, in)`: a row holds the weights of one output.

Sources: Wanda (Sun et al., arXiv 2306.11695), DominoSearch (Sun et al., NeurIPS 2021) for N:8 with a different N
for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def pruned_count(entries: int, sparsity: float) -> int:
    """Return how many of `entries` are pruned: the integer nearest to `entries * sparsity`, halves upwards.

    Example:
        >>> pruned_count(10, 0.25), pruned_count(4, 0.5)
        (3, 2)
    """
    return math.floor(entries * sparsity + 0.5)


def row_counts(rows: int, total: int) -> Tensor:
    """Share a count among rows as evenly as integers allow: the remainder is carried from row to row.

    Row r gets floor((r + 1) total / rows) - floor(r total / rows), so that the first r rows together are never
    more than one entry away from their share.

    Args:
        rows: number of rows.
        total: entries to prune in all of them.

    Returns:
        An int64 tensor `(rows,)` whose sum is `total`.

    Example:
        >>> row_counts(4, 10).tolist()
        [2, 3, 2, 3]
    """
    steps = torch.arange(rows + 1, dtype=torch.int64) * total // rows
    return steps.diff()


def smallest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the entries of smallest score in each row, exactly as many as asked for.

    Args:
        scores: `(rows, columns)`, real, without NaN.
        counts: entries to mark, `(rows,)` or one number for every row, each between 0 and `columns`.

    Returns:
        A boolean mask `(rows, columns)`. Of entries with equal score, those of smaller index are marked first.
    """
    counts = torch.as_tensor(counts, device=scores.device).expand(scores.shape[0])
    mask = torch.zeros_like(scores, dtype=torch.bool)
    # Where a count is shared evenly, there are at most two different ones.
    for count in sorted(set(counts.tolist())):
        rows = (counts == count).nonzero()[:, 0]
        if len(rows) == len(counts):
            return _smallest(scores, count)
        mask[rows] = _smallest(scores[rows], count)
    return mask


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest entries of every row."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    mask = scores <= threshold
    surplus = mask.sum(1) - count
    tied = surplus.nonzero()[:, 0]
    if len(tied):
        mask[tied] = _first_of_ties(scores[tied], threshold[tied], count)
    return mask


def _first_of_ties(scores: Tensor, threshold: Tensor, count: int) -> Tensor:
    """Mark what lies below the threshold, and as many entries equal to it as are missing from `count`."""
    below = scores < threshold
    ties = scores == threshold
    missing = count - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1) <= missing))


def magnitude_mask(weight: Tensor, count: int) -> Tensor:
    """Mark the entries of smallest absolute value of the whole matrix.

    Args:
        weight: of any shape and floating dtype.
        count: entries to mark.

    Returns:
        A boolean mask of the weight's shape with `count` entries.

    Example:
        >>> magnitude_mask(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), 1)
        tensor([[False,  True],
                [False, False]])
    """
    return smallest(weight.abs().flatten()[None], count)[0].view(weight.shape)


def wanda_scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """Return the score of each entry, |W_ij| * ||x_j||_2 (Wanda, equation 1), in float32.

    Args:
        weight: `(out, in)`.
        squared_norms: sum over all inputs of the square of each feature, `(in,)`; or `(groups, in)` where each
            group of rows has inputs of its own, as in a grouped convolution. A common factor changes no mask.

    Returns:
        A float32 tensor `(out, in)`.
    """
    if squared_norms.ndim == 2 and len(squared_norms) > 1:
        squared_norms = squared_norms.repeat_interleave(len(weight) // len(squared_norms), dim=0)
    return weight.float().abs() * squared_norms.sqrt().float()


def wanda_mask(scores: Tensor, count: int) -> Tensor:
    """Mark the entries of smallest score in each row.

    Wanda compares the entries of one output with each other. Its authors prune floor(in * sparsity) entries of
    every row and so stay below the target; here the remainder is carried from row to row (`row_counts`).

    Args:
        scores: `(out, in)`, see `wanda_scores`.
        count: entries to mark in the whole matrix.

    Returns:
        A boolean mask `(out, in)` with `count` entries.
    """
    return smallest(scores, row_counts(scores.shape[0], count).to(scores.device))


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the n entries of smallest score of each m consecutive ones in a row (N:M sparsity).

    Args:
        scores: `(out, in)`, where m divides `in`.
        n: entries to mark in each group, 0 to m.
        m: entries of a group.

    Returns:
        A boolean mask `(out, in)`.

    Example:
        >>> n_of_m_mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    return smallest(scores.reshape(-1, m), n).view(scores.shape)


def mixed_counts(sparsity: Mapping[str, float], sizes: Mapping[str, int], m: int = 8) -> dict[str, int]:
    """Choose N of N:M for each group of matrices, so that all together come nearest to the target.

    Each N starts at floor(m * sparsity). Then the groups of the largest remainder get one more, one after the
    other, each as long as that brings the weighted mean nearer to the target. Equal remainders are taken in order.

    Args:
        sparsity: planned share of zeros of each group, 0 to 1.
        sizes: entries of each group.
        m: length of the runs that N counts zeros in.

    Returns:
        N of each group, 0 to m. The weighted mean of N / m differs from that of `sparsity` by at most half a step
        of one group.

    Example:
        >>> mixed_counts({"a": 0.5, "b": 0.7, "c": 0.8}, {"a": 64, "b": 64, "c": 64})
        {'a': 4, 'b': 6, 'c': 6}
    """
    wanted = {name: m * share for name, share in sparsity.items()}
    # 8 * 0.7 is 5.6 and 8 * 0.875 exactly 7; a plan's 0.8749999 is meant as 7, too.
    counts = {name: math.floor(value + 1e-6) for name, value in wanted.items()}
    remainders = {name: max(wanted[name] - counts[name], 0.0) for name in wanted}
    missing = sum(remainders[name] * sizes[name] for name in wanted)
    for name in sorted(wanted, key=lambda name: -remainders[name]):
        if counts[name] < m and 2 * missing >= sizes[name]:
            counts[name] += 1
            missing -= sizes[name]
    return counts
