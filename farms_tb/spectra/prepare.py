"""The first step of a measurement: each stack of matrices is looked at once, and its windows are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.spectra.samples import Prepared
from farms_tb.spectra.stored_precision import stored_roundoff
from farms_tb.spectra.windows import windows_of
from farms_tb.spectra.workers import map_on_threads
from farms_tb.weights.layers import NO_VALUES
from farms_tb.weights.matrices import MatrixStack

NO_WINDOW = "no window of this aspect ratio fits"


def prepare_stacks(
    stacks: Sequence[MatrixStack], options: SpectrumOptions, threads: int
) -> list[Prepared | LayerRecord]:
    """Cut the windows of each stack; or return its record where there is nothing to solve."""
    solvable_stacks = [solvable(stack) for stack in stacks]
    with_values = [stack.matrices for stack in solvable_stacks if not stack.matrices.is_meta]
    largest = iter(_largest_entries(with_values, threads))
    found: list[Prepared | LayerRecord] = []
    for stack, original in zip(solvable_stacks, stacks, strict=True):
        if stack.matrices.is_meta:
            found.append(_planned(stack, options))
        else:
            found.append(_prepared(stack, next(largest), original.matrices.dtype, options))
    return found


def _largest_entries(weights: Sequence[Tensor], threads: int) -> list[float]:
    """Return the largest absolute value of each weight, NaN where it holds NaN; each GPU is waited for once."""
    if all(weight.is_cpu for weight in weights):
        return [float(largest) for largest in map_on_threads(_largest_entry, weights, threads)]
    found = [_largest_entry(weight).double() for weight in weights]
    values = {}
    for device in {one.device for one in found}:
        values[device] = iter(torch.stack([one for one in found if one.device == device]).cpu().tolist())
    return [next(values[one.device]) for one in found]


def _largest_entry(matrices: Tensor) -> Tensor:
    if matrices.is_complex():
        matrices = torch.view_as_real(matrices.resolve_conj())
    # Without a copy of the weight, unlike `abs`.
    return torch.maximum(matrices.amax(), -matrices.amin())


def _planned(stack: MatrixStack, options: SpectrumOptions) -> LayerRecord:
    """Return the record of a weight without values: the number of its eigenvalues, or what its shape rules out."""
    windows = windows_of(stack, options)
    if windows is None:
        return LayerRecord(status=NO_WINDOW)
    number = windows.number * windows.size
    sample = number // windows.samples
    few = f"too few eigenvalues: {sample} in a sample, min_eigenvalues is {options.min_eigenvalues}"
    return LayerRecord(num_eigenvalues=number, status=NO_VALUES if sample >= options.min_eigenvalues else few)


def _prepared(
    stack: MatrixStack, largest: float, stored_as: torch.dtype, options: SpectrumOptions
) -> Prepared | LayerRecord:
    if not math.isfinite(largest):
        return LayerRecord(status="weights contain NaN or infinity")
    if largest == 0:
        return LayerRecord(status="all weights are zero")
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        stack = replace(stack, matrices=stack.matrices * 2.0**-exponent)
    windows = windows_of(stack, options)
    if windows is None:
        return LayerRecord(status=NO_WINDOW)
    # Overlapping windows hold entries of the weight several times.
    overlap = min(1.0, stack.matrices.numel() / windows.view.numel())
    return Prepared(
        windows=windows,
        independent=windows.number / windows.samples * overlap,
        largest=largest,
        scale=stack.eigenvalue_scale,
        exponent=exponent,
        roundoff=stored_roundoff(stored_as),
    )


def _safe_exponent(dtype: torch.dtype, largest: float) -> int:
    """Return the power of two to divide weights by, so that squares neither overflow nor vanish in float64."""
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) < 400 else max(-1000, min(exponent, 1000))


def solvable(stack: MatrixStack) -> MatrixStack:
    """Return the stack where, and in a type in which, its eigenvalues can be solved for.

    Eigenvalues need float64, which Apple's GPUs lack and others are not tested for: the CPU stands in for all but
    CUDA devices. Eight-bit floats, which have no arithmetic, become float32.
    """
    # Rules may forget to detach; without need, nothing is made anew.
    matrices = stack.matrices.detach() if stack.matrices.requires_grad else stack.matrices
    if matrices.device.type not in ("cpu", "cuda", "meta"):
        matrices = matrices.cpu()
    if matrices.element_size() == 1:
        matrices = matrices.float()
    return stack if matrices is stack.matrices else replace(stack, matrices=matrices)
