"""How far a layer's alpha would move if its weights were drawn again: the standard error.

Windows that do not overlap are as good as independent, so the spread of their own alphas tells. Measured on random
weights, the standard error is within a quarter of the true deviation for convolutions, up to twice it for
overlapping windows; for the two search fits, whose tail may jump elsewhere, it is up to half too small.
"""

from __future__ import annotations

from torch import Tensor

from farms_tb.options import SpectralOptions
from farms_tb.power_law import PowerLawFit, fit_power_law, ordered_sum
from farms_tb.windows import Windows

# With fewer windows than this their spread tells little, and quarters of them stand in.
_FEW = 4


def parts_of_windows(windows: Windows, entries: int, options: SpectralOptions) -> Windows | None:
    """Return the quarters of windows whose spread is needed; None where that of the windows tells.

    Args:
        windows: the windows of the layer.
        entries: number of entries of the weight.
        options: how alpha is measured.
    """
    size = min(windows.view.shape[-2:])
    few = independent_windows(windows, entries) < _FEW
    return _quarters(windows) if few and size // 2 >= options.min_eigenvalues else None


def alpha_variance(
    eigenvalues: Tensor,
    of_parts: Tensor | None,
    fits: PowerLawFit,
    smallest: Tensor,
    independent: Tensor,
    options: SpectralOptions,
) -> Tensor:
    """Return the squared standard error of the alpha of each of S samples.

    The variance of alpha over a sample's windows, each fitted on its own, divided by how many of them there would
    be room for without overlap. Where these are fewer than four, the variance over the quarters of one window.
    Where even quarters are too small, that of Hill's (alpha - 1) / sqrt(n) for n eigenvalues in the tail, which
    takes them for independent: eigenvalues of one matrix repel each other, so it is too large, about threefold.

    Args:
        eigenvalues: `(S, n, min(h, w))` float64, those of each window, ascending.
        of_parts: `(S, 4, min(h, w) // 2)` float64, those of `parts_of_windows`; None where these are none.
        fits: the fits of the samples.
        smallest: `(S,)` float64, the smallest eigenvalue that counts in each sample; 0 where all do.
        independent: `(S,)` float64, `independent_windows` of the layer.
        options: how the windows are fitted.

    Returns:
        `(S,)` float64; NaN where a sample has no alpha.
    """
    samples, number, size = eigenvalues.shape
    # The tail of overlapping windows holds each eigenvalue several times over.
    tail = (number * size - fits.tail_start) * independent / number
    variance = (fits.alpha - 1).square() / tail
    if of_parts is not None:
        eigenvalues, independent = of_parts, 4 * independent
    if eigenvalues.shape[1] == 1:
        return variance
    left_out = (eigenvalues < smallest[:, None, None]).sum(-1).flatten()
    each = eigenvalues.flatten(0, 1)
    alphas = fit_power_law(each, options.fit, options.xmin_pos, left_out, distance=False).alpha
    alphas = alphas.reshape(samples, -1)
    # Not torch's own variance, the last bit of which depends on how many samples there are beside one.
    deviations = alphas - ordered_sum(alphas)[:, None] / alphas.shape[-1]
    spread = ordered_sum(deviations.square()) / (alphas.shape[-1] - 1) / independent
    return spread.where(spread.isfinite() & (independent >= _FEW), variance)


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
