"""Metrics of a layer's whole weight matrices, where alpha is measured on windows of them.

Of a matrix W of R rows and C <= R columns, whose entries have the mean square s^2, `stable_rank` is
||W||_F^2 / ||W||_2^2. An eigenvalue of W^T W is a *spike* if it lies above the edge of a random matrix,

    s^2 (sqrt(R) + sqrt(C))^2 + t s^2 (sqrt(R) + sqrt(C)) (1 / sqrt(R) + 1 / sqrt(C))^(1/3),

that of the Marchenko-Pastur law, and the quantile t at 99 % of the Tracy-Widom law, by which the largest
eigenvalue of a random matrix varies about it. A *trap* is a spike of a matrix whose entries were shuffled, after
their mean is taken off: entries so large that one alone makes an outlier.

Sources: Marchenko and Pastur 1967; Johnstone, On the distribution of the largest eigenvalue in principal
components analysis, Annals of Statistics 2001; correlation traps: Martin and Mahoney's WeightWatcher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farms_tb.report import LayerRecord
from farms_tb.spectra.precision import Array
from farms_tb.spectra.prepare import solvable
from farms_tb.spectra.samples import Samples
from farms_tb.weights.matrices import MatrixStack

DEAD = 1e-3
"""A row or column is dead if its norm is below this fraction of the largest."""

TRACY_WIDOM = {False: 2.0234, True: 0.4776}
"""Quantile at 99 % of the Tracy-Widom law, of real (order 1) and of complex (order 2) matrices."""

MAX_COLUMNS = 2048
"""Whole matrices of more columns are not solved: that would take minutes."""

BLOCK = 2**18
"""Entries that are squared at a time, few enough for the processor's cache."""


def with_matrix_metrics(
    records: Sequence[LayerRecord], stacks: Sequence[MatrixStack], samples: Sequence[Samples], *, whole: bool
) -> list[LayerRecord]:
    """Add what is known of whole matrices to the records of layers.

    Args:
        records: the records.
        stacks: the layers' matrices, `(K, R, C)` each.
        samples: the eigenvalues of their windows.
        whole: also solve for the eigenvalues of whole matrices, where windows are parts of them.
    """
    found = []
    for record, stack, own in zip(records, stacks, samples, strict=True):
        metrics = entry_metrics(stack, own.layer.largest)
        eigenvalues = own.by_window if _windows_are_whole(stack, own) else None
        if eigenvalues is None and whole:
            eigenvalues = whole_spectrum(stack)
        if eigenvalues is not None:
            metrics |= spectrum_metrics(eigenvalues, stack.matrices.shape[1], stack.matrices.is_complex())
        found.append(replace(record, **metrics))
    return found


def _windows_are_whole(stack: MatrixStack, samples: Samples) -> bool:
    number, rows, columns = stack.matrices.shape
    windows = samples.layer.windows
    return windows.number == number and windows.view.shape[-2:] == (rows, columns)


def entry_metrics(stack: MatrixStack, largest: float) -> dict[str, Any]:
    """Return `log_norm`, `dead_rows` and `dead_columns` of a layer, which need no eigenvalues.

    Args:
        stack: `(K, R, C)`, finite and not all zero.
        largest: largest absolute value of an entry.
    """
    rows, columns = _squares(solvable(stack).matrices, largest)
    total = float(rows.sum())
    return {
        "log_norm": math.log10(total * stack.eigenvalue_scale) + 2 * math.log10(largest),
        "dead_rows": int((rows < DEAD**2 * rows.max()).sum()),
        "dead_columns": int((columns < DEAD**2 * columns.max()).sum()),
    }


def _squares(matrices: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return the squared norms, divided by `largest` squared, of the rows `(R,)` and of the columns `(C,)`."""
    number, height, width = matrices.shape
    rows, columns = [], []
    for block in matrices.split(max(1, BLOCK // (number * width)) if matrices.is_cpu else height, dim=1):
        # Divided by the largest, squares stay within the range of single precision.
        squares = (block.to(torch.promote_types(block.dtype, torch.float32)) / largest).abs().square_()
        rows.append(squares.sum(dim=(0, 2)))
        columns.append(squares.sum(dim=(0, 1)))
    return torch.cat(rows).cpu().double(), torch.stack(columns).sum(dim=0).cpu().double()


def spectrum_metrics(eigenvalues: Array, rows: int, complex_weight: bool) -> dict[str, Any]:
    """Return `stable_rank` and `num_spikes` of whole matrices.

    Args:
        eigenvalues: `(K, C)`, of W^T W of each matrix, ascending, in any unit.
        rows: R.
        complex_weight: whether the matrices are complex.
    """
    total, largest = eigenvalues.sum(axis=1), eigenvalues[:, -1]
    alive = largest > 0
    if not alive.any() or not np.isfinite(total).all():
        return {}
    columns = eigenvalues.shape[1]
    edge = total / (rows * columns) * edge_of(rows, columns, complex_weight)
    return {
        "stable_rank": float((total[alive] / largest[alive]).mean()),
        "num_spikes": int((eigenvalues > edge[:, None]).sum()),
    }


def edge_of(rows: int, columns: int, complex_weight: bool) -> float:
    """Return the edge above which a random matrix of unit mean square has no eigenvalue, with 99 % probability."""
    roots = math.sqrt(rows) + math.sqrt(columns)
    scale = roots * (1 / math.sqrt(rows) + 1 / math.sqrt(columns)) ** (1 / 3)
    return roots**2 + TRACY_WIDOM[complex_weight] * scale


def whole_spectrum(stack: MatrixStack) -> Array | None:
    """Return the eigenvalues `(K, C)` of W^T W of each whole matrix; None where that would take minutes.

    Args:
        stack: `(K, R, C)`; the eigenvalues are ascending, in units of its largest entry, squared.
    """
    if stack.matrices.shape[-1] > MAX_COLUMNS:
        return None
    wide = _unit_scale(stack, torch.float64)
    return np.asarray(torch.linalg.eigvalsh(wide.mH @ wide).clamp_(min=0).cpu().numpy())


def count_traps(stack: MatrixStack) -> int | None:
    """Return the number of traps in a layer whose entries were shuffled; None where that would take minutes.

    Args:
        stack: `(K, R, C)`, its entries in random order.
    """
    rows, columns = stack.matrices.shape[1:]
    if columns > MAX_COLUMNS:
        return None
    wide = _unit_scale(stack, torch.float32)
    wide -= wide.mean()
    limit = float(wide.abs().square().mean()) * edge_of(rows, columns, wide.is_complex())
    gram = wide.mH @ wide
    # Without traps, as nearly always, limit - W^T W is positive definite: a factorisation that takes a tenth of
    # the time of eigenvalues tells.
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit)
    if not torch.linalg.cholesky_ex(shifted).info.any():
        return 0
    return int((torch.linalg.eigvalsh(gram) > limit).sum())


def _unit_scale(stack: MatrixStack, dtype: torch.dtype) -> Tensor:
    """Return the matrices divided by their largest entry, in a real type or the complex one of its precision."""
    matrices = solvable(stack).matrices
    wide = matrices.to(dtype.to_complex() if matrices.is_complex() else dtype)
    return wide / wide.abs().max()
