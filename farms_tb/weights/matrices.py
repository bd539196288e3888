"""From a layer to its stacks of matrices: one function a layer type, the *rules* of this module.

To add a layer type, write a function at the end of the rules below. It takes the module, hands its weight to a
layout of `farms_tb.weights.stacks`, and is registered on the class, or on the class's full name where its package
may not be installed::

    @layer_matrices.register(nn.Bilinear)
    def _bilinear(module: nn.Bilinear) -> list[MatrixStack]:
        return stacks.experts(weight_of(module))

A test in `tests/weights/test_matrices.py` compares it with `tests/reference/stacks.py`. What a file shows of the
new type, names and shapes, goes to `farms_tb.weights.stored_layers`. Users add their own types in the same way,
from outside::

    @farms_tb.layer_matrices.register
    def _(module: MyLayer) -> list[MatrixStack]:
        return [MatrixStack(module.kernel.flatten(2).permute(2, 0, 1))]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

from torch import nn

from farms_tb.weights import stacks
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError
from farms_tb.weights.values import dense, weight_of

Rule = Callable[[Any], list[MatrixStack]]
"""Takes a module and returns its stacks. Raises NoSpectrumError where the module holds no matrix."""


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
    """Return whether `layer_matrices` knows the type of `module`.

    Args:
        module: a layer.
        embeddings: whether lookup tables count as layers; a rule that a user registers always counts.
    """
    rule = layer_matrices.dispatch(type(module))
    if rule is _embedding:
        return embeddings
    if rule is not layer_matrices.dispatch(object):
        return True
    return _rule_by_name(module) is not None


@dataclass(frozen=True)
class _NamedRule:
    """A rule for classes of a package that may not be installed.

    Attributes:
        pattern: matches the full name of the class, or of one that it inherits from.
        dimensions: what a parameter of the module must have for the rule to apply, 3 any of them and 2 the one
            called `weight`; 0 where the name is enough. Of a module that holds its weights in children, these
            are the layers.
        rule: the rule.
    """

    pattern: re.Pattern[str]
    dimensions: int
    rule: Rule


_NAMED_RULES: list[_NamedRule] = []


def _register_name(pattern: str, dimensions: int = 0) -> Callable[[Rule], Rule]:
    """Register a rule on full names of classes, as `layer_matrices.register` does on a class."""

    def register(rule: Rule) -> Rule:
        _NAMED_RULES.append(_NamedRule(re.compile(pattern), dimensions, rule))
        return rule

    return register


def _rule_by_name(module: nn.Module) -> Rule | None:
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    for named in _NAMED_RULES:
        if any(map(named.pattern.fullmatch, names)) and _holds(module, named.dimensions):
            return named.rule
    return None


def _holds(module: nn.Module, dimensions: int) -> bool:
    """Return whether a module has the parameter that a rule asks for, see `_NamedRule.dimensions`."""
    if dimensions == 0:
        return True
    parameters = module._parameters
    own = parameters.values() if dimensions == 3 else [parameters.get("weight")]
    return any(parameter is not None and parameter.ndim == dimensions for parameter in own)


# ---- The rules, one a layer type. A new layer type goes at the end. ----


@layer_matrices.register(nn.Linear)
@_register_name(r"transformers\.pytorch_utils\.Conv1D")
@_register_name(r"transformers\.models\.\S*(Router|Gate)", dimensions=2)
def _linear(module: Any) -> list[MatrixStack]:
    """Return the weight (out, in) as one matrix.

    Hugging Face's GPT-2 stores it as (in, out), and its routers of a mixture of experts as (experts, in).
    """
    return stacks.linear(weight_of(module))


@layer_matrices.register(nn.Embedding)
@layer_matrices.register(nn.EmbeddingBag)
def _embedding(module: Any) -> list[MatrixStack]:
    """Return a lookup table (entries, width) as one matrix, where a user asks for embeddings."""
    return stacks.linear(weight_of(module))


@layer_matrices.register(nn.Conv1d)
@layer_matrices.register(nn.Conv2d)
@layer_matrices.register(nn.Conv3d)
@layer_matrices.register(nn.ConvTranspose1d)
@layer_matrices.register(nn.ConvTranspose2d)
@layer_matrices.register(nn.ConvTranspose3d)
def _convolution(module: Any) -> list[MatrixStack]:
    """Return one matrix for each group and kernel position."""
    return stacks.convolution(weight_of(module), module.groups)


@layer_matrices.register
def _attention(module: nn.MultiheadAttention) -> list[MatrixStack]:
    """Return q, k and v, packed into one weight or apart. The output projection is a linear layer of its own."""
    if module.in_proj_weight is not None:
        return stacks.packed_attention(weight_of(module, "in_proj_weight"))
    found = []
    for part in "qkv":
        name = f"{part}_proj_weight"
        found += stacks.linear(weight_of(module, name), part, name)
    return found


def _gates(module: Any, number: int) -> list[MatrixStack]:
    """Return one matrix for each of the `number` gates. The projection of an LSTM, `weight_hr`, has no gates."""
    # A parametrized weight is an attribute, and no parameter of this name.
    names = getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))
    found = []
    for name in names:
        if name.startswith("weight"):
            found += stacks.gates(weight_of(module, name), 1 if "_hr" in name else number, name)
    return found


for _number, *_classes in ((4, nn.LSTM, nn.LSTMCell), (3, nn.GRU, nn.GRUCell), (1, nn.RNN, nn.RNNCell)):
    for _class in _classes:
        layer_matrices.register(_class, partial(_gates, number=_number))


@_register_name(r"neuralop\.layers\.spectral_convolution\.SpectralConv")
def _spectral_convolution(module: Any) -> list[MatrixStack]:
    """Neuraloperator's SpectralConv: one complex in x out matrix for each Fourier mode in use."""
    if module.separable:
        raise NoSpectrumError("separable spectral convolution: no in x out matrix")
    weight = module.weight
    if hasattr(weight, "to_tensor"):
        weight = weight.to_tensor()  # A factorised weight.
    return stacks.fourier_modes(dense(weight)[_modes_in_use(module)])


def _modes_in_use(module: Any) -> tuple[slice, ...]:
    """Return slices of the weight that the forward pass reads where fewer modes are used than were allocated.

    Modes are cut from both ends, the larger half of an odd number at the end. The last dimension of a real
    transform holds only non-negative frequencies and is cut at its end alone.

    Returns:
        A slice for each dimension of the weight `(in, out, *modes)`.
    """
    slices = [slice(None), slice(None)]
    for allocated, used in zip(module.max_n_modes, module.n_modes, strict=True):
        first = (allocated - used) // 2
        slices.append(slice(first, first + used))
    if not module.complex_data:
        slices[-1] = slice(0, module.n_modes[-1])
    return tuple(slices)


@_register_name(r"transformers\.models\.\S*Experts", dimensions=3)
def _stacked_experts(module: Any) -> list[MatrixStack]:
    """Hugging Face's experts in parameters of three dimensions, one matrix an expert."""
    found = []
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim == 3:
            found += stacks.experts(weight_of(module, name), name)
    return found
