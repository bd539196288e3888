"""The weights that a plan names: where they are in a model, and how each one is a matrix `(out, in)`.

===========================  =====================================  ============================================
layer                        weight                                 matrix
===========================  =====================================  ============================================
Linear                       (out, in)                              the weight
Conv1D of GPT-2              (in, out)                              transposed
Conv1d/2d/3d                 (out, in / g, *kernel)                 (out, kernel * in / g), the input channels of
                                                                    one kernel position next to each other
q, k, v of attention, gates  their rows of one parameter            these rows
any other                    (..., columns)                         rows of the last dimension, for magnitudes
===========================  =====================================  ============================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from farms_tb.printable import printable
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.weights.layers import Layer, find_layers, read_stacks, unwrap
from farms_tb.weights.names import EMBEDDING, Renaming, clean_name, renaming
from farms_tb.weights.stored import span

Layout = Literal["linear", "transposed", "convolution", "rows"]

NOT_QUANTISED = "prune the model in 16 or 32 bits, then quantise it"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def to_matrix(weight: Tensor, layout: Layout) -> Tensor:
    """Return a weight as a matrix `(out, in)`, a view where that is possible.

    Args:
        weight: of the shape that the layout expects, see the table above.
        layout: how it is stored.
    """
    if layout == "transposed":
        return weight.mT
    if layout == "convolution":
        return weight.flatten(2).mT.flatten(1)
    return weight.reshape(-1, weight.shape[-1])


def from_matrix(matrix: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Undo `to_matrix`.

    Args:
        matrix: `(out, in)`, any dtype.
        shape: the weight's.
        layout: how the weight is stored.
    """
    if layout == "transposed":
        return matrix.mT
    if layout == "convolution":
        return matrix.view(shape[0], -1, shape[1]).mT.reshape(shape)
    return matrix.reshape(shape)


@dataclass(frozen=True)
class PrunableWeight:
    """A weight of a model that a plan names.

    Attributes:
        name: its name in the plan, `"model.layers.0.mlp.up_proj"`.
        module: the module.
        parameter: name of the parameter in the module.
        layout: how the weight becomes a matrix.
        groups: groups of a convolution, each with inputs of its own; else 1.
        part: which of `parts` equal runs of rows of the parameter this is.
        parts: how many layers share the parameter: three for packed attention.
        block: path of its block; of the module itself where it is in none.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: Layout
    groups: int = 1
    part: int = 0
    parts: int = 1
    block: str = ""

    @property
    def tensor(self) -> Tensor:
        """The weight as it is stored, detached: a view of the parameter."""
        stored: Tensor = getattr(self.module, self.parameter)
        return stored.detach().chunk(self.parts)[self.part]

    @property
    def has_inputs(self) -> bool:
        """Whether the inputs that the matrix is multiplied with can be seen from outside of its module."""
        return self.layout != "rows" or isinstance(self.module, nn.MultiheadAttention)


def planned_weights(model: nn.Module, plan: SparsityPlan) -> list[PrunableWeight]:
    """Find every weight of a plan in a model, and check that it can be pruned.

    Args:
        model: any module.
        plan: its names may lack the prefix that the model gives all of them (`"transformer."`), or have one more,
            as names in a file do.

    Returns:
        The weights in the order of the plan.

    Raises:
        TypeError: `model` is no module.
        ValueError: the plan was made for another model; or a weight is tied, quantised, parametrized, on the meta
            device or holds NaN or inf. The message names it and says what to do.
    """
    layers = _layers(model)
    plan = plan_for_names(plan, layers)
    weights = _weights(model, layers, {name: one.block for name, one in plan.layers.items() if name in layers})
    plan.check_fits({name: layer.shape for name, layer in layers.items() if layer.shape})
    for weight in weights:
        check_intact(weight.name, weight.tensor)
    return weights


def named_weights(model: nn.Module, blocks: Mapping[str, str]) -> list[PrunableWeight]:
    """Find weights of a model by their names.

    Args:
        model: any module.
        blocks: path of the block of each layer, by the layer's name.

    Returns:
        The weights in the order of `blocks`.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no such layer, or its weight cannot be read.
    """
    layers = _layers(model)
    missing = [name for name in blocks if name not in layers]
    if missing:
        raise ValueError(
            f"the model has no layer {missing[0]!r} ({len(missing)} unknown names): analyze(model) lists them"
        )
    return _weights(model, layers, blocks)


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of a model by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {layer.name: layer for layer in find_layers(model)}


def plan_for_names(plan: SparsityPlan, names: Mapping[str, object]) -> SparsityPlan:
    """Return the plan with a prefix added to, or removed from, all its names, where they match only so.

    Files of weights and models differ in such a prefix: `h.0.attn.c_attn` is `transformer.h.0.attn.c_attn` in a
    `GPT2LMHeadModel`.

    Args:
        plan: the plan.
        names: names of the model's layers.

    Returns:
        The plan; the same object where its names match as they are, or no prefix makes them match.
    """
    rename = renaming(plan.layers, names)
    if rename is None or rename == Renaming():
        return plan
    layers = {}
    for name, layer in plan.layers.items():
        layers[rename(name)] = replace(layer, block=rename(layer.block) if layer.block else "")
    return replace(plan, layers=layers)


def _weights(model: nn.Module, layers: Mapping[str, Layer], blocks: Mapping[str, str]) -> list[PrunableWeight]:
    """Return the layers that `blocks` names as weights to prune; what is refused is said at `planned_weights`."""
    owners = _owners(unwrap(model))
    weights = []
    for name, block in blocks.items():
        if layers[name].problem:
            raise ValueError(refusal(name, layers[name].problem))
        weight = _weight(layers[name], block)
        _check_plain(weight)
        _check_untied(weight, owners)
        weights.append(weight)
    return weights


def _weight(layer: Layer, block: str) -> PrunableWeight:
    """Return a layer of the model as a weight to prune."""
    parameters = [stack.parameter or "weight" for stack in read_stacks(layer.module)]
    parameter = parameters[layer.index]
    return PrunableWeight(
        name=layer.name,
        module=layer.module,
        parameter=parameter,
        layout=_layout(layer.module),
        groups=layer.module.groups if isinstance(layer.module, _CONVOLUTIONS) else 1,
        part=parameters[: layer.index].count(parameter),
        parts=parameters.count(parameter),
        block=block or layer.module_name,
    )


def _layout(module: nn.Module) -> Layout:
    """Return how the weight of a module is stored."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    if "transformers.pytorch_utils.Conv1D" in names:
        return "transposed"
    return "rows"


