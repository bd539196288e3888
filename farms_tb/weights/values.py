"""Whether a weight has values that can be measured, and how to get at them as a plain tensor.

Weights come in many wrappings: shards of a `DTensor`, quantised tensor subclasses (torchao), 8-bit floats with
scales, sparse, nested and mkldnn layouts, the meta device. Each is either unwrapped here or refused with a reason,
so that the layouts of `farms_tb.weights.stacks` see ordinary strided tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from farms_tb.weights.names import quantised
from farms_tb.weights.stacks import NoSpectrumError

NO_VALUES = "on the meta device: no values"
"""Problem of a layer whose weights have a shape and nothing in it."""

NESTED = "a nested tensor: its matrices have no one shape"
"""Problem of a tensor that holds several of different shapes."""

MAKE_DENSE = "make it dense first, weight.to_dense()"

SCALE_BLOCK = 128
"""Rows and columns that share a scale in block-scaled 8-bit floats, in all models that are known."""


def unreadable(parameters: Iterable[Tensor]) -> str:
    """Say why weights cannot be measured; empty where they can.

    Nothing is computed: a tensor subclass is asked for its layout and type alone.
    """
    for parameter in parameters:
        if is_lazy(parameter):
            return "not initialised yet: run one batch through the model first"
        if parameter.is_nested:
            return NESTED
        if parameter.layout != torch.strided:
            return f"a weight of layout {parameter.layout}: {MAKE_DENSE}"
        if parameter.is_meta:
            return NO_VALUES
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return f"weights of type {parameter.dtype}: not floating point"
    return ""


def matrix_dims(shape: Iterable[int]) -> int:
    """Count the dimensions of more than one entry: a vector in any disguise has at most one."""
    return sum(size > 1 for size in shape)


def dense(weight: Any) -> Tensor:
    """Return `weight` detached, as a plain strided tensor.

    A sharded weight (DTensor) is gathered, which is a collective call on every rank. A quantised tensor subclass
    is dequantised where it knows how to.

    Args:
        weight: a parameter or buffer, any class, any shape.

    Returns:
        A `torch.Tensor` of the same shape.

    Raises:
        NoSpectrumError: it is no tensor, or has no plain values; the message says why.
    """
    if not isinstance(weight, Tensor):
        raise NoSpectrumError(f"its weight is {'None' if weight is None else type(weight).__name__}, no tensor")
    problem = unreadable([weight])
    if problem and problem != NO_VALUES:
        raise NoSpectrumError(problem)
    if _is_plain(weight):
        return weight.detach()
    gather: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return _dequantised(weight) if gather is None else gather().detach()


def _is_plain(weight: Tensor) -> bool:
    """Tell whether every operation works as on a `torch.Tensor`: its class overrides none."""
    return type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__


def _dequantised(weight: Tensor) -> Tensor:
    name = type(weight).__name__
    try:
        values: Tensor = weight.detach().dequantize()
    except Exception as error:
        raise NoSpectrumError(f"weights of type {name}: dequantise the model first") from error
    if not (isinstance(values, Tensor) and _is_plain(values) and values.shape == weight.shape):
        raise NoSpectrumError(f"weights of type {name}: dequantise the model first")
    return values


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply 8-bit floats with the scales of their blocks of 128 x 128.

    Args:
        weight: `(R, C)` in an 8-bit floating dtype.
        scale: `(ceil(R / 128), ceil(C / 128))`.

    Returns:
        `(R, C)` in float32.

    Raises:
        NoSpectrumError: the scales are not those of such blocks.
    """
    rows, columns = (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (0, 0)
    blocks = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
    if tuple(scale.shape) != blocks:
        raise NoSpectrumError(quantised(weight.dtype, block_scales=True))
    wide = scale.float().repeat_interleave(SCALE_BLOCK, 0)[:rows]
    return weight.float() * wide.repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
