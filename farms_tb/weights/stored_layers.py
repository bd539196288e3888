"""Which layer a stored tensor is: a file holds names and shapes, and nothing of the modules they come from.

=============================================  ==============================================================
name and weight                                taken for
=============================================  ==============================================================
`in_proj_weight`, or `q_proj_weight` and so on  q, k and v of attention
`weight_ih_l0`, `weight_hh`                    the gates of an LSTM, GRU or RNN
any name, 3 and more dimensions, complex       a spectral convolution (in, out, *modes), all modes in use; a
                                               separable one where its bias has as many dimensions as it has
any real name below experts, 3 dimensions      stacked experts; not below `experts.0`, nor where a bias (out,)
                                               tells of a convolution
`weight`, 2 dimensions                         a linear layer; an embedding, which is not measured unless asked
                                               for, where its name says so and it has no bias
`weight` and `bias` of one shape, 2 and more   a norm over several dimensions: not measured
`weight`, 3 to 5 dimensions, real              a convolution of one group, transposed or not; of 3 dimensions, one
                                               whose name or short kernel says so
=============================================  ==============================================================

What is anything else is listed with the reason, as in `farms_tb.analyze`. So are quantised weights: integers, and
8-bit floats with scales for blocks of unclear size (see `farms_tb.weights.values.block_size`). Scales are not
listed. 8-bit floats with one or no scale are measured as they are: alpha does not depend on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from farms_tb.report import LayerRecord
from farms_tb.weights import stacks
from farms_tb.weights.names import (
    ALONGSIDE_QUANTISED,
    EMBEDDING,
    QUANTISED,
    are_codes,
    is_embedding_name,
    layer_name,
    no_rule,
    quantised,
    scale_names,
)
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError, stack_problem
from farms_tb.weights.stored import StoredTensor
from farms_tb.weights.values import dense, matrix_dims, scaled

Layout = Callable[[Tensor], list[MatrixStack]]
"""Makes matrices of a weight: a function of `farms_tb.weights.stacks`, its other arguments given."""

LONGEST_KERNEL = 31
"""A weight (out, in, last) whose name does not tell what it is counts as a convolution up to this last size."""

_ATTENTION_PARTS = {f"{part}_proj_weight": part for part in "qkv"}
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")

# Whole words in a path: `mlp.experts.w1`, `block_sparse_moe.input_linear` and `ffn_up_exps`, but not `memoed`.
_EXPERTS = re.compile(r"(?<![a-zA-Z])(experts?|exps|moe)(?![a-z])|(Experts?|MoE|Moe)(?![a-z])")
# One of several experts that are modules of their own: `experts.0.conv`.
_ONE_EXPERT = re.compile(r"(?<![a-z])experts?\.\d+\.", re.IGNORECASE)


def may_be_layer(stored: StoredTensor) -> bool:
    """Return whether a report lists the tensor, measured or with a reason.

    It does not list vectors, scales of quantised weights, biases of experts, and tables of integers.
    """
    if _belongs_to_another(stored):
        return False
    if stored.problem:
        return True
    if not (stored.has_numbers or _holds_codes(stored)):
        return False
    return matrix_dims(stored.shape) > 1 or (stored.name == "weight" and _has_one_row(stored))


def _belongs_to_another(stored: StoredTensor) -> bool:
    """Return whether a tensor is a scale or bias of a weight next to it: `gate_up_proj_bias` of `gate_up_proj`."""
    name, siblings = stored.name, stored.siblings
    if name in ALONGSIDE_QUANTISED:
        return any(weight in siblings for weight in QUANTISED)
    weight = re.sub(r"_(bias|scale|scale_inv|scales)$", "", name)
    if weight == name:
        return False
    return weight in siblings or f"{weight}_blocks" in siblings


def _holds_codes(stored: StoredTensor) -> bool:
    """Return whether integers are a quantised weight, and not a table of indices or a mask."""
    return not stored.has_numbers and are_codes(stored.name, stored.siblings)


def _has_one_row(stored: StoredTensor) -> bool:
    """Return whether it is a linear layer or convolution of one channel, no vector or gate (1, channels, 1, 1)."""
    if len(stored.shape) < 2:
        return False
    if len(stored.shape) == 2 or stored.shape[0] != 1:
        return True
    return stored.shape_of("bias") == (1,)


def stored_layers(
    tensors: Iterable[StoredTensor], *, embeddings: bool = False
) -> Iterator[tuple[str, MatrixStack | LayerRecord]]:
    """Read one tensor after the other.

    Args:
        tensors: what `farms_tb.weights.files.stored_tensors` returned.
        embeddings: measure lookup tables too, as matrices (entries, width).

    Yields:
        Name of each layer, with its weight or a record that says why it has no spectrum.

    Raises:
        ValueError, OSError: the file was cut, changed or deleted while it was read.
    """
    measured: dict[object, str] = {}
    names: set[str] = set()
    for stored in tensors:
        for name, found in _layers(stored, measured, embeddings):
            if name in names:
                name = stored.key  # Only a dict made by hand has both `a` and `a.weight`.
            names.add(name)
            yield name, found


def _layers(
    stored: StoredTensor, measured: dict[object, str], embeddings: bool
) -> Iterator[tuple[str, MatrixStack | LayerRecord]]:
    """Yield the layers of one tensor, which is added to `measured`, names of layers by identities of tensors."""
    name = _name(stored)
    if stored.identity in measured:
        yield name, LayerRecord(status=f"tied to {measured[stored.identity]!r}")
        return
    try:
        found = _layout(stored, embeddings)(values_of(stored))
    except NoSpectrumError as error:
        yield name, LayerRecord(status=str(error))
        return
    for stack in found:
        if not stack_problem(stack):
            measured[stored.identity] = name
        if stack.part:
            yield f"{stored.path}.{stack.part}".strip("."), stack
        else:
            yield name, stack


def _name(stored: StoredTensor) -> str:
    """Return the name of the layer: the module's for a weight that fills it, else with the parameter's added."""
    fills_module = stored.name in (*QUANTISED, "in_proj_weight", *_ATTENTION_PARTS)
    if fills_module and stored.path:
        return stored.path
    return layer_name(stored.path, stored.name)


def _layout(stored: StoredTensor, embeddings: bool) -> Layout:
    """Return what makes matrices of the tensor, by its name and shape.

    A new layer type whose name tells what it is gets a function like `_attention`, added to the tuple of rules
    below: it returns a layout, None for a tensor of another type, or raises for one that holds no matrix. The
    tensor's values are not read.

    Raises:
        NoSpectrumError: it is none, or cannot be told to be one.
    """
    _refuse_unreadable(stored)
    for rule in (_attention, _recurrent, _fourier, _stacked_experts):
        layout = rule(stored)
        if layout is not None:
            return layout
    if stored.name != "weight" or _is_norm(stored):
        raise NoSpectrumError(no_rule(stored.name))
    if len(stored.shape) == 2:
        if _is_embedding(stored) and not embeddings:
            raise NoSpectrumError(EMBEDDING)
        return stacks.linear
    if len(stored.shape) == 3 and not _is_conv1d(stored):
        raise NoSpectrumError(no_rule(stored.name))
    return stacks.convolution


def _refuse_unreadable(stored: StoredTensor) -> None:
    """Raise NoSpectrumError for a tensor whose entries are not those of a weight."""
    if stored.problem:
        raise NoSpectrumError(stored.problem)
    if _holds_codes(stored):
        raise NoSpectrumError(quantised(stored.dtype))
    if ".weight." in f".{stored.path}.":
        raise NoSpectrumError(
            "part of a parametrized or factorised weight: build the model and use analyze(model)"
        )


def values_of(stored: StoredTensor) -> Tensor:
    """Read the tensor, and multiply it with the scales of its blocks where it has such.

    Returns:
        A plain tensor of the stored shape; float32 where scales were multiplied.

    Raises:
        NoSpectrumError: it has no plain values, or scales for blocks of unclear size.
        ValueError, OSError: the file was cut, changed or deleted.
    """
    weight = dense(stored.read())
    if weight.element_size() > 1:
        return weight
    for name in scale_names(stored.name):
        if math.prod(stored.shape_of(name)) > 1:
            return scaled(weight, dense(stored.siblings[name].read()))
    return weight


def _attention(stored: StoredTensor) -> Layout | None:
    """Return whether it is q, k, v of attention: packed as one weight `(3E, E)`, or each `(E, in)` on its own."""
    if len(stored.shape) != 2:
        return None
    if stored.name == "in_proj_weight" and stored.shape[0] % 3 == 0:
        return stacks.packed_attention
    if stored.name in _ATTENTION_PARTS:
        part = _ATTENTION_PARTS[stored.name]
        return lambda weight: stacks.linear(weight, part)
    return None


def _recurrent(stored: StoredTensor) -> Layout | None:
    """Return which of LSTM, GRU and RNN it is, by the number of gates."""
    match = _RECURRENT.fullmatch(stored.name)
    if match is None or len(stored.shape) != 2:
        return None
    number = _number_of_gates(stored, match[1])
    if number not in stacks.GATES or stored.shape[0] % number:
        return None
    return lambda weight: stacks.gates(weight, number, stored.name)


def _number_of_gates(stored: StoredTensor, kind: str) -> int:
    """Return the number of gates in a weight, 0 where it is not known; `kind` is the part `"ih"` of its name."""
    if kind == "hr":
        return 1
    if stored.name.replace(kind, "hr", 1) in stored.siblings:
        return 4  # Only an LSTM has a projection.
    hidden = stored.shape_of(stored.name.replace(kind, "hh", 1))
    if len(hidden) != 2 or hidden[1] == 0:
        return 0
    return hidden[0] // hidden[1]  # The gates of `weight_hh` are square.


def _fourier(stored: StoredTensor) -> Layout | None:
    """Return whether it is a spectral convolution: its bias (out, 1, ..., 1) has a dimension more than modes."""
    if not stored.dtype.is_complex or len(stored.shape) < 2:
        return None
    bias = stored.shape_of("bias")
    if len(bias) > 1 and len(bias) == len(stored.shape):
        raise NoSpectrumError("separable spectral convolution: no in x out matrix")
    if len(stored.shape) == 2:
        return None
    return stacks.fourier_modes


def _stacked_experts(stored: StoredTensor) -> Layout | None:
    """Return whether it is a stack of experts, by a word of the path or their number in `config.json`."""
    if len(stored.shape) != 3 or "conv" in _module_name(stored) or _has_another_use(stored):
        return None
    if stored.shape[0] == stored.facts.experts or _EXPERTS.search(stored.key):
        return lambda weight: stacks.experts(weight, stored.name)
    return None


def _has_another_use(stored: StoredTensor) -> bool:
    """Return whether a tensor below experts is none of their weights: a convolution, bias or embedding."""
    if stored.name == "weight":
        # Experts have a bias each, (experts, out) together; that of a convolution is (out,).
        in_one_expert = _ONE_EXPERT.search(f"{stored.path}.") is not None
        return in_one_expert or stored.shape_of("bias") == stored.shape[:1]
    return "bias" in stored.name or is_embedding_name(stored.name)


def _is_embedding(stored: StoredTensor) -> bool:
    """Return whether it is a lookup table: a head of the same name has a bias."""
    return is_embedding_name(stored.path) and "bias" not in stored.siblings


def _is_norm(stored: StoredTensor) -> bool:
    """Return whether it is a norm over several dimensions: by one shape of weight and bias, or by name."""
    if len(stored.shape) > 1 and stored.shape_of("bias") == stored.shape:
        return True
    called_norm = re.fullmatch(r"(\w*norm|ln)(_?\d+)?", _module_name(stored))
    return called_norm is not None and len(stored.shape) > 2


def _is_conv1d(stored: StoredTensor) -> bool:
    """Return whether it is a convolution (out, in, kernel), no bilinear form (out, in, in) or stack."""
    name = _module_name(stored)
    return "conv" in name or (stored.shape[2] <= LONGEST_KERNEL and "bilinear" not in name)


def _module_name(stored: StoredTensor) -> str:
    """Return the last part of the module's path, in lower case."""
    return stored.path.rpartition(".")[2].lower()