def refusal(name: str, problem: str) -> str:
    """Return the message that refuses a layer.

    Args:
        name: of the layer.
        problem: why it has no matrices to measure, and so none to prune.
    """
    # A plan of it comes from a measurement that had embeddings=True, which the problem asks for.
    reason = "embeddings are not pruned" if problem == EMBEDDING else problem
    return f"{printable(name)} cannot be pruned: {reason}. Leave it out of the plan"


def check_intact(name: str, weight: Tensor) -> None:
    """Refuse a weight that holds NaN or inf.

    Args:
        name: of the layer, for the message.
        weight: of any shape and dtype.

    Raises:
        ValueError: it does.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{printable(name)} holds NaN or inf and cannot be pruned: load intact weights")


def _check_plain(weight: PrunableWeight) -> None:
    """Refuse a weight that is no ordinary parameter."""
    stored = weight.module._parameters.get(weight.parameter)
    if stored is None:
        raise ValueError(
            f"{printable(weight.name)} cannot be pruned: its {weight.parameter} is computed from other tensors "
            "(parametrized, or masked by torch.nn.utils.prune). Make it plain first: "
            "parametrize.remove_parametrizations(module, 'weight') or prune.remove(module, 'weight')"
        )
    if type(stored.data) is not Tensor or stored.element_size() == 1:
        kind = type(stored.data).__name__ if type(stored.data) is not Tensor else str(stored.dtype)
        raise ValueError(f"{printable(weight.name)} is quantised ({kind}) and cannot be pruned: {NOT_QUANTISED}")
    if stored.is_inference():
        raise ValueError(
            f"{printable(weight.name)} was made in torch.inference_mode and cannot be changed: load the model "
            "outside of it"
        )


def _check_untied(weight: PrunableWeight, owners: Mapping[int, list[str]]) -> None:
    """Refuse a weight that another module uses, too: the same parameter, or its memory."""
    shared = owners[id(weight.module._parameters[weight.parameter])]
    if len(shared) > 1:
        others = ", ".join(name for name in shared if not name.startswith(f"{weight.name}."))
        raise ValueError(
            f"{printable(weight.name)} is tied to {printable(others)}: pruning one prunes the other. Leave it out "
            "of the plan, or untie it: give the module a copy, module.weight = "
            "nn.Parameter(module.weight.detach().clone())"
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter by its identity: more than one where modules share it, or its memory."""
    owners: dict[int, list[str]] = {}
    parameters: list[nn.Parameter] = []
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(clean_name(f"{path}.{own}".strip(".")))
                parameters.append(parameter)
    for overlapping in _overlapping(parameters):
        names = list(dict.fromkeys(name for parameter in overlapping for name in owners[id(parameter)]))
        owners.update({id(parameter): names for parameter in overlapping})
    return owners


def _overlapping(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the groups of parameters whose memory overlaps, such as views of one tensor."""
    groups: list[list[nn.Parameter]] = []
    last, end = "", 0
    for device, first, after, parameter in sorted(
        map(_bytes, filter(_has_memory, parameters)), key=itemgetter(0, 1)
    ):
        if device == last and first < end:
            groups[-1].append(parameter)
        else:
            groups.append([parameter])
            end = after
        last, end = device, max(end, after)
    return [group for group in groups if len(group) > 1]


def _has_memory(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has an address: it is a plain tensor, initialised, and not on the meta device."""
    is_plain = not is_lazy(parameter) and type(parameter.data) is Tensor
    return is_plain and not parameter.is_meta and parameter.layout == torch.strided and parameter.numel() > 0


def _bytes(parameter: nn.Parameter) -> tuple[str, int, int, nn.Parameter]:
    """Return the device of a parameter, the address of its first byte, the one after its last, and itself."""
    first = parameter.data_ptr()
    after = first + span(parameter.shape, parameter.stride()) * parameter.element_size()
    return str(parameter.device), first, after, parameter
