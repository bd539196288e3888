"""How sure an alpha is: its standard error.

That is how far alpha would move if the weights were drawn again. Windows that do not overlap are as good
as independent, so the spread of their own alphas tells. Measured on random weights, the standard error is within a
quarter of the true deviation for convolutions and up to twice it for overlapping windows; for the two search fits,
whose tail may jump elsewhere, it is up to half too small.
"""

from __future__ import annotations

import numpy as np

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.precision import Array
from farms_tb.spectra.windows import Windows

FEW_WINDOWS = 4
"""With fewer independent windows than this their spread tells little, and that of their quarters is taken."""


def quarters_of(windows: Windows, independent: float, options: SpectrumOptions) -> Windows | None:
    """Cut the first window of each sample in four, for layers with too few windows to tell alpha's spread.

    Args:
        windows: `(*lead, h, w)`.
        independent: how many windows of one sample would fit into the weight without overlap.
        options: how alpha is measured.

    Returns:
        `(S, 2, 2, h // 2, w // 2)`; None where there are enough windows, or a quarter would be too small.
    """
    if independent >= FEW_WINDOWS or windows.size // 2 < options.min_eigenvalues:
        return None
    quarters = windows.view[: windows.samples]
    while quarters.ndim > 3:
        quarters = quarters[:, 0]
    height, width = windows.view.shape[-2:]
    for dim, length in ((1, height // 2), (2, width // 2)):
        quarters = quarters.unfold(dim, length, length).narrow(dim, 0, 2)
    return Windows(quarters, windows.samples)


def alpha_variances(alpha: Array, tail: Array, of_pieces: Array, independent: float) -> Array:
    """Return the squared standard error of the alpha of each sample.

    With m independent pieces, the variance of alpha over the pieces divided by m. Where there are fewer than four,
    or where some piece has no alpha, the square of Hill's (alpha - 1) / sqrt(n) for n eigenvalues in the tail.
    That formula takes them for independent, but eigenvalues of one matrix repel each other: it is about threefold
    too large.

    Args:
        alpha: `(S,)`, that of each sample.
        tail: `(S,)`, number n of eigenvalues in the tail, of windows that do not overlap.
        of_pieces: `(S, P)`, alpha of each window of a sample, or of the quarters of one; NaN where it has none.
        independent: number m of such pieces that fit without overlap.

    Returns:
        `(S,)`.

    Source: Hill, A simple general approach to inference about the tail of a distribution, Annals of Statistics
    1975.
    """
    hill: Array = (alpha - 1) ** 2 / tail
    if of_pieces.shape[1] < 2 or independent < FEW_WINDOWS:
        return hill
    spread = of_pieces.var(axis=1, ddof=1) / independent
    return np.where(np.isfinite(spread), spread, hill)
