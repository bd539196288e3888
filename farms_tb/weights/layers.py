"""The layers of a model: which have a spectrum, which parameters each one owns.

Layers are listed in order of registration (`named_modules`), as in the papers. A layer that cannot be analysed is
listed with the reason: one odd layer never costs the measurement of the others.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from farms_tb.options import Adapters
from farms_tb.printable import printable
from farms_tb.weights.adapters import adapted_stacks, adapter_problem, base_of, is_adapted, unused_copies
from farms_tb.weights.matrices import has_rule, layer_matrices
from farms_tb.weights.names import (
    EMBEDDING,
    PACKED,
    QUANTISED,
    WRAPPED,
    are_codes,
    clean_name,
    is_embedding_name,
    layer_name,
    named_parameters,
    no_rule,
    quantised,
)
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError, Sampling, stack_problem
from farms_tb.weights.values import NO_VALUES, matrix_dims, reading, unreadable


@dataclass(frozen=True)
class Layer:
    """One weight of the model that is a stack of matrices, or was expected to be one.

    Attributes:
        name: path of the module, and the part (`"attn.q"`) where the module holds several weights.
        module_name: path of the module.
        module: the module.
        index: which of the module's stacks this is.
        kind: `"real"`, `"spectral"`, or `""` where there is no stack.
        shape: (K, R, C) of the stack; empty where there is none.
        parameters: names of the parameters that take this layer's learning-rate ratio.
        matrices: names of those that its matrices are computed from: its weight, and not a bias for each expert.
        problem: why the layer has no spectrum; empty where it has one.
        has_rule: whether the module's type is one that holds matrices.
        sampling: that of the stack.
        adapters: what is measured of a layer with adapters.
        is_adapted: whether the module has adapters and is one layer with them.
    """

    name: str
    module_name: str
    module: nn.Module
    index: int = 0
    kind: str = ""
    shape: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    problem: str = ""
    has_rule: bool = True
    sampling: Sampling = "blocks"
    adapters: Adapters = "separate"
    is_adapted: bool = False

    @property
    def planned(self) -> bool:
        """Whether the layer would be measured if it had values."""
        return bool(self.kind) and self.problem == NO_VALUES


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside the wrappers of `torch.compile`, checkpointing, DDP and Lightning Fabric."""
    return list(wrappers(model))[-1]


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and what it wraps, from the outermost wrapper to the user's module."""
    yield model
    names = [*WRAPPED, "_forward_module"]  # the last is Lightning Fabric's
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        names = ["module"]
    for name in names:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            yield from wrappers(inner)
            break


def find_layers(model: nn.Module, *, embeddings: bool = False, adapters: Adapters = "separate") -> list[Layer]:
    """List every layer of `model` that has a weight matrix, in order of registration.

    Args:
        model: any module; `torch.compile` and data-parallel wrappers are looked through.
        embeddings: give lookup tables a stack too, one matrix (entries, width); without it they are listed as not
            analysed.
        adapters: what is measured of a layer with adapters: one layer for `"merged"` and `"base"`; the parts of it
            for `"separate"`.

    Returns:
        The layers, those without a spectrum among them with a `problem`. Of modules whose type has no rule, each
        parameter of at least two dimensions is listed.

    Raises:
        ValueError: a registered rule gave two weights the same name.
    """
    model = unwrap(model)
    known = named_parameters(model)
    # Listed once, and last: PEFT's attention makes its weights anew, as other parameters, whenever modules or
    # parameters are listed.
    modules = [(clean_name(path), module) for path, module in model.named_modules()]
    names = _names_of_parameters(modules, known)
    claimed: dict[int, str] = {}  # The layers that parameters belong to.
    inside: set[int] = set()  # Modules whose parameters belong to a layer above them.
    skipped: set[int] = set()  # Those of them that are part of a layer with adapters, and copies of no use.
    layers: list[Layer] = []
    for path, module in modules:
        if _is_wrapper(module) or id(module) in skipped:
            continue
        skipped |= {id(part) for unused in unused_copies(module, adapters) for part in unused.modules()}
        is_whole = _is_whole(module, adapters)
        if is_whole or has_rule(module, embeddings=embeddings):
            own = {id(child) for child in _own_modules(module, adapters)}
            inside |= own
            if is_whole:
                skipped |= own
            problem = _problem_of_adapters(module, adapters, embeddings)
            layers.extend(_module_layers(path, module, adapters, problem, names, claimed))
        elif id(module) not in inside:
            layers.extend(_layers_without_rule(path, module))
    return _with_unique_names(layers)


