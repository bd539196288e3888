"""Learning rates of their own for parameters, shown to `optimizer.step()` and to nobody else.

Outside `step` the optimizer's `param_groups` are exactly the user's: schedulers, checkpoints, clipping and
learning-rate monitors never see anything else. For the length of a step the optimizer is replaced, through its
own step hooks, by a view of itself: an instance of a subclass that shares all of its state and whose
`param_groups` are the user's groups split by ratio, each with lr = the group's lr * ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from operator import is_
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from farms_tb.balancing.foreach_update import RULES, merged_update
from farms_tb.warnings import warn_once

Group = dict[str, Any]

_MISSING = object()
# Torch's own, by the very class: to look at every group after every step takes time.
_WRITE_NOTHING = {value for value in vars(torch.optim).values() if isinstance(value, type)}
# By a weak reference: what is attached holds its optimizer, which would live for ever.
_attached: WeakKeyDictionary[Optimizer, ReferenceType[LayerwiseStep]] = WeakKeyDictionary()


@dataclass(frozen=True)
class SplitGroup:
    """Parameters of one of the user's groups that have one ratio.

    Attributes:
        index: position of the user's group in `optimizer.param_groups`.
        params: the parameters, in the user's order.
        ratio: learning-rate ratio.
        lr: the learning rate that a step would use now: the group's lr * ratio.
    """

    index: int
    params: list[Tensor]
    ratio: float
    lr: float | Tensor


def stepping_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizers that move the parameters: those that `optimizer` wraps (SAM, Lookahead), or itself.

    One that wraps another and also moves parameters of its own comes after those it wraps.
    """
    inner = [
        value for value in vars(optimizer).values() if isinstance(value, Optimizer) and value is not optimizer
    ]
    for wrapped in inner:
        yield from stepping_optimizers(wrapped)
    moved = {id(p) for wrapped in inner for group in wrapped.param_groups for p in group["params"]}
    if not inner or any(id(p) not in moved for group in optimizer.param_groups for p in group["params"]):
        yield optimizer


class _Split:
    """One of the user's groups, and the groups that a step sees in its place.

    Tensors in the groups of the step are copies, so that one written in place (a counter) is written once, and
    is seen to be.
    """

    def __init__(self, group: Group, by_ratio: Mapping[float, list[Tensor]]) -> None:
        self.group = group
        self.whole = set(by_ratio) <= {1.0}
        self._ratios = list(by_ratio)
        self._params = list(group["params"])
        self.shown = [group]
        if not self.whole:
            self.shown = [
                {key: self._own(key, value, ratio) for key, value in group.items()} | {"params": params}
                for ratio, params in by_ratio.items()
            ]
        self._given = [_Note(shown) for shown in self.shown]
        self._users = _Note(group)

    def still_of(self, group: Group) -> bool:
        """Tell whether this is how `group` is split now too, provided that the ratios are the same.

        Never where the group holds tensors, whose copies are made anew.
        """
        params = group["params"]
        return (
            group is self.group
            and group.keys() == self.shown[0].keys()
            and not any(isinstance(value, Tensor) for value in group.values())
            and len(params) == len(self._params)
            # By identity: tensors compare by value.
            and all(map(is_, params, self._params))
        )

    def follow_user(self) -> None:
        """Hand what the user changed since on to the groups of the step, scaled where it is the lr."""
        if self.whole:
            return
        changed = self._users.changes(self.group) & self.group.keys()
        if not changed:
            return
        for shown, given, ratio in zip(self.shown, self._given, self._ratios, strict=True):
            for key in changed:
                shown[key] = self._own(key, self.group[key], ratio)
                given.update(key, shown[key])
        self._users = _Note(self.group)

    def written_by_step(self) -> set[str]:
        """Return the keys of the groups of the step that differ from what the step was given."""
        written: set[str] = set()
        for shown, given in zip(self.shown, self._given, strict=True):
            written |= given.changes(shown)
        return written

    @staticmethod
    def _own(key: str, value: Any, ratio: float) -> Any:
        if key == "lr":
            return _scaled(value, ratio)
        return value.clone() if isinstance(value, Tensor) else value


class _Merged:
    """One of the user's groups that is updated as a whole, after a step that sees it without parameters."""

    def __init__(self, group: Group, update: Callable[[], None]) -> None:
        self.group = group
        self.shown = [{**group, "params": []}]
        self.update = update

    def follow_user(self) -> None:
        """Nothing to do: the update looks at the user's group itself."""


