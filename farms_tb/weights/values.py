"""Whether a weight has values that can be measured, and how to get at them as a plain tensor.

Weights come in many wrappings: shards of a `DTensor`, quantised tensor subclasses (torchao), codes of 4
and 8 bits (bitsandbytes), 8-bit floats with scales, sparse, nested and mkldnn layouts, the meta device. Each is
either unwrapped here or refused with a reason, so that the layouts of `farms_tb.weights.stacks` see ordinary
strided tensors alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from farms_tb.weights.names import quantised, scale_names
from farms_tb.weights.stacks import NoSpectrumError

NO_VALUES = "on the meta device: no values"
"""Problem of a layer whose weights have a shape and nothing in it."""

NESTED = "a nested tensor: its matrices have no one shape"
"""Problem of a tensor that holds several of different shapes."""

MAKE_DENSE = "make it dense first, weight.to_dense()"


def unreadable(parameters: Iterable[Tensor]) -> str:
    """Say why weights cannot be measured; empty where they can.

    Nothing is computed: a tensor subclass is asked for its layout and type alone.

    Args:
        parameters: the weights of one layer; the first with a problem counts.
    """
    return next(filter(None, map(_problem, parameters)), "")


def _problem(parameter: Tensor) -> str:
    """Return why one weight cannot be measured, the most general reason first; empty where it can."""
    if is_lazy(parameter):
        return "not initialised yet: run one batch through the model first"
    if parameter.is_nested:
        return NESTED
    if parameter.layout != torch.strided:
        return f"a weight of layout {parameter.layout}: {MAKE_DENSE}"
    if parameter.is_meta:
        return NO_VALUES
    if _is_int4(parameter) or _is_int8(parameter):
        return ""
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return quantised(parameter.dtype)
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
    if weight is None:
        raise NoSpectrumError("its weight is None, no tensor")
    if not isinstance(weight, Tensor):
        raise NoSpectrumError(f"its weight is {type(weight).__name__}, no tensor")
    problem = unreadable([weight])
    if problem and problem != NO_VALUES:
        raise NoSpectrumError(problem)
    if _is_int4(weight):
        return _from_int4(weight)
    if is_plain(weight):
        return weight.detach()
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    gather: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)
    if gather is not None:
        return gather().detach()
    return _dequantised(weight)


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Return a context in which weights are read without a change of the module, and without gradients.

    Spectral norm, a parametrization, moves its power iteration at each reading in training mode. And inside of
    `torch.nn.utils.parametrize.cached()` the parametrized weight that is read first is kept for the forward pass,
    which would have one without a history of gradients.

    Args:
        module: a layer; the one inside of a layer with adapters may be parametrized as well.
    """
    training = [
        part
        for owner in _descendants(module)
        if parametrize.is_parametrized(owner)
        for part in owner.parametrizations.modules()  # type: ignore[operator,union-attr]
        if part.training
    ]
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        parametrize._cache_enabled = cached
        for part in training:
            part.training = True


