"""Does an optimizer use the learning rates that it is shown? Checked by the parameters, at its first steps.

Some optimizers pair their param groups with a list that they made when they were built, so that groups beyond its
end are never trained. Others step with groups or rates that they have copied, or call another optimizer. The
checks find these by what a step does: which parameters it moves, and which learning rates it reads. They cost a
norm of every parameter and so end after a few steps. Torch's own optimizers are known to be right and are not
checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farms_tb.balancing.optimizer_checks import TORCH_OPTIMIZERS, Group, all_parameters, incompatible
from farms_tb.balancing.targets import Ratio
from farms_tb.balancing.watched_group import WatchedGroup

_MOST_STEPS = 10
"""So many steps that move something are checked, if some group never has a gradient."""
_MOST_SKIPPED = 100
"""So many steps that move nothing are checked, as while a learning rate is 0 or gradients are accumulated."""


class FirstSteps:
    """Checks the first steps of one optimizer, and again when it is shown more groups than before.

    Attributes:
        pending: whether the next step has to be checked.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._applies = type(optimizer) not in TORCH_OPTIMIZERS
        self._most_groups = 0
        self._steps_left = self._skips_left = 0
        self._before: Traces | None = None
        self.pending = False

    def expect(self, ratios: Mapping[int, Ratio]) -> None:
        """Check the next steps if there are more different ratios than in any step before.

        Args:
            ratios: ratio of each parameter by its `id`.
        """
        number = len(set(ratios.values()))
        if self._applies and number > self._most_groups:
            self._most_groups = number
            self._steps_left, self._skips_left = _MOST_STEPS, _MOST_SKIPPED
            self.pending = True

    def begin(self, active: bool) -> None:
        """Note what the parameters are before a step.

        Args:
            active: whether the step has layer-wise learning rates.

        Raises:
            RuntimeError: the optimizer keeps a list of the learning rates of its groups, or of tensors for its
                parameters.
        """
        # Whatever is left of a step that raised.
        self._before = None
        if active and self.pending:
            _check_paired_lists(self._optimizer)
            _check_tensor_lists(self._optimizer)
            self._before = Traces(self._optimizer)

    def end(self, shown: Sequence[Group] | None) -> None:
        """Compare with what they are after it.

        Args:
            shown: the groups that the step saw; None where it did not ask for its groups.

        Raises:
            RuntimeError: the step moved parameters without looking at their group or its learning rate, or left
                out a group.
        """
        before, self._before = self._before, None
        if before is None:
            return
        if shown is None:
            if before.any_touched():
                raise incompatible(self._optimizer, "moved parameters without reading its param_groups")
            self._skipped()
            return
        written = [before.group_written(group) for group in shown]
        if not any(written):  # a first step may fill the state alone, as SOAP's does
            self._skipped()
            return
        touched = [before.group_touched(group) for group in shown]
        for group, was_written, was_touched in zip(shown, written, touched, strict=True):
            self._check_group(group, was_written, was_touched)
        self._steps_left -= 1
        self.pending = not all(touched) and self._steps_left > 0

    def _check_group(self, group: Group, written: bool, touched: bool) -> None:
        """Raise where a group was moved without its learning rate, or left out while others moved.

        `written` tells whether the step wrote one of its parameters, `touched` counts the state of one too.
        """
        if written:
            if isinstance(group, WatchedGroup) and not group.lr_was_read:
                raise incompatible(self._optimizer, "moved parameters without reading the lr of their param group")
        elif not touched and any(_must_move(parameter, group) for parameter in candidates(group)):
            raise incompatible(self._optimizer, "left out param groups")

    def _skipped(self) -> None:
        """Note a step that moved nothing."""
        self._skips_left -= 1
        self.pending = self._skips_left > 0