class _Note:
    """The values of a group but for its parameters at some time, and how often tensors among them had changed."""

    def __init__(self, group: Group) -> None:
        self._values = dict(group)
        self._versions = {key: v._version for key, v in self._values.items() if isinstance(v, Tensor)}

    def update(self, key: str, value: Any) -> None:
        """Note a new value."""
        self._values[key] = value
        self._versions.pop(key, None)
        if isinstance(value, Tensor):
            self._versions[key] = value._version

    def changes(self, group: Group) -> set[str]:
        """Return the keys that were written, added or removed since."""
        values = self._values
        same = group.keys() == values.keys() and all(map(is_, group.values(), values.values()))
        if same and not self._versions:  # as nearly always, with as many groups a step as there are ratios
            return set()
        written = {key for key, value in values.items() if group.get(key, _MISSING) is not value}
        written |= {key for key, version in self._versions.items() if values[key]._version != version}
        return (written | (group.keys() - values.keys())) - {"params"}


class LayerwiseStep:
    """Give parameters of one optimizer learning rates of their own while it steps.

    Args:
        optimizer: any `torch.optim.Optimizer` whose groups have an `lr`.

    Attributes:
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none. May be replaced at any time
            between steps. While every ratio is 1 the optimizer steps as if nothing were attached.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: an optimizer that cannot have layer-wise learning rates, or that already has them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self._ratios: Mapping[int, float] = {}
        self._captured = self._compiled = False
        self._view = self._make_view()
        # While a step runs: the groups it sees, and for each of the user's groups how it was split.
        self._shown: list[Group] | None = None
        self._split: list[_Split | _Merged] = []
        # The split of the last step, for as long as it holds: with a thousand layers it takes as long as the step.
        self._kept: list[_Split | None] = []
        self._kept_ratios: Mapping[int, float] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Before the user's own, which find the parameters updated and the groups written.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]
        _attached[optimizer] = ref(self)

    @property
    def ratios(self) -> Mapping[int, float]:
        """Learning-rate ratio of a parameter by its `id`."""
        return self._ratios

    @ratios.setter
    def ratios(self, ratios: Mapping[int, float]) -> None:
        if self._captured and not _all_one(ratios):
            raise RuntimeError(self._captured_message())
        self._ratios = ratios

    def detach(self) -> None:
        """Leave the optimizer as it was found. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept = [], []
        attached = _attached.get(self.optimizer)
        if attached is not None and attached() is self:
            del _attached[self.optimizer]

    def split_groups(self) -> list[SplitGroup]:
        """Return the groups that a step would see now, in order."""
        found = []
        for index, group in enumerate(self.optimizer.param_groups):
            for ratio, params in self._by_ratio(group).items():
                found.append(SplitGroup(index, params, ratio, _scaled(group["lr"], ratio)))
        return found

    def _make_view(self) -> Optimizer:
        cls = type(self.optimizer)
        shown = property(lambda _: self._groups_to_show(), self._refuse_new_groups)
        names = {"param_groups": shown, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        view: Optimizer = object.__new__(type(cls.__name__, (cls,), names))
        view.__dict__ = self.optimizer.__dict__
        return view

    def _refuse_new_groups(self, _: Optimizer, groups: list[Group]) -> None:
        raise RuntimeError(self._incompatible("replaced its param_groups"))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        # `super().step()` in a subclass fires the hooks again, for the view: scaled already.
        if optimizer is self._view:
            return None
        # A step that raised never came to its end.
        self._shown, self._split = None, []
        # Asked here, where it is known: later, parts of a compiled step run as they are.
        self._compiled = torch.compiler.is_compiling()
        capturing = _is_capturing()
        self._captured |= capturing
        if _all_one(self.ratios):
            return None
        if capturing:
            raise RuntimeError(self._captured_message())
        _, *rest = args
        if rest and callable(rest[0]):
            rest[0] = self._with_refresh(rest[0])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._with_refresh(kwargs["closure"])}
        return (self._view, *rest), kwargs

    def _with_refresh(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap a closure: whatever it sets in the user's groups, the lr above all, holds for this step."""

        def refreshing() -> Any:
            result = closure()
            self._refresh()
            return result

        return refreshing

    def _groups_to_show(self) -> list[Group]:
        if self._shown is None:
            users = self.optimizer.__dict__["param_groups"]
            kept, self._kept = self._kept, []
            if self._kept_ratios != self.ratios:
                kept, self._kept_ratios = [], dict(self.ratios)
            self._split = [self._split_of(group, old) for group, old in zip_longest(users, kept[: len(users)])]
            self._shown = [group for split in self._split for group in split.shown]
        return self._shown

    def _split_of(self, group: Group, old: _Split | None) -> _Split | _Merged:
        # What is compiled is torch's own step, which the compiler knows and merges by itself.
        update = None if self._compiled else merged_update(self.optimizer, group, self.ratios)
        if update is not None:
            return _Merged(group, update)
        if old is None or not old.still_of(group):
            return _Split(group, self._by_ratio(group))
        old.follow_user()
        return old

    def _by_ratio(self, group: Group) -> dict[float, list[Tensor]]:
        by_ratio: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_ratio.setdefault(self.ratios.get(id(parameter), 1.0), []).append(parameter)
        return by_ratio

    def _refresh(self) -> None:
        """Let the groups of the step follow what became of the user's since they were split."""
        if self._shown is None:
            return
        users = self.optimizer.__dict__["param_groups"]
        if [id(split.group) for split in self._split] != [id(group) for group in users[: len(self._split)]]:
            self._split = []
            self._shown.clear()
        for place, split in enumerate(self._split):
            if type(self.optimizer) in RULES:
                # On a GPU torch looks at the groups before it calls the closure: these are not its gradients.
                self._split[place] = self._split_of(split.group, None)
            else:
                split.follow_user()
        # In place, as the step may hold on to the list.
        self._shown[:] = [group for split in self._split for group in split.shown]
        for group in users[len(self._split) :]:
            self._split.append(self._split_of(group, None))
            self._shown += self._split[-1].shown

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._view or self._shown is None:
            return
        shown, splits = self._shown, self._split
        self._shown, self._split = None, []
        if len(shown) != sum(len(split.shown) for split in splits):
            raise RuntimeError(self._incompatible("added or removed param groups"))
        for split in splits:
            if isinstance(split, _Merged):
                split.update()
            elif not split.whole and type(self.optimizer) not in _WRITE_NOTHING:
                self._write_back(split)
        # A merged group holds on to gradients, which would take memory until the next step.
        self._kept = [None if isinstance(split, _Merged) else split for split in splits]

    def _write_back(self, split: _Split) -> None:
        """Carry what the step wrote into its groups over to the user's group."""
        written = split.written_by_step()
        if "lr" in written:
            raise RuntimeError(self._incompatible("wrote group['lr']"))
        for key in written:
            values = [shown.get(key, _MISSING) for shown in split.shown]
            if not all(_same(values[0], value) for value in values[1:]):
                raise RuntimeError(
                    self._incompatible(f"keeps group[{key!r}], which depends on the learning rate,")
                )
            _store(split.group, key, values[0])

    def _captured_message(self) -> str:
        return (
            f"{type(self.optimizer).__name__}.step() was captured in a CUDA graph, which would go on with the "
            "learning rates of that moment: leave the step out of the graph (capture forward and backward alone, "
            "as torch.cuda.make_graphed_callables does), or lr_min_ratio=lr_max_ratio=1 to measure only"
        )

    def _incompatible(self, deed: str) -> str:
        return (
            f"{type(self.optimizer).__name__}.step() {deed} during a step with layer-wise learning rates: the two "
            "cannot be combined. Use another optimizer, or lr_min_ratio=lr_max_ratio=1 to measure only"
        )


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise where layer-wise learning rates cannot work, warn where they are untested."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"layer-wise learning rates need a torch.optim.Optimizer, got {name}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS takes one step along one direction for all layers: choose another optimizer")
    if "ZeroRedundancyOptimizer" in (cls.__name__ for cls in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer steps with parts of parameters: choose a plain optimizer or FSDP2"
        )
    for index, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"param group {index} of {name} has no 'lr' to scale: choose another optimizer")
    if optimizer in _attached:
        raise ValueError(
            f"this {name} already has layer-wise learning rates: use one FARMSTempBalance or TempBalance"
        )
    if name == "Rprop":
        message = "Rprop uses its lr for the first step alone: ratios have no effect after it"
        warn_once(message, type(optimizer), stacklevel=3)
    elif not type(optimizer).__module__.startswith("torch.optim"):
        message = f"layer-wise learning rates are untested with {name}: check callback.param_groups(optimizer)"
        warn_once(message, type(optimizer), stacklevel=3)


def _all_one(ratios: Mapping[int, float]) -> bool:
    return all(ratio == 1 for ratio in ratios.values())


def _is_capturing() -> bool:
    """Tell whether the user captures a CUDA graph; to the graphs of `torch.compile` learning rates are inputs."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def _scaled(lr: float | Tensor, ratio: float) -> float | Tensor:
    return lr * ratio


def _store(group: Group, key: str, value: Any) -> None:
    """Set the user's value; a tensor of theirs stays the same tensor."""
    mine = group.get(key)
    if value is _MISSING:
        group.pop(key, None)
    elif isinstance(mine, Tensor) and isinstance(value, Tensor) and mine.shape == value.shape:
        with torch.no_grad():
            mine.copy_(value)
    else:
        group[key] = value


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return first is second or (not isinstance(first, Tensor) and bool(first == second))
