"""Layouts: a weight tensor becomes stacks of matrices, the same whether it lies in a model or in a file.

One layout everywhere: a stack is a tensor `(K, R, C)` of K matrices with R rows and C columns, R >= C.

========================  =====================================  ============================================
layer                     weight                                 stack
========================  =====================================  ============================================
Linear                    (out, in)                              K = 1
Conv1d/2d/3d              (out, in / g, *kernel)                 K = g * prod(kernel), one out/g x in/g matrix
                                                                 for each group and kernel position
ConvTranspose1d/2d/3d     (in, out / g, *kernel)                 as a convolution
MultiheadAttention        in_proj (3E, E)                        three stacks of K = 1: q, k and v
LSTM, GRU, RNN            weight_ih, weight_hh (gates * H, in)   one stack of K = 1 a gate
stacked experts           (experts, out, in) or transposed       K = experts, one matrix an expert
neuralop SpectralConv     (in, out, *modes), complex             K = retained modes
========================  =====================================  ============================================

Sources: FARMS (Hu et al., arXiv 2506.06280), TempBalance (Zhou et al., arXiv 2312.00359).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Sampling = Literal["blocks", "grid"]

CONV_NORM = 0.5
"""Factor on a convolution's eigenvalues, with which spectral norms match the papers'. Alpha changes with it only
where the scale of the eigenvalues counts: with `filter_zeros`, and with the fit `"xmin_peak"`."""

GATES: dict[int, tuple[str, ...]] = {1: ("",), 3: ("r", "z", "n"), 4: ("i", "f", "g", "o")}
"""Names of the gates of an RNN, a GRU and an LSTM by their number, in the order of the rows of their weights."""


class NoSpectrumError(ValueError):
    """A layer has no matrix to measure. The message is shown as the layer's status."""


@dataclass(frozen=True)
class MatrixStack:
    """One weight as a stack of matrices.

    Attributes:
        matrices: `(K, R, C)`, real or complex, any floating dtype. Rows and columns may come in either order:
            the stack is transposed where needed so that R >= C.
        sampling: how FARMS places its windows. `"blocks"` (convolutions): non-overlapping row blocks, the same
            block of all K matrices pooled and fitted as one sample; `"grid"` (linear layers): overlapping
            windows on a grid, all pooled into one sample.
        part: a suffix of the layer's name where one module holds several weights (`"q"`).
        parameter: name, inside the module, of the parameter that this stack is made of where the module holds
            several weights; empty where the stack stands for the whole module. Several stacks may be made of one
            parameter, as the gates of an LSTM are.
        eigenvalue_scale: factor on the eigenvalues.
        adapter_change: how much adapters change the weight, ||W' - W||_F / ||W||_F, a tensor without dimensions;
            None where there are none, or where it is not known.

    Raises:
        ValueError: `matrices` has other than three dimensions.
        NoSpectrumError: its entries are integers or booleans.
    """

    matrices: Tensor
    sampling: Sampling = "blocks"
    part: str = ""
    parameter: str = ""
    eigenvalue_scale: float = 1.0
    adapter_change: Tensor | None = None

    def __post_init__(self) -> None:
        if self.matrices.ndim != 3:
            raise ValueError(
                f"a matrix stack has three dimensions (K, R, C), got shape {tuple(self.matrices.shape)}"
            )
        if not (self.matrices.is_floating_point() or self.matrices.is_complex()):
            raise NoSpectrumError(f"weights of type {self.matrices.dtype}: not floating point")
        if self.matrices.shape[1] < self.matrices.shape[2]:
            object.__setattr__(self, "matrices", self.matrices.mT)

    @property
    def kind(self) -> Literal["real", "spectral"]:
        """`"spectral"` for complex weights: their alphas do not compare with those of real ones."""
        return "spectral" if self.matrices.is_complex() else "real"

    @property
    def change(self) -> float | None:
        """`adapter_change` as a number; None where it is none, as for a weight of zeros or without values."""
        if self.adapter_change is None or self.adapter_change.is_meta:
            return None
        change = float(self.adapter_change)
        return change if math.isfinite(change) else None


def stack_problem(stack: MatrixStack) -> str:
    """Say why a stack has no spectrum; empty where it has one.

    Args:
        stack: `(K, R, C)`; its values are not read.
    """
    if stack.matrices.numel() == 0:
        return "empty, a weight without entries: no spectrum"
    return "" if min(stack.matrices.shape[1:]) > 1 else "one row or one column: no spectrum"


