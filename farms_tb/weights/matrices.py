"""From a layer to its stacks of matrices: one function a layer type, registered on the type's class.

A new layer type goes here: a function that hands its weight to a layout of `farms_tb.weights.stacks`, registered
on its class, or under the class's full name in `_RULES_BY_NAME` where its package may not be installed.

Users add their own types in the same way, from outside::

    @farms_tb.layer_matrices.register
    def _(module: MyLayer) -> list[MatrixStack]:
        return [MatrixStack(module.kernel.flatten(2).permute(2, 0, 1))]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from farms_tb.weights import stacks
from farms_tb.weights.names import scale_names
from farms_tb.weights.stacks import CONV_NORM, MatrixStack, NoSpectrumError, Sampling
from farms_tb.weights.values import dense, scaled

__all__ = ["CONV_NORM", "MatrixStack", "NoSpectrumError", "Sampling", "dense", "has_rule", "layer_matrices"]

Rule = Callable[[Any], list[MatrixStack]]


@singledispatch
def layer_matrices(module: nn.Module) -> list[MatrixStack]:
    """Return the weights of one module as stacks of matrices; an empty list for a type without a rule.

    Args:
        module: a layer. Its children are not visited.

    Returns:
        One `MatrixStack` `(K, R, C)` for each weight; the layouts are listed in `farms_tb.weights.stacks`.

    Raises:
        NoSpectrumError: the module holds no matrix; the message says why.

    Example:
        >>> stack = layer_matrices(nn.Conv2d(4, 8, 3))[0]
        >>> stack.matrices.shape
        torch.Size([9, 8, 4])
    """
    rule = _rule_by_name(module)
    return [] if rule is None else rule(module)


def has_rule(module: nn.Module, *, embeddings: bool = False) -> bool:
    """Tell whether `layer_matrices` knows the type of `module`.

    Args:
        module: a layer.
        embeddings: whether lookup tables count as layers; a rule that a user registers always counts.
    """
    rule = layer_matrices.dispatch(type(module))
    if rule is _embedding:
        return embeddings
    return rule is not layer_matrices.dispatch(object) or _rule_by_name(module) is not None


@layer_matrices.register(nn.Linear)
def _linear(module: nn.Linear) -> list[MatrixStack]:
    return stacks.linear(_weight(module))


@layer_matrices.register(nn.Embedding)
@layer_matrices.register(nn.EmbeddingBag)
def _embedding(module: Any) -> list[MatrixStack]:
    return stacks.linear(_weight(module))


@layer_matrices.register(nn.Conv1d)
@layer_matrices.register(nn.Conv2d)
@layer_matrices.register(nn.Conv3d)
@layer_matrices.register(nn.ConvTranspose1d)
@layer_matrices.register(nn.ConvTranspose2d)
@layer_matrices.register(nn.ConvTranspose3d)
def _convolution(module: Any) -> list[MatrixStack]:
    return stacks.convolution(_weight(module), module.groups)


@layer_matrices.register
def _attention(module: nn.MultiheadAttention) -> list[MatrixStack]:
    if module.in_proj_weight is not None:
        return stacks.packed_attention(_weight(module, "in_proj_weight"), "in_proj_weight")
    names = {part: f"{part}_proj_weight" for part in "qkv"}
    return [stack for part, name in names.items() for stack in stacks.linear(_weight(module, name), part, name)]


@layer_matrices.register(nn.LSTM)
@layer_matrices.register(nn.LSTMCell)
def _lstm(module: Any) -> list[MatrixStack]:
    return _gates(module, 4)


@layer_matrices.register(nn.GRU)
@layer_matrices.register(nn.GRUCell)
def _gru(module: Any) -> list[MatrixStack]:
    return _gates(module, 3)


@layer_matrices.register(nn.RNN)
@layer_matrices.register(nn.RNNCell)
def _rnn(module: Any) -> list[MatrixStack]:
    return _gates(module, 1)


def _gates(module: Any, number: int) -> list[MatrixStack]:
    """One matrix a gate. The projection of an LSTM, `weight_hr`, has no gates."""
    # A parametrized weight is an attribute, and no parameter of this name.
    names = getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))
    return [
        stack
        for name in names
        if name.startswith("weight")
        for stack in stacks.gates(_weight(module, name), 1 if "_hr" in name else number, name)
    ]


def _spectral_convolution(module: Any) -> list[MatrixStack]:
    """Neuraloperator's SpectralConv: one complex in x out matrix for each Fourier mode in use."""
    if module.separable:
        raise NoSpectrumError("separable spectral convolution: no in x out matrix")
    weight = module.weight
    tensor = dense(weight.to_tensor() if hasattr(weight, "to_tensor") else weight)
    return stacks.fourier_modes(tensor[_modes_in_use(module)])


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
    return stacks.linear(_weight(module))


def _router(module: Any) -> list[MatrixStack]:
    """Hugging Face's routers of a mixture of experts: a weight (experts, in)."""
    return stacks.linear(_weight(module))


def _stacked_experts(module: Any) -> list[MatrixStack]:
    """Hugging Face's experts in parameters of three dimensions, one matrix an expert."""
    names = [name for name, p in module._parameters.items() if p is not None and p.ndim == 3]
    return [stack for name in names for stack in stacks.experts(_weight(module, name), name)]


# Rules for classes of packages that may not be installed, looked up by their full name.
_RULES_BY_NAME: dict[str, Rule] = {
    "neuralop.layers.spectral_convolution.SpectralConv": _spectral_convolution,
    "transformers.pytorch_utils.Conv1D": _transformers_conv1d,
}

# Families of classes that share no base: a pattern of their full names, and the dimensions of the parameters that
# the rule takes. Of a module that holds its weights otherwise, in children say, these are the layers.
_RULES_BY_PATTERN: tuple[tuple[re.Pattern[str], int, Rule], ...] = (
    (re.compile(r"transformers\.models\.\S*Experts"), 3, _stacked_experts),
    (re.compile(r"transformers\.models\.\S*(Router|Gate)"), 2, _router),
)


def _rule_by_name(module: nn.Module) -> Rule | None:
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    for name in names:
        if name in _RULES_BY_NAME:
            return _RULES_BY_NAME[name]
    for pattern, ndim, rule in _RULES_BY_PATTERN:
        if any(map(pattern.fullmatch, names)) and _holds(module, ndim):
            return rule
    return None


def _holds(module: nn.Module, ndim: int) -> bool:
    own = module._parameters
    found = own.values() if ndim == 3 else [own.get("weight")]
    return any(parameter is not None and parameter.ndim == ndim for parameter in found)


def _weight(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight of a module as a plain tensor, multiplied with the scales of its blocks where it has such.

    Raises:
        NoSpectrumError: the module has no such weight, or one without plain values.
    """
    weight = dense(getattr(module, name, None))
    if weight.element_size() > 1:
        return weight
    scales = (getattr(module, scale, None) for scale in scale_names(name))
    scale = next((scale for scale in scales if isinstance(scale, Tensor) and scale.numel() > 1), None)
    return weight if scale is None else scaled(weight, dense(scale))
