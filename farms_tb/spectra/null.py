"""The null of a layer: what alpha it would have if nothing had been learnt.

The alpha of a small stack of matrices is a noisy number with a bias of its own. Both depend on how many matrices
there are and how large, not on the aspect ratio alone. So a layer is compared with random layers of just its
shape: layers with their entries shuffled, which keeps their distribution and destroys every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.measurement import measure_stacks
from farms_tb.spectra.rows import alpha_of_row
from farms_tb.weights.matrices import MatrixStack

MIN_DRAWS, MAX_DRAWS = 8, 32

# Entries * columns of all draws together: beyond it a layer gets fewer draws. `null_of` makes up for the
# uncertainty that this leaves.
_WORK = 2 * 10**8


def draws_for(stack: MatrixStack) -> int:
    """Return how many shuffles tell the null of stacks of this shape."""
    return max(MIN_DRAWS, min(MAX_DRAWS, _WORK // (stack.matrices.numel() * stack.matrices.shape[-1])))


def shuffled_alphas(stack: MatrixStack, options: SpectrumOptions, draws: int, seed: int = 0) -> Tensor:
    """Measure a stack of matrices with its entries shuffled.

    Args:
        stack: the layer's matrices.
        options: how alpha is measured.
        draws: how many times, at most `MAX_DRAWS`.
        seed: seed of the shuffles, which touch no other random state.

    Returns:
        `(MAX_DRAWS,)` float64, the alphas that there are, and zeros.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    entries = stack.matrices.detach().flatten()
    if entries.element_size() == 1:
        entries = entries.float()  # torch before 2.7 cannot reorder eight-bit floats
    alphas = torch.zeros(MAX_DRAWS, dtype=torch.float64, device="cpu")
    # As many at a time as there is memory for.
    together = max(1, options.memory_mb * 2**20 // (len(entries) * entries.element_size()))
    for begin in range(0, draws, together):
        shuffled = []
        for _ in range(begin, min(begin + together, draws)):
            order = torch.randperm(len(entries), generator=generator, device="cpu").to(entries.device)
            shuffled.append(replace(stack, matrices=entries[order].view(stack.matrices.shape)))
        for draw, row in enumerate(measure_stacks(shuffled, options), start=begin):
            alphas[draw] = alpha_of_row(row).nan_to_num(0)
    return alphas


def null_of(alphas: Sequence[float]) -> tuple[float, float] | None:
    """Return mean m and standard deviation s of the alphas of shuffled layers; None of too few.

    s is widened so that z = (alpha - m) / s has variance 1 for a random layer although m and s are estimates: its
    square by (1 + 1/n) (n - 1) / (n - 3) for n draws, the variance of Student's t.
    """
    number = len(alphas)
    if number <= MIN_DRAWS // 2:
        return None
    mean, variance = fmean(alphas), pvariance(alphas) * number / (number - 3) * (1 + 1 / number)
    return (mean, math.sqrt(variance)) if variance > 0 else None
