"""How far a layer's alpha would move if its weights were drawn again: the standard error.

Windows that do not overlap are as good as independent, so the spread of their own alphas tells. Measured on random
weights, the standard error is within a quarter of the true deviation for convolutions, up to twice it for
overlapping windows; for the two search fits, whose tail may jump elsewhere, it is up to half too small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farms_tb.options import SpectralOptions
from farms_tb.power_law import PowerLawFit, fit_power_law
from farms_tb.spectra import window_eigenvalues
from farms_tb.windows import Windows

# With fewer windows than this their spread tells little, and quarters of them stand in.
_FEW = 4


def alpha_error(
    windows: Windows,
    eigenvalues: Tensor,
    fits: PowerLawFit,
    smallest: Tensor,
    entries: int,
    options: SpectralOptions,
) -> Tensor:
    """Return the standard error of a layer's alpha, the mean over the alphas of S samples.

    The spread of alpha over a sample's windows, each fitted on its own, divided by the square root of how many of
    them there would be room for without overlap. Where these are fewer than four, the spread over the quarters of
    one window. Where even quarters are too small, Hill's (alpha - 1) / sqrt(n) of n eigenvalues in the tail, which
    takes them for independent: eigenvalues of one matrix repel each other, so it is too large, about threefold.

    Args:
        windows: the windows of the layer.
        eigenvalues: `(S, n, min(h, w))` float64, those of each window, ascending.
        fits: the fits of the S samples.
        smallest: `(S, 1)` float64, the smallest eigenvalue that counts in each sample.
        entries: number of entries of the weight.
        options: how the windows are fitted.

    Returns:
        A float64 number; NaN where a sample has no alpha.
    """
    samples, number, size = eigenvalues.shape
    height, width = windows.view.shape[-2:]
    independent = number * min(1.0, entries / (samples * number * height * width))
    # The tail of overlapping windows holds each eigenvalue several times over.
    tail = (number * size - fits.tail_start) * independent / number
    variance = (fits.alpha - 1).square() / tail
    if independent < _FEW and size // 2 >= options.min_eigenvalues:
        eigenvalues, independent = window_eigenvalues(_quarters(windows)), 4 * independent
    if eigenvalues.shape[1] > 1 and independent >= _FEW:
        left_out = (eigenvalues < smallest[:, :, None]).sum(-1).flatten()
        alphas = fit_power_law(eigenvalues.flatten(0, 1), options.fit, options.xmin_pos, left_out).alpha
        spread = alphas.reshape(samples, -1).var(-1) / independent
        variance = spread.where(spread.isfinite(), variance)
    return variance.sum().sqrt() / samples


def _quarters(windows: Windows) -> Windows:
    """Cut the first window of each sample in four: `(S, 2, 2, h // 2, w // 2)`."""
    view = windows.view
    lead, (height, width) = view.shape[:-2], view.shape[-2:]
    number = lead.numel() // windows.samples
    first = torch.arange(windows.samples, device=view.device) * number
    quarters = view[torch.unravel_index(first, lead)]
    for dim, length in ((1, height // 2), (2, width // 2)):
        quarters = quarters.unfold(dim, length, length).narrow(dim, 0, 2)
    return Windows(quarters, windows.samples)
