"""The first step of a measurement: each stack of matrices is looked at once, and its windows are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.spectra.windows import Windows, windows_of
from farms_tb.spectra.workers import map_on_threads
from farms_tb.weights.stacks import MatrixStack
from farms_tb.weights.values import NO_VALUES


@dataclass(frozen=True)
class PreparedLayer:
    """A layer that has windows of finite numbers, not all of them zero.

    Attributes:
        stack: the layer's matrices `(K, R, C)`, of a type that can be solved.
        windows: their windows.
        independent: how many windows of one sample would fit into the weight without overlap.
        largest: largest absolute value of the weight.
        exponent: the weights were divided by 2^exponent, so that no square leaves the range of float64.
        stored_as: type in which the weight is stored.
    """

    stack: MatrixStack
    windows: Windows
    independent: float
    largest: float
    exponent: int
    stored_as: torch.dtype


def prepare_stacks(
    stacks: Sequence[MatrixStack], options: SpectrumOptions, threads: int
) -> tuple[dict[int, PreparedLayer], dict[int, LayerRecord]]:
    """Cut the windows of each stack `(K, R, C)`; or make its record where there is nothing to solve.

    Returns:
        The layers that have windows to solve, and the records of all others; each by the position of the stack.
    """
    in_solvable_types = [solvable(stack) for stack in stacks]
    largest = _largest_entries([stack.matrices for stack in in_solvable_types], threads)
    layers: dict[int, PreparedLayer] = {}
    records: dict[int, LayerRecord] = {}
    for place, stack in enumerate(in_solvable_types):
        found = _prepared(stack, largest[place], stacks[place].matrices.dtype, options)
        if isinstance(found, PreparedLayer):
            layers[place] = found
        else:
            records[place] = found
    return layers, records


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


def _largest_entries(weights: Sequence[Tensor], threads: int) -> list[float]:
    """Return the largest absolute value of each weight, NaN where it holds NaN or has no values."""
    if not all(weight.is_cpu for weight in weights):
        threads = 1
    largest = map_on_threads(_largest_entry, weights, threads)
    # Read only now: reading waits for the GPU, which can be given the work of all weights before.
    return [math.nan if one.is_meta else float(one) for one in largest]


def _largest_entry(matrices: Tensor) -> Tensor:
    """Return the largest absolute value of an entry, `()` on its device; of complex ones, that of either part."""
    if matrices.is_complex():
        matrices = torch.view_as_real(matrices.resolve_conj())
    # Without a copy of the weight, unlike `abs`.
    if matrices.is_contiguous():
        # Of plain matrices five times as fast as both extremes one by one; of strided ones slower.
        lowest, highest = matrices.aminmax()
        return torch.maximum(highest, -lowest)
    return torch.maximum(matrices.amax(), -matrices.amin())


def _prepared(
    stack: MatrixStack, largest: float, stored_as: torch.dtype, options: SpectrumOptions
) -> PreparedLayer | LayerRecord:
    """Return what is solved of one stack, of a type that can be solved; or its record where nothing is.

    Args:
        stack: `(K, R, C)`.
        largest: largest absolute value of an entry; NaN where some entry is NaN, or where there are no values.
        stored_as: type of the weight before it was made solvable.
        options: how alpha is measured.
    """
    windows = windows_of(stack, options)
    if stack.matrices.is_meta and windows is not None:
        return _planned(windows, options)
    if not stack.matrices.is_meta and not math.isfinite(largest):
        return LayerRecord(status="weights contain NaN or infinity")
    if largest == 0:
        return LayerRecord(status="all weights are zero")
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        windows = windows_of(replace(stack, matrices=stack.matrices * 2.0**-exponent), options)
    if windows is None:
        return LayerRecord(status="no window of this aspect ratio fits")
    # Overlapping windows hold entries of the weight several times.
    overlap = min(1.0, stack.matrices.numel() / windows.view.numel())
    independent = windows.number / windows.samples * overlap
    return PreparedLayer(stack, windows, independent, largest, exponent, stored_as)


def _planned(windows: Windows, options: SpectrumOptions) -> LayerRecord:
    """Return the record of a weight without values: the number of its eigenvalues, or what its shape rules out."""
    number = windows.number * windows.size
    sample = number // windows.samples
    status = NO_VALUES
    if sample < options.min_eigenvalues:
        status = f"too few eigenvalues: {sample} in a sample, min_eigenvalues is {options.min_eigenvalues}"
    return LayerRecord(num_eigenvalues=number, status=status)


def _safe_exponent(dtype: torch.dtype, largest: float) -> int:
    """Return the exponent e of the 2^e to divide weights by, so that squares stay within the range of float64.

    It is 0 for types of a smaller range. The largest absolute value of an entry is finite and above 0.
    """
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) < 400 else max(-1000, min(exponent, 1000))