def _names_of_parameters(modules: Sequence[tuple[str, nn.Module]], known: Container[str]) -> dict[int, str]:
    """Return the name of each parameter by its identity, as far as the model knows it by that name."""
    return {
        id(parameter): name
        for path, module in modules
        for own, parameter in module._parameters.items()
        if parameter is not None and (name := f"{path}.{own}".strip(".")) in known
    }


def checked_layers(
    model: nn.Module, *, embeddings: bool = False, adapters: Adapters = "separate", plan: bool = False
) -> list[Layer]:
    """Return the layers that `find_layers` finds, with an error where there is nothing to measure.

    Args:
        model: any module.
        embeddings: as in `find_layers`.
        adapters: as in `find_layers`.
        plan: accept a model without values, on the meta device: its layers would be measured.

    Returns:
        The layers, at least one of them without a problem, or planned.

    Raises:
        TypeError: `model` is no module.
        ValueError: none of its layers can be measured; the message lists the reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = find_layers(model, embeddings=embeddings, adapters=adapters)
    is_planned = any(layer.planned for layer in layers)
    if not all(layer.problem for layer in layers) or (plan and is_planned):
        return layers
    raise _nothing_to_measure(model, layers, is_planned)


def _nothing_to_measure(model: nn.Module, layers: Sequence[Layer], is_planned: bool) -> ValueError:
    """Return the error for a model of which no layer can be measured, or could be if it had values."""
    name = type(model).__name__
    if is_planned:
        return ValueError(
            f"{name} is on the meta device: its layers have no values to balance. Give it memory first, "
            "model.to_empty(device=...), and load or initialise its weights"
        )
    reasons = "".join(f"\n  {printable(layer.name)}: {printable(layer.problem)}" for layer in layers[:10])
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        reasons += "\nA scripted or exported model has no types of layers: call analyze(model.state_dict())"
    return ValueError(
        f"{name} has no layer that can be analysed; linear, convolution, attention and spectral-convolution "
        "layers can, others by farms_tb.layer_matrices.register" + reasons
    )


def has_adapters(layer: Layer) -> bool:
    """Return whether a layer is one with its adapters, of whatever kind, whether they can be measured or not."""
    return layer.is_adapted or bool(adapter_problem(layer.module, layer.adapters))


def _with_unique_names(layers: list[Layer]) -> list[Layer]:
    """Return layers of which no two have one name: they would silently overwrite each other in a report.

    A part of a module, the `q` of attention, may be called as a layer in it is. That layer goes by its weight's
    name then, `attn.q.weight`, as in a file: layers come after those of the modules that they are in.

    Raises:
        ValueError: a registered rule gave two weights one name.
    """
    holders: dict[str, nn.Module] = {}
    unique = []
    for layer in layers:
        if holders.get(layer.name, layer.module) is not layer.module:
            layer = replace(layer, name=f"{layer.name}.weight")
        if layer.name in holders:
            rule = type(holders[layer.name]).__name__
            raise ValueError(
                f"two weights called {layer.name!r}: the rule registered for {rule} must give each its own `part`"
            )
        holders[layer.name] = layer.module
        unique.append(layer)
    return unique


def read_stacks(module: nn.Module, adapters: Adapters = "separate") -> list[MatrixStack]:
    """Return a layer's weights as matrices, one stack for each, at least one, without side effects on the module.

    They have no history of gradients, and are views of the weights where nothing has to be computed.

    Raises:
        NoSpectrumError: the module holds no matrix; the message says why.
    """
    with reading(module):
        stacks = adapted_stacks(module, adapters) if _is_whole(module, adapters) else layer_matrices(module)
    if not stacks:
        raise NoSpectrumError(f"{type(module).__name__} holds no matrix")
    return stacks


def read_layers(layers: Sequence[Layer]) -> Iterator[tuple[Layer, MatrixStack | Exception]]:
    """Read the weights of layers, one module after the other.

    The weights of a module are read when its first layer is asked for, and let go with its last one: those that
    have to be gathered or computed take memory.

    Yields:
        Each layer that has matrices, with its stack `(K, R, C)`, or with the error that reading it raised. Layers
        with a problem are left out, but for those that are planned: their stacks are on the meta device.
    """
    module, stacks = None, []
    for layer in layers:
        if layer.problem and not layer.planned:
            continue
        try:
            if layer.module is not module:
                stacks = read_stacks(layer.module, layer.adapters)
                module = layer.module
            yield layer, stacks[layer.index]
        except NoSpectrumError:
            continue
        except Exception as caught:
            yield layer, caught


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether it wraps a submodule for `torch.compile` or checkpointing: the module in it is the layer."""
    return any(isinstance(getattr(module, name, None), nn.Module) for name in WRAPPED)


