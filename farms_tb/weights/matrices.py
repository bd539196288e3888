"""From a layer to the stack of matrices whose spectrum is measured.

One layout everywhere: a stack is a tensor `(K, R, C)` of K matrices with R rows and C columns, R >= C.

========================  =====================================  ============================================
layer                     weight                                 stack
========================  =====================================  ============================================
Linear                    (out, in)                              K = 1
Conv1d/2d/3d              (out, in / g, *kernel)                 K = g * prod(kernel), one out/g x in/g matrix
                                                                 for each group and kernel position
ConvTranspose1d/2d/3d     (in, out / g, *kernel)                 as a convolution
MultiheadAttention        in_proj (3E, E)                        three stacks of K = 1: q, k and v
neuralop SpectralConv     (in, out, *modes), complex             K = retained modes
========================  =====================================  ============================================

Other layer types join by registration on their class::

    @farms_tb.layer_matrices.register
    def _(module: MyLayer) -> list[MatrixStack]:
        return [MatrixStack(module.kernel.flatten(2).permute(2, 0, 1))]

Sources: FARMS (Hu et al., arXiv 2506.06280), TempBalance (Zhou et al., arXiv 2312.00359).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

Sampling = Literal["blocks", "grid"]

CONV_NORM = 0.5
"""Factor on a convolution's eigenvalues. It changes no alpha; with it spectral norms match the papers'."""


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
        parameter: name, inside the module, of the one parameter that this stack is made of where the module
            holds several weights; empty where the stack stands for the whole module.
        eigenvalue_scale: factor on the eigenvalues.
    """

    matrices: Tensor
    sampling: Sampling = "blocks"
    part: str = ""
    parameter: str = ""
    eigenvalue_scale: float = 1.0

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


def dense(weight: Tensor) -> Tensor:
    """Detach `weight` and gather it where it is sharded (DTensor): a collective call on every rank."""
    weight = weight.detach()
    gather: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)
    if gather is not None and weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return weight if gather is None else gather()


@singledispatch
def layer_matrices(module: nn.Module) -> list[MatrixStack]:
    """Return the weights of one module as stacks of matrices; an empty list for a type without a rule.

    Args:
        module: a layer. Its children are not visited.

    Returns:
        One `MatrixStack` for each weight.

    Raises:
        NoSpectrumError: the module holds no matrix; the message says why.

    Example:
        >>> stack = layer_matrices(nn.Conv2d(4, 8, 3))[0]
        >>> stack.matrices.shape
        torch.Size([9, 8, 4])
    """
    for cls in type(module).__mro__:
        rule = _RULES_BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule(module)
    return []


def has_rule(module: nn.Module) -> bool:
    """Tell whether `layer_matrices` knows the type of `module`."""
    if layer_matrices.dispatch(type(module)) is not layer_matrices.dispatch(object):
        return True
    return any(f"{cls.__module__}.{cls.__qualname__}" in _RULES_BY_NAME for cls in type(module).__mro__)


@layer_matrices.register(nn.Linear)
def _linear(module: nn.Linear) -> list[MatrixStack]:
    return [MatrixStack(dense(module.weight)[None], sampling="grid")]


@layer_matrices.register(nn.Conv1d)
@layer_matrices.register(nn.Conv2d)
@layer_matrices.register(nn.Conv3d)
@layer_matrices.register(nn.ConvTranspose1d)
@layer_matrices.register(nn.ConvTranspose2d)
@layer_matrices.register(nn.ConvTranspose3d)
def _convolution(module: Any) -> list[MatrixStack]:
    # A transposed convolution keeps its input channels first; the groups split the first dimension in both.
    weight = dense(module.weight).flatten(2)
    if module.groups == 1:
        matrices = weight.permute(2, 0, 1)
    else:
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:])
        matrices = grouped.permute(0, 3, 1, 2).flatten(0, 1)
    return [MatrixStack(matrices, eigenvalue_scale=CONV_NORM)]


@layer_matrices.register
def _attention(module: nn.MultiheadAttention) -> list[MatrixStack]:
    if module.in_proj_weight is not None:
        packed = dense(module.in_proj_weight).chunk(3)
        return [
            MatrixStack(weight[None], sampling="grid", part=part, parameter="in_proj_weight")
            for part, weight in zip("qkv", packed, strict=True)
        ]
    return [
        MatrixStack(
            dense(getattr(module, f"{part}_proj_weight"))[None],
            sampling="grid",
            part=part,
            parameter=f"{part}_proj_weight",
        )
        for part in "qkv"
    ]


def _spectral_convolution(module: Any) -> list[MatrixStack]:
    """Neuraloperator's SpectralConv: one complex in x out matrix for each Fourier mode in use."""
    if module.separable:
        raise NoSpectrumError("separable spectral convolution: no in x out matrix")
    weight = module.weight
    tensor = dense(weight.to_tensor() if hasattr(weight, "to_tensor") else weight)
    return [MatrixStack(tensor[_modes_in_use(module)].flatten(2).permute(2, 0, 1))]


def _modes_in_use(module: Any) -> tuple[slice, ...]:
    """Slices of the weight that the forward pass reads where fewer modes are used than were allocated.

    Modes are cut from both ends, but for the last dimension of a real transform, which holds only
    non-negative frequencies and is cut at its end.
    """
    slices = [slice(None), slice(None)]
    unused = [allocated - used for allocated, used in zip(module.max_n_modes, module.n_modes, strict=True)]
    for dim, cut in enumerate(unused):
        half_spectrum = dim == len(unused) - 1 and not module.complex_data
        if cut == 0:
            slices.append(slice(None))
        elif half_spectrum:
            slices.append(slice(None, -cut))
        else:
            # Of an odd number, the forward pass cuts the larger half at the end.
            slices.append(slice(cut // 2, -(cut - cut // 2)))
    return tuple(slices)


def _transformers_conv1d(module: Any) -> list[MatrixStack]:
    """The linear layer of Hugging Face's GPT-2, which stores its weight as (in, out)."""
    return [MatrixStack(dense(module.weight)[None], sampling="grid")]


# Rules for classes of packages that may not be installed, looked up by their full name.
_RULES_BY_NAME: dict[str, Callable[[Any], list[MatrixStack]]] = {
    "neuralop.layers.spectral_convolution.SpectralConv": _spectral_convolution,
    "transformers.pytorch_utils.Conv1D": _transformers_conv1d,
}
