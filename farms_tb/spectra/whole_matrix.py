"""Metrics of a layer's whole weight matrices, where alpha is measured on windows of them.

Of a matrix W of R rows and C <= R columns, `stable_rank` is ||W||_F^2 / ||W||_2^2. Let W' be W without the mean of
its entries, and s^2 their variance. An eigenvalue of W'^T W' is an outlier if it lies above the edge of a random
matrix,

    s^2 (sqrt(R) + sqrt(C))^2 + t s^2 (sqrt(R) + sqrt(C)) (1 / sqrt(R) + 1 / sqrt(C))^(1/3):

that of the Marchenko-Pastur law, and a quantile t of the Tracy-Widom law, by which the largest eigenvalue of a
random matrix varies about it. A *spike* is an outlier of the matrix itself, at the quantile of 99.9 %. A *trap* is
one of a matrix whose entries were shuffled, at 99 %: an entry so large that it makes an outlier alone. The mean is
taken off as it makes an outlier of its own, also in shuffled and in random matrices, such as those that a Fourier
layer begins with, whose entries are positive.

Sources: Marchenko and Pastur 1967; Johnstone, On the distribution of the largest eigenvalue in principal
components analysis, Annals of Statistics 2001; correlation traps: Martin and Mahoney's WeightWatcher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.report import LayerRecord, Outliers
from farms_tb.spectra.eigenvalues import gram_matrices
from farms_tb.spectra.precision import Array
from farms_tb.spectra.prepare import solvable
from farms_tb.spectra.samples import Samples
from farms_tb.weights.stacks import MatrixStack

DEAD = 1e-3
"""A row or column is dead if its norm is below this fraction of the largest."""

SPIKE_QUANTILE = {"real": 3.2722, "spectral": 1.3144}
"""Quantile at 99.9 % of the Tracy-Widom law, of real (order 1) and of complex (order 2) matrices."""

TRAP_QUANTILE = {"real": 2.0234, "spectral": 0.4776}
"""Quantile at 99 % of the same law."""

MAX_COLUMNS = 2048
"""Whole matrices of more columns are not solved: that would take minutes."""

FEW_ROWS = 128
"""So many rows of a large matrix are looked at before all, as they can show that no column is dead: both norms of
4096 x 1024 entries then take a third of the time."""

BLOCK = 2**17
"""Entries of a matrix that are squared at a time, few enough for the processor's cache: 1.4 times as fast as all
of 4096 x 1024 at once."""


def with_matrix_metrics(
    records: Sequence[LayerRecord], found: Sequence[Samples], *, whole: bool
) -> list[LayerRecord]:
    """Add what is known of whole matrices to the records of layers.

    With `whole`, their eigenvalues are solved for where windows are parts of them.
    """
    return [
        # There are no eigenvalues where the solver did not converge.
        replace(record, **_matrix_metrics(samples, whole=whole)) if record.num_eigenvalues > 0 else record
        for record, samples in zip(records, found, strict=True)
    ]


def _matrix_metrics(samples: Samples, *, whole: bool) -> dict[str, Any]:
    """Return the metrics of the whole matrices of one layer; see `with_matrix_metrics`."""
    stack, windows = samples.layer.stack, samples.layer.windows
    eigenvalues = None
    if (windows.number, *windows.view.shape[-2:]) == stack.matrices.shape:
        # Each window is one of the K matrices, whole: its eigenvalues are known already.
        eigenvalues = samples.table.values
    elif whole:
        eigenvalues = _whole_spectrum(stack)
    metrics = entry_metrics(stack, samples.layer.largest)
    metrics["stable_rank"] = None if eigenvalues is None else _stable_rank(eigenvalues)
    if whole:
        metrics |= _spikes(stack)
    return metrics


def entry_metrics(stack: MatrixStack, largest: float) -> dict[str, Any]:
    """Return `log_norm`, `dead_rows` and `dead_columns` of a layer, which need no eigenvalues.

    Args:
        stack: `(K, R, C)`, finite and not all zero.
        largest: largest absolute value of an entry.
    """
    # Squares of weights of any common size stay within the range of single precision as they are.
    unit = 1.0 if 1e-12 < largest < 1e12 else largest
    rows, columns = _squares(stack.matrices, unit)
    return {
        "log_norm": math.log10(float(rows.sum())) + 2 * math.log10(unit),
        "dead_rows": int((rows < DEAD**2 * rows.max()).sum()),
        "dead_columns": int((columns < DEAD**2 * columns.max()).sum()),
    }


def _squares(matrices: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the rows `(R,)` and of the columns `(C,)`, of entries divided by `unit`.

    Those of the columns may be of some rows alone, where these show that no column is dead.
    """
    number, height, _ = matrices.shape
    if unit == 1 and number == 1 and matrices.stride(2) == 1 and height > FEW_ROWS and not matrices.is_complex():
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        rows = torch.linalg.vector_norm(matrices[0], dim=1, dtype=dtype).square()
        columns = _summed_squares(matrices[:, :FEW_ROWS], unit).sum(dim=0)
        # No column has a larger norm than the matrix.
        if columns.min() >= DEAD**2 * rows.sum():
            return rows.double().cpu(), columns.double().cpu()
    return _all_squares(matrices, unit)