def _is_whole(module: nn.Module, adapters: Adapters) -> bool:
    """Return whether a layer and its adapters are one layer; a rule that a user registers comes first."""
    return adapters != "separate" and is_adapted(module) and not has_rule(module)


def _problem_of_adapters(module: nn.Module, adapters: Adapters, embeddings: bool) -> str:
    """Say why a layer with adapters cannot be measured; empty for layers without adapters."""
    base = base_of(module)
    if not _is_whole(module, adapters) or has_rule(base, embeddings=embeddings):
        return adapter_problem(module, adapters)
    return EMBEDDING if isinstance(base, (nn.Embedding, nn.EmbeddingBag)) else no_rule("base_layer")


def _own_modules(module: nn.Module, adapters: Adapters) -> Iterator[nn.Module]:
    """Yield a layer and its descendants, but for those below a descendant that is a layer itself.

    To a layer with adapters belong all modules of the adapters, and those of the layer inside.
    """
    yield module
    is_whole = _is_whole(module, adapters)
    for name, child in module.named_children():
        if is_whole and name != "base_layer":
            yield from child.modules()
        elif is_whole or not (has_rule(child) or _is_whole(child, adapters)):
            yield from _own_modules(child, adapters)


def _module_layers(
    path: str,
    module: nn.Module,
    adapters: Adapters,
    problem: str,
    names: dict[int, str],
    claimed: dict[int, str],
) -> list[Layer]:
    """Return the layers of one module whose type has a rule, or that has adapters.

    Args:
        path: path of the module.
        module: the module.
        adapters: see `find_layers`.
        problem: why the module's adapters rule a measurement out; empty where they do not.
        names: of the model's parameters, by identity.
        claimed: names of the layers that parameters belong to, by identity; those of this module are added.
    """
    # Inside of a layer with adapters there may be another one, the output projection of attention.
    base = path if adapters == "separate" else path.replace(".base_layer.", ".")
    name = base or "weight"
    parameters = _own_parameters(module, adapters)
    problem = _tied(parameters, claimed) or problem or unreadable(parameters.values())
    free = {key: names[key] for key in parameters if key not in claimed and key in names}
    claimed.update(dict.fromkeys(free, name))
    stacks: list[MatrixStack] = []
    if problem in ("", NO_VALUES):
        # Both have the same shapes, and the sum takes longer.
        stacks, refused = _read_or_refuse(module, "base" if adapters == "merged" else adapters)
        problem = problem or refused
    whole = Layer(
        name,
        path,
        module,
        parameters=tuple(free.values()),
        matrices=tuple(name for key, name in free.items() if _may_hold_matrices(parameters[key])),
        problem=problem,
        adapters=adapters,
        is_adapted=_is_whole(module, adapters),
    )
    if not stacks:
        return [whole]
    made_of = [_made_of(module, stack.parameter) for stack in stacks]
    of_any = set().union(*made_of)
    return [
        replace(
            whole,
            name=".".join(filter(None, (base, stack.part))) or "weight",
            index=index,
            kind=stack.kind,
            shape=tuple(stack.matrices.shape),
            # A parameter that some stacks are made of belongs to these alone; what no stack names, a bias, to all.
            parameters=tuple(name for key, name in free.items() if key in own or key not in of_any),
            matrices=tuple(name for key, name in free.items() if key in own) or whole.matrices,
            problem=stack_problem(stack) or problem,
            sampling=stack.sampling,
        )
        for index, (stack, own) in enumerate(zip(stacks, made_of, strict=True))
    ]


