"""Which precision a layer's eigenvalues need, decided from the eigenvalues themselves.

Three precisions, each slower and more accurate than the one before:

* `"float32"`: the Gram matrix and its eigenvalues in single precision;
* `"float64"`: the same in double precision;
* `"svd"`: the singular values of the window itself in double precision.

**The error bound.** A symmetric eigensolver is backward stable: it returns the eigenvalues of G + E with
||E||_2 <= c u ||G||_2, where u is the unit roundoff and ||G||_2 = lam_max; forming the Gram matrix G adds an error
of the same kind. By Weyl's inequality every eigenvalue is off by at most c u lam_max, and so ln lam_j of every
eigenvalue of the tail by at most r = c u lam_max / xmin, to first order. From

    alpha - 1 = n / sum_j (ln lam_j - ln xmin)

follows |d alpha| <= (alpha - 1)^2 * (mean_j |d ln lam_j| + |d ln xmin|) <= (alpha - 1)^2 * 2 r.

The worst case of c grows with the size of the matrix, but the errors of single operations are not aligned with
an eigenvector, and those of eigenvalues far below lam_max come out smaller than those of the largest ones. So 2
r is taken as u (A lam_max / xmin + B), with `FAR_BELOW` A = 8 and `OF_LARGEST` B = 64, which are measured:
`tests/spectra/test_precision.py` allows errors of half of it, docs/method.md says what was seen.

Source of the bound: Golub and Van Loan, Matrix Computations, section 8.1; of the growth with size: Higham and
Mary, A new approach to probabilistic rounding error analysis, SIAM Journal on Scientific Computing 2019.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.power_law import fit_power_law, searches
from farms_tb.spectra.windows import Windows

WindowPrecision = Literal["float32", "float64", "svd"]
Array = npt.NDArray[np.float64]

PRECISIONS: tuple[WindowPrecision, ...] = ("float32", "float64", "svd")
"""From the fastest to the most accurate."""

FLOAT32, FLOAT64, SVD = range(3)
"""Positions in `PRECISIONS`."""

ROUNDOFF: dict[WindowPrecision, float] = {"float32": 2.0**-24, "float64": 2.0**-53, "svd": 0.0}
"""Unit roundoff u. Singular values are the most accurate there is: no bound leads further."""

FAR_BELOW, OF_LARGEST = 8.0, 64.0
"""A and B of the bound above: for eigenvalues far below lam_max, and for the largest ones."""

ZERO = 32.0
"""Eigenvalues of a Gram matrix below this many u lam_max cannot be told from 0 and count as 0. Of matrices of
lower rank, up to 16000 x 2000, zeros came out at up to 9."""

ALPHA_TOLERANCE = 5e-5
"""Error of alpha, relative to alpha, up to which a faster precision is taken. The promise to users is 1e-4."""

WINDOW_TOLERANCE = 1e-3
"""Allowed relative error of the eigenvalue where the tail of a single window begins. It is looser, because the
alphas of single windows enter only the standard error."""

SMALLEST_SINGLE = 64
"""On the CPU, real windows with fewer columns take about as long in double precision."""

PILOT_WINDOWS = 4
"""Layers with at least this many windows solve one of them first, as a pilot, and choose the precision by it."""


def first_level(windows: Windows, largest: float, options: SpectrumOptions) -> int:
    """Return the position in `PRECISIONS` of the fastest one that is worth a try for a layer.

    Args:
        windows: the layer's windows.
        largest: largest absolute value of the layer's weights.
        options: how alpha is measured.
    """
    reasons_for_double = (
        options.precision == "float64",
        windows.view.dtype in (torch.float64, torch.complex128),
        # The searches compare KS distances, the cutoffs eigenvalues: a rounding error may decide either.
        searches(options.fit),
        options.filter_zeros,
        options.relative_cutoff > 0,
        # Eigenvalues are squares, and must stay within the range of single precision.
        not 2.0**-40 < largest < 2.0**40,
        windows.size < SMALLEST_SINGLE and windows.view.is_cpu and not windows.view.is_complex(),
    )
    return FLOAT64 if any(reasons_for_double) else FLOAT32


def imprecise_windows(
    values: Array, levels: npt.NDArray[np.int8], lowest: Array, alpha: Array, options: SpectrumOptions
) -> npt.NDArray[np.bool_]:
    """Return which windows of a layer must be solved again, in the next more accurate precision.

    Args:
        values: `(W, w)`, eigenvalues of the layer's windows, ascending.
        levels: `(W,)`, how they were solved, as positions in `PRECISIONS`.
        lowest: `(S,)`, the smallest eigenvalue that counts for alpha: where the tail of each sample begins, or
            at a cutoff.
        alpha: `(S,)`, alpha of each sample, NaN where it has none.
        options: how alpha is measured.

    Returns:
        `(W,)`.
    """
    roundoff = np.array([ROUNDOFF[precision] for precision in PRECISIONS])[levels]
    largest = values[:, -1]
    windows = len(values) // len(alpha)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if searches(options.fit):
            # The tail may start at any eigenvalue, the smallest one among them.
            error = roundoff * (FAR_BELOW * largest / values[:, 0] + OF_LARGEST)
        else:
            lowest, alpha = np.repeat(lowest, windows), np.repeat(alpha, windows)
            error = roundoff * (FAR_BELOW * largest / lowest + OF_LARGEST) * (alpha - 1) ** 2 / alpha
        # Not "larger than", so that NaN counts as imprecise.
        imprecise = ~(error <= ALPHA_TOLERANCE)
        own_xmin = values[:, int(values.shape[1] / options.xmin_pos)]
        imprecise |= (levels == FLOAT32) & ~(roundoff * FAR_BELOW * largest / own_xmin <= WINDOW_TOLERANCE)
    return np.asarray(imprecise & (levels < SVD))


def single_precision_suffices(pilot: Array, options: SpectrumOptions) -> bool:
    """Return whether, by one window of a layer, single precision will do for the others.

    Args:
        pilot: `(1, w)`, its eigenvalues in double precision, ascending.
        options: how alpha is measured.
    """
    fit = fit_power_law(torch.from_numpy(pilot), options.fit, options.xmin_pos, distance=False)
    xmin = pilot[:, int(fit.tail_start)]
    level = np.array([FLOAT32], dtype=np.int8)
    return not imprecise_windows(pilot, level, xmin, fit.alpha.numpy(), options).any()