def _descendants(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all below it. Not by `modules()`, where PEFT's attention makes its weights anew."""
    yield module
    for child in module.children():
        yield from _descendants(child)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight of a module as a plain tensor, multiplied with the scales of its blocks where it has such.

    Args:
        module: the layer.
        name: the weight's attribute, which need not be a parameter: a parametrized weight is none.

    Returns:
        The tensor, detached, of the weight's shape.

    Raises:
        NoSpectrumError: the module has no such weight, or one without plain values.
    """
    stored = _current(module, name)
    if _is_int8(stored):
        return _from_int8(module, stored)
    weight = dense(stored)
    if weight.element_size() > 1:
        return weight
    for scale_name in scale_names(name):
        scale = getattr(module, scale_name, None)
        if isinstance(scale, Tensor) and scale.numel() > 1:
            return scaled(weight, dense(scale))
    return weight


def _current(module: nn.Module, name: str) -> Any:
    """Return a weight as the next forward pass would use it; None where the module has none of this name.

    The hooks of `torch.nn.utils` for weight norm, spectral norm and pruning set the attribute in each forward
    pass. After a step of the optimizer, or when weights were loaded, it still has the values of the pass before.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(module, do_power_iteration=False)
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            masked: Tensor = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            return masked
    return getattr(module, name, None)


def _is_int4(weight: Any) -> bool:
    """Return whether bitsandbytes has quantised a weight to 4 bits: its shape is that of the codes."""
    return type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None


def _from_int4(weight: Any) -> Tensor:
    """Return the values of a weight that bitsandbytes has quantised to 4 bits, in the type it computes with."""
    functional = importlib.import_module("bitsandbytes.functional")
    values: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return values


def _is_int8(weight: Any) -> bool:
    """Return whether bitsandbytes has quantised a weight to 8 bits."""
    return type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8


def _from_int8(module: nn.Module, weight: Any) -> Tensor:
    """Return the values of a weight that bitsandbytes has quantised to 8 bits: codes * largest of the row / 127.

    Raises:
        NoSpectrumError: there are no scales.
    """
    largest = getattr(weight, "SCB", None)
    if largest is None:  # The layer takes them over when it is first called.
        largest = getattr(getattr(module, "state", None), "SCB", None)
    if not isinstance(largest, Tensor):
        raise NoSpectrumError(quantised(weight.dtype))
    codes: Tensor = weight.data
    return codes.float() * (largest.detach().to(codes.device).float() / 127)[:, None]


def is_plain(weight: Tensor) -> bool:
    """Return whether every operation works as on a `torch.Tensor`: its class overrides none."""
    return type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__


def _dequantised(weight: Tensor) -> Tensor:
    """Return the values of a quantised tensor subclass.

    Raises:
        NoSpectrumError: it does not know how to dequantise, or gives something else than plain values.
    """
    problem = f"weights of type {type(weight).__name__}: dequantise the model first"
    try:
        values: Tensor = weight.detach().dequantize()
    except Exception as error:
        raise NoSpectrumError(problem) from error
    if not (isinstance(values, Tensor) and is_plain(values) and values.shape == weight.shape):
        raise NoSpectrumError(problem)
    return values


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply 8-bit floats with the scales of their blocks: `W[i, j] * scale[i // rows, j // columns]`.

    The shape of `scale` tells the size of the blocks, see `block_size`. Usual are 128 x 128 (DeepSeek), one row,
    and 1 x 32 (MX formats).

    Args:
        weight: `(R, C)`, or `(experts, R, C)`, in an 8-bit floating dtype.
        scale: `(ceil(R / rows), ceil(C / columns))`, of as many dimensions as `weight`, any floating dtype.

    Returns:
        The weight in float32, of its own shape.

    Raises:
        NoSpectrumError: the shape of `scale` does not tell the size of the blocks.
    """
    sizes = [block_size(size, blocks) for size, blocks in zip(weight.shape, scale.shape, strict=False)]
    if scale.ndim != weight.ndim or 0 in sizes:
        raise NoSpectrumError(quantised(weight.dtype, block_scales=True))
    factors = scale.float()
    for dim, entries in enumerate(sizes):
        factors = factors.repeat_interleave(entries, dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * factors


def block_size(size: int, blocks: int) -> int:
    """Return how many entries of a dimension share a scale.

    A dimension of `size` entries in blocks of `b` has `ceil(size / b)` of them, the last one possibly narrower.
    Several `b` give the same number, and at most one of them is a power of two, as in every known format.

    Args:
        size: entries of the weight along the dimension.
        blocks: entries of the scale along it.

    Returns:
        The power of two, `size` where one block covers the dimension, or 0 where no power of two fits.
    """
    if blocks == 1:
        return size
    smallest = -(-size // max(blocks, 1))
    power_of_two = 1 << (smallest - 1).bit_length()
    fits = -(-size // power_of_two) == blocks
    return power_of_two if fits else 0