def own_matrices(layer: Layer) -> list[nn.Parameter]:
    """Return the parameters with matrices that a layer computes with, those that other layers share included."""
    if layer.has_rule:
        own = list(_own_parameters(layer.module, layer.adapters).values())
    else:
        parameters = layer.module._parameters.items()
        own = [p for name, p in parameters if p is not None and layer_name(layer.module_name, name) == layer.name]
    return [parameter for parameter in own if _may_hold_matrices(parameter)]


def _own_parameters(module: nn.Module, adapters: Adapters) -> dict[int, nn.Parameter]:
    """Return the parameters of a layer, and of its descendants that are no layers, by their identity."""
    return {
        id(parameter): parameter
        for part in _own_modules(module, adapters)
        for parameter in part._parameters.values()
        if parameter is not None
    }


def _made_of(module: nn.Module, weight: str) -> set[int]:
    """Return the identities of the parameters that a weight is computed from; none where its name is empty."""
    # The parameter of that name, or those that torch's hooks compute it from: pruning, weight_norm.
    found = [module._parameters.get(name) for name in (weight, f"{weight}_orig", f"{weight}_g", f"{weight}_v")]
    parametrized = getattr(module, "parametrizations", {})
    if weight in parametrized:
        found += parametrized[weight].parameters()
    return {id(parameter) for parameter in found if parameter is not None}


def _read_or_refuse(module: nn.Module, adapters: Adapters) -> tuple[list[MatrixStack], str]:
    """Return the module's stacks, or why there are none: of an odd layer, a rule may raise anything."""
    try:
        return read_stacks(module, adapters), ""
    except NoSpectrumError as error:
        return [], str(error)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return [], f"its weights cannot be read ({type(error).__name__}: {reason})"


def _layers_without_rule(path: str, module: nn.Module) -> list[Layer]:
    """List the matrices of a module, without its descendants, whose type is unknown or that is a lookup table."""
    is_lookup = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_embedding_name(path)
    layers = []
    for own, parameter in module._parameters.items():
        if parameter is None or not _may_hold_matrices(parameter):
            continue
        problem = unreadable([parameter])
        if problem in ("", NO_VALUES):
            problem = no_rule(own)
            if is_lookup and own == "weight" and parameter.ndim == 2:
                problem = EMBEDDING
        layers.append(Layer(layer_name(path, own), path, module, problem=problem, has_rule=False))
    return layers + _quantised_layers(path, module)


def _quantised_layers(path: str, module: nn.Module) -> list[Layer]:
    """List the weights of a quantised layer that are no parameters: buffers of codes, or packed by torch.ao."""
    layers = []
    if _is_packed(module):
        # A linear layer keeps them in a module of its own, a convolution in itself.
        name = f".{path}".removesuffix("._packed_params").strip(".")
        layers.append(Layer(name or "weight", path, module, problem=PACKED, has_rule=False))
    # Those of a scripted module are no dicts.
    tensors = [*module._parameters.items(), *module._buffers.items()]
    siblings = {name for name, tensor in tensors if tensor is not None}
    filling = next((name for name in QUANTISED if name in siblings), "")
    for own, buffer in module._buffers.items():
        if buffer is None or buffer.is_floating_point() or buffer.is_complex():
            continue
        if are_codes(own, siblings) and _may_hold_matrices(buffer):
            # GPTQ and AWQ have a `qweight`, which has the layer's name, as in a file.
            name = path if path and own == filling else layer_name(path, own)
            layers.append(Layer(name, path, module, problem=quantised(buffer.dtype), has_rule=False))
    return layers


def _is_packed(module: nn.Module) -> bool:
    """Return whether torch.ao has packed a quantised weight of the module into an object of its kernels."""
    return any(
        isinstance(value, torch.ScriptObject) and (name.startswith("_packed") or name == "param")
        for name, value in vars(module).items()
    )


def _may_hold_matrices(parameter: Tensor) -> bool:
    """Return whether a parameter or buffer is no vector; one that waits for its first batch has no shape yet."""
    return not is_lazy(parameter) and (parameter.is_nested or matrix_dims(parameter.shape) > 1)


def _tied(parameters: dict[int, nn.Parameter], claimed: dict[int, str]) -> str:
    """Say which layer shares a weight with these parameters; empty for none. A shared bias is no tie."""
    for key, parameter in parameters.items():
        if key in claimed and _may_hold_matrices(parameter):
            return f"tied to {claimed[key]!r}"
    return ""
