"""SparseGPT: choose the entries to prune, and correct those that stay (Frantar & Alistarh, arXiv 2301.00774).

With the inputs X `(in, tokens)` of a matrix W `(out, in)`, the Hessian of the squared output error is H = X X^T.
Let U be the upper Cholesky factor of H^-1. Columns are pruned from left to right. An entry costs w^2 / U_jj^2;
when it is pruned, its error w / U_jj is spread over the columns to its right by row j of U. Masks are chosen for
128 columns at a time, over all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from farms_tb.sparsity.masks import pruned_count, smallest

BLOCK_COLUMNS = 128
"""Columns whose mask is chosen together."""

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean over live inputs. The authors' code takes this
share of the mean over all inputs, of which dead ones count as 1."""

_MOST_DAMPING = 1e4


@dataclass(frozen=True)
class InverseFactor:
    """The Cholesky factor of an inverse Hessian.

    Attributes:
        factor: U, upper triangular `(in, in)`, float32: U^T U is the inverse of the damped Hessian.
        dead: features that are zero in every input, boolean `(in,)`.
        damping: what was added to the diagonal, as a share of its mean over the other features.
    """

    factor: Tensor
    dead: Tensor
    damping: float


def block_counts(rows: int, columns: int, sparsity: float, before: int = 0) -> list[int]:
    """Return how many entries are pruned in each block of columns.

    Args:
        rows: rows of the matrix.
        columns: its columns, cut into blocks of `BLOCK_COLUMNS`.
        sparsity: share of the matrix to prune.
        before: entries of the same weight that were counted already, in other groups of a convolution.

    Returns:
        A count for each block. Together they are `pruned_count(rows * columns, sparsity)`, of several groups those
        of the whole weight.

    Example:
        >>> block_counts(3, 300, 0.5)
        [192, 192, 66]
    """
    ends = [min(end, columns) for end in range(BLOCK_COLUMNS, columns + BLOCK_COLUMNS, BLOCK_COLUMNS)]
    totals = [pruned_count(before + rows * end, sparsity) for end in (0, *ends)]
    return [after - earlier for earlier, after in pairwise(totals)]


def inverse_factor(hessian: Tensor) -> InverseFactor:
    """Damp a Hessian, invert it and return the upper Cholesky factor of the inverse.

    The work is done in float32, and again in float64 where that fails. Where that fails too, the damping is raised
    tenfold until the factor exists.

    Args:
        hessian: X X^T `(in, in)`, any floating dtype. A common factor changes nothing. Features that are zero in
            every input get the mean diagonal of the others, where the authors' code puts 1 whatever their scale.

    Returns:
        The factor, and the damping that it took.

    Raises:
        ValueError: the Hessian is not finite.
    """
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite: the calibration inputs hold NaN or inf")
    dead = hessian.diagonal() == 0
    damping = DAMPING
    while damping <= _MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            factor = _factor(hessian.to(dtype), dead, damping)
            if factor is not None:
                return InverseFactor(factor.float(), dead, damping)
        damping *= 10
    raise ValueError("the Hessian cannot be factorised: its entries differ by too many orders of magnitude")


def _factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """Return the upper Cholesky factor of the damped inverse; None where the matrix is not positive definite."""
    # Scaled to a mean diagonal of 1 over live inputs, so that float32 neither overflows nor underflows.
    live = (~dead).sum().clamp_min(1)
    scale = (hessian.diagonal().sum() / live).clamp_min(torch.finfo(hessian.dtype).tiny)
    damped = hessian / scale
    added = damping * damped.diagonal().sum() / live
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    found = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    factor: Tensor = found.L
    return None if found.info or not factor.isfinite().all() else factor


def sparsegpt(
    weight: Tensor, inverse: InverseFactor, counts: Sequence[int], structure: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Prune a matrix, and correct the entries that stay.

    Args:
        weight: `(out, in)`, any floating dtype; it is not changed.
        inverse: from `inverse_factor`.
        counts: entries to prune in each block of `BLOCK_COLUMNS` columns, see `block_counts`; not used with a
            structure.
        structure: `(n, m)` to prune n of each m consecutive entries of a row instead; m divides `in`. The mask of
            a group is chosen when its first column is reached, after the corrections from the columns to its left.

    Returns:
        The corrected weight, float32, and the mask, boolean, True where it is zero now; both `(out, in)`.
    """
    corrected = weight.float().clone()
    mask = torch.zeros_like(corrected, dtype=torch.bool)
    for index, start in enumerate(range(0, corrected.shape[1], BLOCK_COLUMNS)):
        columns = slice(start, min(start + BLOCK_COLUMNS, corrected.shape[1]))
        if structure is None:
            scores = _scores(corrected[:, columns], inverse, columns)
            mask[:, columns] = smallest(scores.flatten()[None], counts[index])[0].view(scores.shape)
        _prune_block(corrected, mask, inverse, columns, structure)
    return corrected, mask


def _scores(weight: Tensor, inverse: InverseFactor, columns: slice) -> Tensor:
    """Return what pruning costs, w^2 / U_jj^2; nothing in columns whose inputs are all zero."""
    diagonal = inverse.factor.diagonal()[columns]
    scores = weight.square() / diagonal.square()
    return scores.masked_fill_(inverse.dead[columns], 0.0)


def _prune_block(
    weight: Tensor, mask: Tensor, inverse: InverseFactor, columns: slice, structure: tuple[int, int] | None
) -> None:
    """Prune a block of columns from left to right, in place, and correct all columns to its right.

    With a structure, the mask of these columns is filled, too; without, it is given.
    """
    factor = inverse.factor[columns, columns]
    block, block_mask = weight[:, columns], mask[:, columns]
    errors = torch.zeros_like(block)
    for column in range(block.shape[1]):
        if structure is not None and column % structure[1] == 0:
            group = slice(column, column + structure[1])
            of_group = slice(columns.start + group.start, columns.start + group.stop)
            scores = _scores(block[:, group], inverse, of_group)
            block_mask[:, group] = smallest(scores, structure[0])
        pruned = torch.where(block_mask[:, column], block[:, column], 0.0)
        errors[:, column] = pruned / factor[column, column]
        # The row of U begins with its diagonal: what is subtracted there is the pruned entry itself.
        block[:, column:] -= errors[:, column, None] * factor[column, None, column:]
        block[:, column].masked_fill_(block_mask[:, column], 0.0)
    weight[:, columns.stop :] -= errors @ inverse.factor[columns, columns.stop :]
