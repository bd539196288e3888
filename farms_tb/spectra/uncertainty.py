"""How sure an alpha is: its standard error, and the permutation null that it is compared with.

*Standard error*: how far alpha would move if the weights were drawn again. Windows that do not overlap are as good
as independent, so the spread of their own alphas tells. Measured on random weights, the standard error is within a
quarter of the true deviation for convolutions and up to twice it for overlapping windows; for the two search fits,
whose tail may jump elsewhere, it is up to half too small.

*Permutation null*: what alpha the layer would have if nothing had been learnt. The alpha of a small stack of
matrices is a noisy number with a bias of its own; both depend on how many matrices there are and how large, not on
the aspect ratio alone. So a layer is compared with random layers of just its shape: its own entries, shuffled,
which keeps their distribution and destroys every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import numpy as np
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.precision import Array
from farms_tb.spectra.windows import Windows
from farms_tb.weights.matrices import MatrixStack

FEW_WINDOWS = 4
"""With fewer independent windows than this their spread tells little, and that of their quarters is taken."""

MIN_DRAWS, MAX_DRAWS = 8, 32
"""Shuffles of a layer that make up its permutation null."""

DRAWS_WORK = 2 * 10**8
"""Entries * columns of all shuffles together, beyond which a layer gets fewer of them. `null_of` allows for the
uncertainty that this leaves."""


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


def draws_for(stack: MatrixStack) -> int:
    """Return the number of shuffles for the permutation null of stacks of this shape."""
    return max(MIN_DRAWS, min(MAX_DRAWS, DRAWS_WORK // (stack.matrices.numel() * stack.matrices.shape[-1])))


def shuffled(stack: MatrixStack, generator: torch.Generator) -> MatrixStack:
    """Return the stack with all its entries in random order.

    Args:
        stack: the layer's matrices `(K, R, C)`.
        generator: of the CPU; no other random state is touched.
    """
    entries = stack.matrices.detach().flatten()
    if entries.element_size() == 1:
        entries = entries.float()  # torch before 2.7 cannot index eight-bit floats
    order = torch.randperm(len(entries), generator=generator, device="cpu").to(entries.device)
    return replace(stack, matrices=entries[order].view(stack.matrices.shape))


def null_of(alphas: Sequence[float]) -> tuple[float, float] | None:
    """Return mean m and standard deviation s of the alphas of shuffled layers; None where there are too few.

    s is widened so that z = (alpha - m) / s has variance 1 for a random layer although m and s are estimates: its
    square by (1 + 1/n) (n - 1) / (n - 3) for n draws, the variance of Student's t.
    """
    number = len(alphas)
    if number <= MIN_DRAWS // 2:
        return None
    mean, variance = fmean(alphas), pvariance(alphas) * number / (number - 3) * (1 + 1 / number)
    return (mean, math.sqrt(variance)) if variance > 0 else None
