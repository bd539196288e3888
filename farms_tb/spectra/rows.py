"""What was found of a layer, as a row of float64 numbers, and as a record again.

Rows let processes share the layers and merge what they found exactly, by adding: a row that is not its own is
zeros to a process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.report import OK, EsdHistogram, LayerRecord
from farms_tb.weights.layers import NO_VALUES

HISTOGRAM_BINS = 64

FIGURES = (
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
# A row: outcome, a number for its message, the figures, the number of eigenvalues, what solved for them, low, high
# and bins of the ESD.
_END = 2 + len(FIGURES)
_HEAD = _END + 2
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
MEASURED, NON_FINITE, ZERO, NO_WINDOW, TOO_FEW, LOW_RANK, FLAT, NO_PEAK, WITHOUT_VALUES, NOT_CONVERGED = range(
    1, len(_OUTCOMES)
)

_SOLVED_BY = (
    "",
    *(
        f"{name} {precision}"
        for name in ("cpu", "torch", "cupy")
        for precision in ("float32", "float32 deflated", "float64", "float64 svd")
    ),
)


def make_row(
    outcome: int,
    detail: float = 0.0,
    *,
    figures: Sequence[float] = (math.nan,) * len(FIGURES),
    number: float = 0,
    solved_by: str = "",
    histogram: Sequence[float] = (),
) -> Tensor:
    """Return the row `(ROW_LENGTH,)` of a layer.

    Args:
        outcome: one of the constants of this module.
        detail: the number in its message.
        figures: `FIGURES`.
        number: the number of eigenvalues.
        solved_by: what solved for them, and in which precision.
        histogram: the lowest and the highest decimal logarithm, and what is in each bin between them.
    """
    head = (outcome, detail, *figures, number, _SOLVED_BY.index(solved_by), *histogram)
    return torch.tensor([*head, *(0.0,) * (ROW_LENGTH - len(head))], dtype=torch.float64)


def alpha_of_row(row: Tensor) -> Tensor:
    """Return alpha, NaN where the layer has none."""
    return row[2].where(row[0] == MEASURED, torch.nan)


def record_from_row(
    row: Sequence[float], options: SpectrumOptions, kind: str, shape: tuple[int, ...], problem: str
) -> LayerRecord:
    """Turn a row back into a record."""
    if problem:
        return LayerRecord(status=problem, kind=kind, shape=shape)
    outcome, detail = int(row[0]), int(row[1])
    figures: dict[str, Any] = {
        name: value if math.isfinite(value) else None for name, value in zip(FIGURES, row[2:_END], strict=True)
    }
    number, solver = map(int, row[_END:_HEAD])
    if outcome != MEASURED:
        figures.update(dict.fromkeys(("alpha", "ks_distance", "alpha_hat", "alpha_error", "xmin")))
    if number == 0:
        figures = {}
    low, high, *counts = row[_HEAD:]
    return LayerRecord(
        **figures,
        num_eigenvalues=number,
        solver=_SOLVED_BY[solver],
        status=_OUTCOMES[outcome].format(detail, options.min_eigenvalues),
        kind=kind,
        shape=shape,
        histogram=EsdHistogram(tuple(map(int, counts)), low, high) if any(counts) else None,
    )