class Traces:
    """Finds out which parameters a step writes, from what they and their state are before it.

    A tensor's version counts in-place writes, and misses those through `parameter.data`; the norm shows them, and
    misses a step that is lost in rounding. The state of a parameter (momentum, step counters) changes with either.

    Args:
        optimizer: the optimizer, before the step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._state: Any = optimizer.__dict__.get("state", {})
        self._groups = optimizer.__dict__["param_groups"]
        self._marks: dict[int, tuple[Any, ...]] = {}
        self._norms: dict[int, Tensor | None] = {}
        for parameter in all_parameters(self._groups):
            self._marks[id(parameter)] = self._mark(parameter)
            self._norms[id(parameter)] = _norm(parameter)

    def any_touched(self) -> bool:
        """Return whether a step has written any parameter that has a gradient."""
        return any(self.group_touched(group) for group in self._groups)

    def group_touched(self, group: Group) -> bool:
        """Return whether a step has written any parameter of a group that has a gradient, or its state."""
        return any(self._touched(parameter) for parameter in candidates(group))

    def group_written(self, group: Group) -> bool:
        """Return whether a step has written any parameter of a group that has a gradient."""
        return any(self._written(parameter) for parameter in candidates(group))

    def _touched(self, parameter: Tensor) -> bool:
        """Return whether a step has written a parameter or its state since."""
        if id(parameter) not in self._marks:
            return False  # a closure has added it
        return self._marks[id(parameter)] != self._mark(parameter) or self._written(parameter)

    def _written(self, parameter: Tensor) -> bool:
        """Return whether a step has written a parameter since; its state does not count."""
        key = id(parameter)
        if key not in self._marks:
            return False
        if self._marks[key][0] != _version(parameter):
            return True
        before, now = self._norms[key], _norm(parameter)
        if before is None or now is None:
            return False
        return not torch.equal(before, now)

    def _mark(self, parameter: Tensor) -> tuple[Any, ...]:
        """Return what changes when a parameter or its state is written."""
        own = _version(parameter)
        # Optimizers of other packages may keep their state in other ways.
        if not isinstance(self._state, Mapping):
            return (own,)
        state = self._state.get(parameter, {})
        if not isinstance(state, Mapping):
            return (own,)
        return (own, *((key, _version(value)) for key, value in state.items()))


def _version(value: object) -> tuple[int, Any]:
    """Return what changes when a tensor is written, or another value replaced."""
    if isinstance(value, Tensor):
        return id(value), value._version
    return id(value), value if isinstance(value, (int, float)) else None


def _norm(parameter: Tensor) -> Tensor | None:
    """Return the norm of a parameter in double precision; None for tensors that have none of their own."""
    double = torch.complex128 if parameter.is_complex() else torch.float64
    try:
        with torch.no_grad():
            norm: Tensor = torch.linalg.vector_norm(_local(parameter), dtype=double)
            return norm.cpu()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that is on this process, so that no process waits for another one."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.detach()


def candidates(group: Group) -> list[Tensor]:
    """Return the parameters of a group that a step should move: those that have a gradient."""
    params: list[Tensor] = dict.__getitem__(group, "params")
    return [p for p in params if p.requires_grad and p.grad is not None]


def _must_move(parameter: Tensor, group: Group) -> bool:
    """Return whether a step that uses this group cannot leave a parameter as it is.

    Not where the gradient or the learning rate is 0, nor where a thousandth of their product is lost in the
    rounding of the parameter: 0.001 * |lr * gradient| > eps * |parameter| for some entry.
    """
    # Read past `WatchedGroup`, which would count this as the step's reading.
    grad, lr = parameter.grad, float(dict.__getitem__(group, "lr"))
    if grad is None or lr == 0 or not parameter.is_floating_point():
        return False
    grad = _local(grad)
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    rounding = torch.finfo(parameter.dtype).eps * _local(parameter).abs()
    smallest_move = (1e-3 * abs(lr)) * grad.abs()
    return bool((smallest_move > rounding).any())


def _check_paired_lists(optimizer: Optimizer) -> None:
    """Raise where an optimizer keeps a list of the learning rates of its param groups, as AdaBound does.

    It goes through its groups and this list in pairs, and a step sees more groups than the list has entries.
    """
    groups = optimizer.__dict__["param_groups"]
    default = optimizer.defaults.get("lr")
    for name, value in vars(optimizer).items():
        if _are_lrs(value, groups, default):
            raise incompatible(optimizer, f"pairs its param groups with a list of its own, {name!r},")


def _are_lrs(value: object, groups: Sequence[Group], default: object) -> bool:
    """Return whether an attribute of the optimizer is a list with a learning rate of each group."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if len(value) != len(groups):
        return False
    return all(_is_lr(number, group, default) for number, group in zip(value, groups, strict=True))


def _is_lr(number: object, group: Group, default: object) -> bool:
    """Return whether a number is a learning rate that a group has, had at the start, or has by default."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    rates = (group.get("lr"), group.get("initial_lr"), default)
    # Numbers alone: tensors compare by value, too, and may be on a GPU.
    return number in [rate for rate in rates if isinstance(rate, (int, float))]


def _check_tensor_lists(optimizer: Optimizer) -> None:
    """Raise where an optimizer or a group keeps a list with a tensor for each of its parameters, its momentum say.

    It goes through its parameters and this list in pairs, and a step sees the parameters in another order: layers
    of one shape would get the momentum of others. An optimizer that keeps a list of its parameters, too, may go
    through that.
    """
    groups = optimizer.__dict__["param_groups"]
    _check_pairs(optimizer, all_parameters(groups), vars(optimizer))
    for group in groups:
        _check_pairs(optimizer, group["params"], {key: value for key, value in group.items() if key != "params"})


def _check_pairs(optimizer: Optimizer, params: Sequence[Tensor], values: Mapping[str, Any]) -> None:
    """Raise where a value is a list with a tensor for each parameter, and none is the list of the parameters."""
    if len(params) < 2:
        return
    lists = {name: _tensors_in(value) for name, value in values.items()}
    ids = list(map(id, params))
    if any(list(map(id, tensors)) == ids for tensors in lists.values()):
        return
    shapes = _shapes(params)
    for name, tensors in lists.items():
        if _shapes(tensors) == shapes:
            raise incompatible(optimizer, f"pairs its parameters with a list of its own, {name!r},")


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _tensors_in(value: object) -> list[Tensor]:
    """Return the tensors of a list, or of the lists in it; none where it holds anything else."""
    if not isinstance(value, (list, tuple)):
        return []
    flat: list[Any] = []
    for entry in value:
        if isinstance(entry, (list, tuple)):
            flat.extend(entry)
        else:
            flat.append(entry)
    if not all(isinstance(entry, Tensor) for entry in flat):
        return []
    return flat
