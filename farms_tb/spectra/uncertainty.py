"""The permutation null that an alpha is compared with: the alpha of the layer, had nothing been learnt.

The alpha of a small stack of matrices is a noisy number with a bias of its own; both depend on how many matrices
there are and how large, not on the aspect ratio alone. So a layer is compared with random layers of just its
shape: its own entries, shuffled, which keeps their distribution and destroys every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import torch

from farms_tb.weights.matrices import MatrixStack

MIN_DRAWS, MAX_DRAWS = 8, 32
"""Shuffles of a layer that make up its permutation null."""

DRAWS_WORK = 2 * 10**8
"""Entries * columns of all shuffles together, beyond which a layer gets fewer of them. `null_of` allows for the
uncertainty that this leaves."""


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
