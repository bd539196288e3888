"""What the optimizers really step with, said in layers and names of parameters.

`TempBalance.param_groups(optimizer)` and the logged learning rates come from here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from farms_tb.balancing.assignment import Assignment, Owners
from farms_tb.balancing.split_groups import SplitGroup
from farms_tb.weights.layers import Layer
from farms_tb.weights.names import named_parameters

_NOT_IN_MODEL = "(not in the model)"


@dataclass(frozen=True)
class StepGroup:
    """A param group that the optimizer really steps with.

    Attributes:
        group: index of the user's param group that it is part of.
        layers: names of the measured layers among its parameters.
        parameters: names of the parameters.
        ratio: learning-rate ratio of all of them.
        lr: learning rate of all of them now, the user's (or the scheduler's) lr * ratio. None where the optimizer
            chooses its learning rate by itself, which is possible if it is only measured.
        weight_decay: weight decay of all of them now; None where the optimizer has none.
    """

    group: int
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    ratio: float
    lr: float | None
    weight_decay: float | None = None


def step_groups(model: nn.Module, assignment: Assignment, groups: Sequence[SplitGroup]) -> list[StepGroup]:
    """Name the layers and parameters of the groups that a step sees.

    Args:
        model: the model.
        assignment: its layers, and which parameters are theirs.
        groups: the groups, as `split_groups` returns them.

    Returns:
        One for each group, in order. A parameter that is not the model's is called `(not in the model)`.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    found = []
    for group in groups:
        parameters = tuple(names.get(id(parameter), _NOT_IN_MODEL) for parameter in group.params)
        layers = _layers_of(parameters, assignment.owners)
        lr = None if group.lr is None else float(group.lr)
        decay = None if group.weight_decay is None else float(group.weight_decay)
        found.append(StepGroup(group.index, layers, parameters, group.ratio, lr, decay))
    return found


def lrs_of_layers(
    layers: Sequence[Layer], groups: Sequence[StepGroup], trained: Container[str]
) -> dict[str, float]:
    """Return the learning rate of each layer: that of the first of its parameters that is trained.

    Args:
        layers: the layers of the model.
        groups: all groups that the optimizers step with.
        trained: names of the parameters that are trained.

    Returns:
        Learning rate by the layer's name, in the order of the layers. Layers that are not trained are left out.
    """
    lrs = {name: group.lr for group in groups if group.lr is not None for name in group.parameters}
    found: dict[str, float] = {}
    for layer in layers:
        own = [name for name in layer.parameters if name in lrs and name in trained]
        if own:
            found[layer.name] = lrs[own[0]]
    return found


def _layers_of(parameters: Iterable[str], owners: Owners) -> tuple[str, ...]:
    """Return the layers that parameters are part of, each once."""
    layers: dict[str, None] = {}
    for name in parameters:
        layers.update(dict.fromkeys(owners.get(name, ())))
    return tuple(layers)