def linear(weight: Tensor, part: str = "", parameter: str = "") -> list[MatrixStack]:
    """Return the weight of a linear layer as one matrix, `(1, R, C)`.

    Args:
        weight: `(out, in)` or `(in, out)`, real or complex.
        part: suffix of the layer's name where its module holds several weights.
        parameter: name of the parameter inside the module, likewise.

    Raises:
        NoSpectrumError: the weight has other than two dimensions.
    """
    return [MatrixStack(_checked(weight, 2)[None], sampling="grid", part=part, parameter=parameter)]


def convolution(weight: Tensor, groups: int = 1) -> list[MatrixStack]:
    """Return one matrix for each group and kernel position of a convolution.

    Args:
        weight: `(out, in / groups, *kernel)`, or `(in, out / groups, *kernel)` of a transposed convolution: the
            groups split the first dimension in both.
        groups: groups of channels.

    Returns:
        One stack `(groups * prod(kernel), R, C)`.

    Raises:
        NoSpectrumError: the weight has other than three to five dimensions.
    """
    if weight.ndim not in (3, 4, 5):
        raise NoSpectrumError(f"a weight of shape {tuple(weight.shape)}: expected 3 to 5 dimensions")
    positions = weight.flatten(2)
    if groups == 1:
        matrices = positions.permute(2, 0, 1)
    else:
        grouped = positions.reshape(groups, -1, *positions.shape[1:])
        matrices = grouped.permute(0, 3, 1, 2).flatten(0, 1)
    return [MatrixStack(matrices, eigenvalue_scale=CONV_NORM)]


def packed_attention(weight: Tensor) -> list[MatrixStack]:
    """Return q, k and v of attention, three stacks `(1, E, E)`, of the parameter `in_proj_weight`.

    Args:
        weight: `(3E, E)`, the three one below the other.

    Raises:
        NoSpectrumError: the weight has other than two dimensions.
    """
    return _chunks(weight, ["q", "k", "v"], "in_proj_weight")


def gates(weight: Tensor, number: int, parameter: str) -> list[MatrixStack]:
    """Return one matrix for each gate of a recurrent layer.

    Args:
        weight: `(number * hidden, in)`, the gates one below the other.
        number: 1 (RNN), 3 (GRU) or 4 (LSTM).
        parameter: the parameter's name, `weight_ih_l0`; the stacks are called `weight_ih_l0.i` and so on.

    Returns:
        A stack `(1, R, C)` for each gate.

    Raises:
        NoSpectrumError: the weight has other than two dimensions.
    """
    return _chunks(weight, [f"{parameter}.{gate}".strip(".") for gate in GATES[number]], parameter)


def experts(weight: Tensor, parameter: str = "") -> list[MatrixStack]:
    """Return one matrix for each expert, one stack `(experts, R, C)`.

    Args:
        weight: `(experts, out, in)` or `(experts, in, out)`.
        parameter: name of the parameter inside the module, which the layer is called by unless it is `weight`.

    Raises:
        NoSpectrumError: the weight has other than three dimensions.
    """
    part = "" if parameter == "weight" else parameter
    return [MatrixStack(_checked(weight, 3), part=part, parameter=parameter)]


def fourier_modes(weight: Tensor) -> list[MatrixStack]:
    """Return one complex matrix for each Fourier mode, one stack `(prod(modes), R, C)`.

    Args:
        weight: `(in, out, *modes)`, complex.

    Raises:
        NoSpectrumError: the weight has fewer than three dimensions.
    """
    if weight.ndim < 3:
        raise NoSpectrumError(f"a weight of shape {tuple(weight.shape)}: expected (in, out, *modes)")
    return [MatrixStack(weight.flatten(2).permute(2, 0, 1))]


def _chunks(weight: Tensor, parts: list[str], parameter: str) -> list[MatrixStack]:
    """Return the matrices that a weight holds, one for each part, one below the other."""
    found = []
    for part, matrix in zip(parts, _checked(weight, 2).chunk(len(parts)), strict=True):
        found += linear(matrix, part, parameter)
    return found


def _checked(weight: Tensor, ndim: int) -> Tensor:
    """Return the weight, or raise NoSpectrumError where it has other than `ndim` dimensions."""
    if weight.ndim != ndim:
        raise NoSpectrumError(f"a weight of shape {tuple(weight.shape)}: expected {ndim} dimensions")
    return weight
