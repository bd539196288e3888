"""The null of a layer: what alpha it would have if nothing had been learnt.

The alpha of a small stack of matrices is a noisy number with a bias of its own. Both depend on how many matrices
there are and how large, not on the aspect ratio alone. So a layer is compared with random layers of just its
shape: itself, its entries shuffled, which keeps their distribution and destroys every correlation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from farms_tb.matrices import MatrixStack
from farms_tb.measurement import alpha_of_row, measure_stack
from farms_tb.options import SpectralOptions

MIN_DRAWS, MAX_DRAWS = 8, 32

# Entries * columns of all draws together: beyond it a layer gets fewer draws. `null_alpha` makes up for the
# uncertainty that this leaves.
_WORK = 2 * 10**8


def null_alpha(stack: MatrixStack, options: SpectralOptions) -> Tensor:
    """Measure a stack of matrices with its entries shuffled, several times.

    Args:
        stack: the layer's matrices.
        options: how alpha is measured.

    Returns:
        `(2,)` float64: mean m and standard deviation s of alpha over the draws, zeros where the shuffled stack
        has no alpha. s is widened so that z = (alpha - m) / s has variance 1 for a random layer, although m and s
        are estimates: its square by (1 + 1/n) (n - 1) / (n - 3) for n draws, the variance of Student's t. The same
        numbers on every run and process: the shuffles are seeded, and no other random state is touched.
    """
    shape, size = stack.matrices.shape, stack.matrices.numel()
    draws = max(MIN_DRAWS, min(MAX_DRAWS, _WORK // (size * shape[-1])))
    generator = torch.Generator().manual_seed(0)
    entries = stack.matrices.detach().flatten()
    alphas = []
    for _ in range(draws):
        order = torch.randperm(size, generator=generator).to(entries.device)
        row = measure_stack(replace(stack, matrices=entries[order].view(shape)), options)
        alphas.append(alpha_of_row(row))
    found = torch.stack(alphas)
    found = found[found.isfinite()]
    number = len(found)
    if number < MIN_DRAWS // 2 + 1:
        return found.new_zeros(2)
    widened = math.sqrt((1 + 1 / number) * (number - 1) / (number - 3))
    return torch.stack([found.mean(), found.std() * widened])