def _all_squares(matrices: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Return the squared norms, over all K matrices, of all rows `(R,)` and of all columns `(C,)`.

    They are float64 on the CPU, summed in single precision unless the entries are of a wider type.
    """
    rows, columns = [], []
    height = BLOCK // matrices.shape[2] + 1 if matrices.is_cpu else matrices.shape[1]
    for begin in range(0, matrices.shape[1], height):
        squares = _summed_squares(matrices[:, begin : begin + height], unit)
        # Products with a vector of ones take half the time of sums.
        rows.append(squares @ squares.new_ones(squares.shape[1]))
        columns.append(squares.new_ones(squares.shape[0]) @ squares)
    return torch.cat(rows).double().cpu(), torch.stack(columns).sum(dim=0).double().cpu()


def _summed_squares(block: Tensor, unit: float) -> Tensor:
    """Return the squared absolute values of entries, summed over the K matrices.

    Args:
        block: `(K, r, C)`, some rows of the matrices.
        unit: what the entries are divided by.

    Returns:
        `(r, C)` real, in single precision or the wider type of the entries.
    """
    parts = torch.view_as_real(block.resolve_conj()) if block.is_complex() else block.unsqueeze(-1)
    parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
    if unit != 1:
        parts = parts / unit
    number, *_, both = parts.shape
    # A sum over a dimension of length 1 takes ten times as long as the squares.
    return parts.square().sum(dim=(0, 3)) if number * both > 1 else parts[0, :, :, 0].square()


def _stable_rank(eigenvalues: Array) -> float | None:
    """Return the mean of ||W||_F^2 / ||W||_2^2 over matrices that are not all zero.

    Args:
        eigenvalues: `(K, C)`, of W^T W of each matrix, ascending, in any unit.
    """
    total, largest = eigenvalues.sum(axis=1), eigenvalues[:, -1]
    ratios = total[largest > 0] / largest[largest > 0]
    return float(ratios.mean()) if len(ratios) and np.isfinite(ratios).all() else None


def _whole_spectrum(stack: MatrixStack) -> Array | None:
    """Return the eigenvalues `(K, C)` of W^T W of each whole matrix; None where they cannot be had in seconds.

    Args:
        stack: `(K, R, C)`; the eigenvalues are ascending, in units of its largest entry, squared.
    """
    if stack.matrices.shape[-1] > MAX_COLUMNS:
        return None
    wide, _ = _unit_scale(stack, torch.float64)
    try:
        return np.asarray(torch.linalg.eigvalsh(wide.mH @ wide).clamp_(min=0).cpu().numpy())
    except LinAlgError:
        return None


def _spikes(stack: MatrixStack) -> dict[str, Any]:
    """Return `num_spikes` and `outliers` of a layer, None each where they are not known.

    The number does not depend on the scale of the weights; the eigenvalues may leave the range of float64, and are
    None then.
    """
    spikes = find_outliers(stack, SPIKE_QUANTILE)
    if spikes is None:
        return {"num_spikes": None, "outliers": None}
    in_range = 0 < spikes.edge < math.inf
    return {"num_spikes": len(spikes.spikes), "outliers": spikes if in_range else None}


def find_outliers(stack: MatrixStack, quantile: Mapping[str, float]) -> Outliers | None:
    """Return the outliers of all K matrices, as spikes; None where they cannot be had in seconds.

    Args:
        stack: `(K, R, C)`.
        quantile: of the Tracy-Widom law, for each kind of weights.

    Returns:
        The edge, and the eigenvalues of `(W - mean)^T (W - mean)` above it, times the stack's `eigenvalue_scale`.
    """
    rows, columns = stack.matrices.shape[1:]
    if columns > MAX_COLUMNS:
        return None
    centred, largest = _unit_scale(stack, torch.float32)
    centred -= centred.mean()
    variance = float(centred.abs().square().mean())
    limit = variance * outlier_edge(rows, columns, quantile[stack.kind])
    gram = gram_matrices(centred)
    # Without outliers limit - W^T W is positive definite, which a factorisation tells in a tenth of the time.
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit)
    hard = torch.linalg.cholesky_ex(shifted).info != 0
    try:
        eigenvalues = torch.linalg.eigvalsh(gram[hard])
    except LinAlgError:
        return None
    unit = largest * largest * stack.eigenvalue_scale
    beyond = eigenvalues[eigenvalues > limit].sort().values
    return Outliers(limit * unit, tuple(value * unit for value in beyond.tolist()))


def outlier_edge(rows: int, columns: int, quantile: float) -> float:
    """Return the edge above which an eigenvalue of a random matrix of variance 1 is an outlier.

    Args:
        rows: R.
        columns: C.
        quantile: of the Tracy-Widom law, t above.
    """
    roots = math.sqrt(rows) + math.sqrt(columns)
    scale = roots * math.pow(1 / math.sqrt(rows) + 1 / math.sqrt(columns), 1 / 3)
    return roots * roots + quantile * scale


def _unit_scale(stack: MatrixStack, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the matrices divided by their largest entry, and that entry's absolute value.

    Args:
        stack: `(K, R, C)`.
        dtype: the type of the matrices returned, or for complex ones the type of their real part.
    """
    matrices = solvable(stack).matrices
    wanted = dtype.to_complex() if matrices.is_complex() else dtype
    # Weights in double precision may lie outside the range of single precision until they are divided.
    wide = matrices.to(torch.promote_types(matrices.dtype, wanted))
    largest = wide.abs().max()
    return (wide / largest).to(wanted), float(largest)
