"""The layers of a model: which have a spectrum, which parameters each one owns.

Layers are listed in order of registration (`named_modules`), as in the papers. A layer that cannot be analysed is
listed with the reason: one odd layer never costs the measurement of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from farms_tb.weights.matrices import has_rule, layer_matrices
from farms_tb.weights.names import EMBEDDING, clean_name, is_embedding_name, layer_name, no_rule
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError, Sampling, stack_problem
from farms_tb.weights.values import NO_VALUES, matrix_dims, unreadable

__all__ = [
    "NO_VALUES",
    "Layer",
    "checked_layers",
    "clean_name",
    "find_layers",
    "read_stacks",
    "stack_problem",
    "unreadable",
    "unwrap",
]


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
        problem: why the layer has no spectrum; empty where it has one.
        has_rule: whether the module's type is one that holds matrices.
        sampling: that of the stack.
    """

    name: str
    module_name: str
    module: nn.Module
    index: int = 0
    kind: str = ""
    shape: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    problem: str = ""
    has_rule: bool = True
    sampling: Sampling = "blocks"

    @property
    def planned(self) -> bool:
        """Whether the layer would be measured if it had values."""
        return bool(self.kind) and self.problem == NO_VALUES


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_layers(model: nn.Module, *, embeddings: bool = False) -> list[Layer]:
    """List every layer of `model` that has a weight matrix, in order of registration.

    Args:
        model: any module; `torch.compile` and data-parallel wrappers are looked through.
        embeddings: give lookup tables a stack too, one matrix (entries, width); without it they are listed as not
            analysed.

    Returns:
        The layers, those without a spectrum among them with a `problem`. Of modules whose type has no rule, each
        parameter of at least two dimensions is listed.

    Raises:
        ValueError: a registered rule gave two weights the same name.
    """
    model = unwrap(model)
    names = _parameter_names(model)
    claimed: dict[int, str] = {}
    inside: set[int] = set()
    layers: list[Layer] = []
    for path, module in model.named_modules():
        path = clean_name(path)
        if _is_compiled_shell(module):
            continue
        if has_rule(module, embeddings=embeddings):
            inside.update(id(child) for child in _own_modules(module))
            layers.extend(_module_layers(path, module, names, claimed))
        elif id(module) not in inside:
            layers.extend(_layers_without_rule(path, module))
    _check_names(layers)
    return layers


def checked_layers(model: nn.Module, *, plan: bool = False) -> list[Layer]:
    """`find_layers`, with an error where there is nothing to measure, or to plan for."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = find_layers(model)
    planned = any(layer.planned for layer in layers)
    if all(layer.problem for layer in layers) and not (plan and planned):
        if planned:
            raise ValueError(
                f"{type(model).__name__} is on the meta device: its layers have no values to balance. Give it "
                "memory first, model.to_empty(device=...), and load or initialise its weights"
            )
        reasons = "".join(f"\n  {layer.name}: {layer.problem}" for layer in layers[:10])
        raise ValueError(
            f"{type(model).__name__} has no layer that can be analysed; linear, convolution, attention and "
            "spectral-convolution layers can, others by farms_tb.layer_matrices.register" + reasons
        )
    return layers


def _check_names(layers: list[Layer]) -> None:
    """Refuse duplicate names: they would silently overwrite each other in a report."""
    seen: set[str] = set()
    for layer in layers:
        if layer.name in seen:
            raise ValueError(
                f"two weights called {layer.name!r}: the rule registered for {type(layer.module).__name__} must "
                "give each its own `part`"
            )
        seen.add(layer.name)


def read_stacks(module: nn.Module) -> list[MatrixStack]:
    """Return the module's weights as matrices, without side effects on the module.

    Raises:
        NoSpectrumError: the module holds no matrix; the message says why.
    """
    with torch.no_grad(), _measuring(module):
        stacks = layer_matrices(module)
    if not stacks:
        raise NoSpectrumError(f"{type(module).__name__} holds no matrix")
    return stacks


@contextmanager
def _measuring(module: nn.Module) -> Iterator[None]:
    # A spectral-norm parametrization in training mode moves its power iteration each time the weight is read.
    parametrizations = getattr(module, "parametrizations", None) if parametrize.is_parametrized(module) else None
    changed = [part for part in parametrizations.modules() if part.training] if parametrizations else []
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True


def _is_compiled_shell(module: nn.Module) -> bool:
    """Tell the wrapper that `torch.compile` puts around a submodule: the module in it is the layer."""
    return isinstance(module._modules.get("_orig_mod"), nn.Module)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module` and its descendants, but for those below a descendant that is a layer itself."""
    yield module
    for child in module.children():
        if not has_rule(child):
            yield from _own_modules(child)


def _module_layers(path: str, module: nn.Module, names: dict[int, str], claimed: dict[int, str]) -> list[Layer]:
    """Return the layers of one module whose type has a rule, and note its parameters in `claimed`."""
    own = [parameter for part in _own_modules(module) for parameter in part._parameters.values()]
    parameters = {id(parameter): parameter for parameter in own if parameter is not None}
    problem = _tied(parameters, claimed) or unreadable(parameters.values())
    free = {key: names[key] for key in parameters if key not in claimed and key in names}
    claimed.update(dict.fromkeys(free, path or "weight"))
    stacks: list[MatrixStack] = []
    if problem in ("", NO_VALUES):
        stacks, refused = _read_or_refuse(module)
        problem = problem or refused
    if not stacks:
        return [Layer(path or "weight", path, module, parameters=tuple(free.values()), problem=problem)]
    # A parameter that some stacks are made of belongs to these alone; what no stack names, a bias say, to all.
    made_of = [id(module._parameters.get(stack.parameter)) for stack in stacks]
    return [
        Layer(
            name=".".join(filter(None, (path, stack.part))) or "weight",
            module_name=path,
            module=module,
            index=index,
            kind=stack.kind,
            shape=tuple(stack.matrices.shape),
            parameters=tuple(name for key, name in free.items() if key == made_of[index] or key not in made_of),
            problem=stack_problem(stack) or problem,
            sampling=stack.sampling,
        )
        for index, stack in enumerate(stacks)
    ]


def _read_or_refuse(module: nn.Module) -> tuple[list[MatrixStack], str]:
    """Return the module's stacks, or why there are none: of an odd layer, a rule may raise anything."""
    try:
        return read_stacks(module), ""
    except NoSpectrumError as error:
        return [], str(error)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return [], f"its weights cannot be read ({type(error).__name__}: {reason})"


def _layers_without_rule(path: str, module: nn.Module) -> list[Layer]:
    """List the matrices of a module whose type is unknown, or that is a lookup table."""
    lookup = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_embedding_name(path)
    layers = []
    for own, parameter in module._parameters.items():
        if parameter is None or is_lazy(parameter) or _is_vector(parameter):
            continue
        problem = "" if parameter.is_meta else unreadable([parameter])
        if not problem:
            problem = EMBEDDING if lookup and own == "weight" and parameter.ndim == 2 else no_rule(own)
        layers.append(Layer(layer_name(path, own), path, module, problem=problem, has_rule=False))
    return layers


def _is_vector(parameter: nn.Parameter) -> bool:
    return not (is_lazy(parameter) or parameter.is_nested) and matrix_dims(parameter.shape) < 2


def _tied(parameters: dict[int, nn.Parameter], claimed: dict[int, str]) -> str:
    for key, parameter in parameters.items():
        if key in claimed and not is_lazy(parameter) and not _is_vector(parameter):
            return f"tied to {claimed[key]!r}"
    return ""
