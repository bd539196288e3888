"""How far a layer's alpha would move if its weights were drawn again: the standard error.

Windows that do not overlap are as good as independent, so the spread of their own alphas tells. Measured on random
weights, the standard error is within a quarter of the true deviation for convolutions, up to twice it for
overlapping windows; for the two search fits, whose tail may jump elsewhere, it is up to half too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.windows import Windows

# With fewer windows than this their spread tells little, and quarters of them stand in.
_FEW = 4


def parts_of_windows(windows: Windows, entries: int, options: SpectrumOptions) -> Windows | None:
    """Return the quarters of windows whose spread is needed; None where that of the windows tells.

    Args:
        windows: the windows of the layer.
        entries: number of entries of the weight.
        options: how alpha is measured.
    """
    size = min(windows.view.shape[-2:])
    few = independent_windows(windows, entries) < _FEW
    return _quarters(windows) if few and size // 2 >= options.min_eigenvalues else None


def alpha_variance(alpha: float, tail: float, of_pieces: Sequence[float], room: float) -> float:
    """Return the squared standard error of the alpha of a sample.

    The variance of alpha over a sample's windows, each fitted on its own, divided by how many of them there would
    be room for without overlap. Where these are fewer than four, the variance over the quarters of one window.
    Where even quarters are too small, that of Hill's (alpha - 1) / sqrt(n) for n eigenvalues in the tail, which
    takes them for independent: eigenvalues of one matrix repel each other, so it is too large, about threefold.

    Args:
        alpha: that of the sample.
        tail: how many eigenvalues of windows that do not overlap there are in its tail.
        of_pieces: alpha of each of its windows, or of quarters of one.
        room: how many windows, or quarters, there would be room for without overlap.

    Returns:
        The variance; NaN where the sample has no alpha.
    """
    number = len(of_pieces)
    if number > 1 and room >= _FEW:
        mean = sum(of_pieces) / number
        spread = sum((piece - mean) ** 2 for piece in of_pieces) / (number - 1) / room
        if math.isfinite(spread):
            return spread
    return (alpha - 1) ** 2 / tail


def independent_windows(windows: Windows, entries: int) -> float:
    """Return how many windows of a sample there would be room for without overlap in so many entries."""
    view = windows.view
    number = view.shape[:-2].numel() // windows.samples
    return number * min(1.0, entries / view.numel())


def _quarters(windows: Windows) -> Windows:
    """Cut the first window of each sample in four: `(S, 2, 2, h // 2, w // 2)`."""
    view = windows.view
    height, width = view.shape[-2:]
    quarters = view[: windows.samples]
    while quarters.ndim > 3:
        quarters = quarters[:, 0]
    for dim, length in ((1, height // 2), (2, width // 2)):
        quarters = quarters.unfold(dim, length, length).narrow(dim, 0, 2)
    return Windows(quarters, windows.samples)
