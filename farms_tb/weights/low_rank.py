"""Low-rank updates of a weight: the arithmetic of LoRA and DoRA, the same for a model and for files.

::

    W' = W + s B A                                        LoRA (Hu et al., 2021, arXiv 2106.09685)
    W' = m (W + s B A) / ||W + s B A||                    DoRA (Liu et al., 2024, arXiv 2402.09353)

with r rows of A, r columns of B and the scaling s = alpha / r; in DoRA there is a magnitude m and a norm for each
output. Several updates are applied one after the other, as PEFT does. A weight of more than two dimensions is
flattened to (first, all others).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from farms_tb.weights.norms import frobenius_norm


@dataclass(frozen=True)
class LowRankUpdate:
    """What one adapter adds to a weight `(rows, columns)`: `scaling * left @ right`.

    Attributes:
        left: `(rows, r)`.
        right: `(r, columns)`.
        scaling: factor s on the product.
        magnitude: `(outputs,)`, DoRA's norm of each output of the result; None for LoRA.
        outputs: which dimension of the weight the outputs are, 0 or 1.
    """

    left: Tensor
    right: Tensor
    scaling: float
    magnitude: Tensor | None = None
    outputs: int = 0

    @classmethod
    def of_adapter(
        cls, left: Tensor, right: Tensor, scaling: float, magnitude: Tensor | None, *, transposed: bool
    ) -> LowRankUpdate:
        """Return what an adapter of PEFT adds to a weight that is flattened to two dimensions.

        Args:
            left: B `(out, r)`, and of a convolution `(out, r, 1, ...)`.
            right: A `(r, in)`, and of a convolution `(r, in, *kernel)`.
            scaling: factor on their product.
            magnitude: DoRA's, with one entry for each output; None for LoRA.
            transposed: whether the weight is stored as (in, out).
        """
        left, right = left.flatten(1), right.flatten(1)
        magnitude = None if magnitude is None else magnitude.flatten()
        if transposed:
            return cls(right.mT, left.mT, scaling, magnitude, outputs=1)
        return cls(left, right, scaling, magnitude)

    def applied_to(self, weight: Tensor, base: Tensor) -> Tensor:
        """Return the weight after this update; nothing is changed in place.

        Args:
            weight: `(rows, columns)`, with the updates before this one.
            base: the same without any update, whose norms DoRA divides by.
        """
        changed = self._added_to(weight)
        if self.magnitude is None:
            return changed
        of_base = changed if weight is base else self._added_to(base)
        norms = torch.linalg.vector_norm(of_base, dim=1 - self.outputs)
        return changed.mul_((self.magnitude / norms).unsqueeze(1 - self.outputs))

    def cast(self, weight: Tensor) -> LowRankUpdate:
        """Return the same in the type and on the device of a weight."""
        magnitude = None if self.magnitude is None else self.magnitude.to(weight)
        return replace(self, left=self.left.to(weight), right=self.right.to(weight), magnitude=magnitude)

    def _added_to(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.left, self.right, alpha=self.scaling)


def fits(weight: Sequence[int], left: Sequence[int], right: Sequence[int], *, transposed: bool) -> bool:
    """Return whether the product of B and A has as many rows and columns as a weight.

    Args:
        weight: shape of the weight, as it is stored; of a convolution with its kernel.
        left: shape of B.
        right: shape of A.
        transposed: whether the weight is stored as (in, out).
    """
    product = [*left[:1], math.prod(right[1:])]
    rank = math.prod(left[1:])
    if transposed:
        product.reverse()
    return rank > 0 and list(right[:1]) == [rank] and product == [*weight[:1], math.prod(weight[1:])]


def merged(weight: Tensor, updates: Sequence[LowRankUpdate]) -> tuple[Tensor, Tensor]:
    """Apply updates to a weight.

    Args:
        weight: W, of two or more dimensions, any floating dtype; it stays as it is.
        updates: at least one.

    Returns:
        W' in the shape of W, in the highest of the types of weight and updates and at least in single precision;
        and how much it differs from W, ||W' - W||_F / ||W||_F, a tensor without dimensions.
    """
    flat, cast = _in_one_type(weight, updates)
    changed = reduce(lambda before, update: update.applied_to(before, flat), cast, flat)
    distance = frobenius_norm(changed - flat) if _has_magnitude(cast) else _norm_of_sum(cast)
    return changed.view(weight.shape), distance / frobenius_norm(flat)


def change_of_merged(weight: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor | None:
    """Return how much a weight was changed by updates that it holds already.

    With D = W' - W, ||W||^2 = ||W'||^2 - 2 <W', D> + ||D||^2, for which D itself is not computed.

    Args:
        weight: W', of two or more dimensions.
        updates: those that are in it, at least one.

    Returns:
        ||W' - W||_F / ||W||_F, a tensor without dimensions; None with DoRA, of which W is not known.
    """
    flat, cast = _in_one_type(weight, updates)
    if _has_magnitude(cast):
        return None
    inner = torch.stack([update.scaling * (update.left.mT @ flat * update.right).sum() for update in cast]).sum()
    distance = _norm_of_sum(cast)
    square: Tensor = frobenius_norm(flat).square() - 2 * inner + distance.square()
    return distance / square.clamp(min=0).sqrt()


def _in_one_type(weight: Tensor, updates: Sequence[LowRankUpdate]) -> tuple[Tensor, list[LowRankUpdate]]:
    """Return the weight, flattened, and the updates in a type that holds them all, at least single precision."""
    types = [weight.dtype, torch.float32, *(update.left.dtype for update in updates)]
    flat = weight.flatten(1).to(reduce(torch.promote_types, types))
    return flat, [update.cast(flat) for update in updates]


def _has_magnitude(updates: Sequence[LowRankUpdate]) -> bool:
    return any(update.magnitude is not None for update in updates)


def _norm_of_sum(updates: Sequence[LowRankUpdate]) -> Tensor:
    """Return ||sum of s B A||_F without the sum: its square is the trace of (B^T B) (A A^T), r x r each."""
    left = torch.cat([update.scaling * update.left for update in updates], dim=1)
    right = torch.cat([update.right for update in updates])
    square = ((left.mT @ left) * (right @ right.mT)).sum()
    return square.clamp(min=0).sqrt()
