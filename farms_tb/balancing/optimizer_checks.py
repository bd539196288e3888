"""Which optimizers move the parameters, and which of them can have layer-wise learning rates.

Everything here is known before the first step, from the optimizer's class, its attributes and its param groups;
`first_steps` checks what only a step shows. The errors of both are made here, so that each names a way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farms_tb.balancing.lr_probe import ignores_lr_of_groups
from farms_tb.warnings import warn_once

Group = dict[str, Any]

TORCH_OPTIMIZERS = frozenset(value for value in vars(torch.optim).values() if isinstance(value, type))
"""Torch's own classes. They use the param groups that they are shown, and write nothing into them."""

_WAY_OUT = "Use another optimizer, or lr_min_ratio=lr_max_ratio=1 to measure only"


def unwrapped_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Lightning's `LightningOptimizer`; any other object as it is."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    inner = getattr(optimizer, "_optimizer", None)
    return inner if hasattr(inner, "param_groups") else optimizer


def stepping_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizers that move the parameters: those that `optimizer` wraps (SAM, Lookahead), or itself.

    Wrapped optimizers are its attributes, or in lists and dicts among them. An optimizer that wraps another one
    and also moves parameters of its own comes after those it wraps. Each comes once.
    """
    yield from _stepping(optimizer, set())


def _stepping(optimizer: Optimizer, seen: set[int]) -> Iterator[Optimizer]:
    """Yield as `stepping_optimizers` does, but for those whose `id` was seen: wrappers may refer to each other."""
    seen.add(id(optimizer))
    inner = [wrapped for wrapped in _optimizers_among(vars(optimizer).values()) if id(wrapped) not in seen]
    for wrapped in inner:
        if id(wrapped) not in seen:
            yield from _stepping(wrapped, seen)
    moved_by_others: set[int] = set()
    for wrapped in inner:
        moved_by_others |= parameter_ids(wrapped)
    if not inner or not parameter_ids(optimizer) <= moved_by_others:
        yield optimizer


def all_parameters(groups: Iterable[Group]) -> list[Tensor]:
    """Return the parameters of param groups, in order."""
    params: list[Tensor] = []
    for group in groups:
        params += group["params"]
    return params


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the `id` of each parameter in the param groups of an optimizer, which may grow during training."""
    return set(map(id, all_parameters(optimizer.param_groups)))


def _optimizers_among(values: Iterable[Any], depth: int = 3) -> Iterator[Optimizer]:
    """Yield the optimizers among values, and in lists, tuples and dicts among them, `depth` inside each other."""
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif depth == 0:
            continue
        elif isinstance(value, (list, tuple)):
            yield from _optimizers_among(value, depth - 1)
        elif isinstance(value, Mapping) and not _is_state(value):
            yield from _optimizers_among(value.values(), depth - 1)


def _is_state(mapping: Mapping[Any, Any]) -> bool:
    """Return whether it is an optimizer's state: it has parameters as keys, and maybe millions of values."""
    return isinstance(next(iter(mapping), None), Tensor)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise where layer-wise learning rates cannot work, warn where they are untested.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: a class of optimizers that cannot have layer-wise learning rates, or that ignores those of its
            groups, or a group without a number as its lr.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"layer-wise learning rates need a torch.optim.Optimizer, got {name}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"LBFGS takes one step along one direction for all layers. {_WAY_OUT}")
    if "ZeroRedundancyOptimizer" in (cls.__name__ for cls in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer steps with parts of parameters: choose a plain optimizer or FSDP2, or "
            "lr_min_ratio=lr_max_ratio=1 to measure only"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{name}.__init__ does not call Optimizer.__init__, so its steps cannot be followed: add "
            "super().__init__(params, defaults), or pass the optimizer that it wraps"
        )
    for index, group in enumerate(optimizer.param_groups):
        _check_lr(name, index, group)
    if type(optimizer) not in TORCH_OPTIMIZERS and ignores_lr_of_groups(optimizer):
        raise ValueError(
            f"{name} does not step with the learning rates of its param groups: in a trial on two equal matrices, "
            f"half the lr for one of them made no difference. {_WAY_OUT}"
        )
    _warn_if_untested(optimizer)


def _warn_if_untested(optimizer: Optimizer) -> None:
    """Warn, once for each class, of those to which ratios mean little, and of optimizers that are not torch's."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Rprop):
        message = "Rprop uses its lr for the first step alone: ratios have no effect after it"
    elif isinstance(optimizer, torch.optim.Adafactor):
        message = (
            "torch's Adafactor steps with 1 / sqrt(step) where that is below its lr: layers whose rates are above "
            "it all step alike, so that ratios have less and less effect. A smaller lr puts this off: with 1e-3 "
            "it begins after a million steps"
        )
    elif type(optimizer).__module__.startswith("torch.optim"):
        return
    else:
        message = f"layer-wise learning rates are untested with {name}: check callback.param_groups(optimizer)"
    warn_once(message, type(optimizer))


def _check_lr(name: str, index: int, group: Group) -> None:
    """Raise where the lr of a group is missing, None, or neither a number nor a tensor."""
    if "lr" not in group:
        raise ValueError(f"param group {index} of {name} has no 'lr' to scale. {_WAY_OUT}")
    lr = group["lr"]
    if lr is None:
        raise ValueError(
            f"param group {index} of {name} has lr=None: it chooses its learning rate by itself, so there is none "
            "to scale. Pass lr (transformers' Adafactor: with relative_step=False), or "
            "lr_min_ratio=lr_max_ratio=1 to measure only"
        )
    if not isinstance(lr, (Real, Tensor)):
        raise ValueError(f"param group {index} of {name} must have a number as its lr, got {lr!r}. {_WAY_OUT}")


def incompatible(optimizer: Optimizer, deed: str) -> RuntimeError:
    """Return the error for a step that did something which learning rates for each layer do not allow.

    Args:
        optimizer: the optimizer.
        deed: what its step did, as the predicate of a sentence.
    """
    return RuntimeError(
        f"{type(optimizer).__name__}.step() {deed} during a step with layer-wise learning rates: the two cannot "
        f"be combined. {_WAY_OUT}"
    )


def captured(optimizer: Optimizer) -> RuntimeError:
    """Return the error for a step that is part of a CUDA graph."""
    return RuntimeError(
        f"{type(optimizer).__name__}.step() was captured in a CUDA graph, which would go on with the learning "
        "rates of that moment: leave the step out of the graph (capture forward and backward alone, as "
        "torch.cuda.make_graphed_callables does), or lr_min_ratio=lr_max_ratio=1 to measure only"
    )
