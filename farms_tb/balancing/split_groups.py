"""The param groups that a step sees: the user's groups, split by ratio.

`ShownGroups` makes them at the start of a step, and carries over to the user's groups what the step wrote. Each of
the user's groups becomes one part: `_Split`, the groups of its ratios, or `_Merged`, where `foreach_update` moves
all parameters at once. To split a thousand layers takes as long as the step itself, so a split is kept for the
next step while it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farms_tb.balancing.foreach_update import RULES, merged_update
from farms_tb.balancing.optimizer_checks import TORCH_OPTIMIZERS, Group, incompatible
from farms_tb.balancing.targets import Ratio, Scale, as_scale

_MISSING = object()


@dataclass(frozen=True)
class SplitGroup:
    """Parameters of one of the user's groups that have one ratio.

    Attributes:
        index: position of the user's group in `optimizer.param_groups`.
        params: the parameters, in the user's order.
        ratio: learning-rate ratio.
        lr: the learning rate that a step would use now: the group's lr * ratio. None where the group has none.
        weight_decay: the weight decay that a step would use now. None where the group has none.
    """

    index: int
    params: list[Tensor]
    ratio: float
    lr: float | Tensor | None
    weight_decay: float | Tensor | None = None


def split_groups(optimizer: Optimizer, ratios: Mapping[int, Ratio]) -> list[SplitGroup]:
    """Return the groups that a step of `optimizer` would see now, in order.

    Args:
        optimizer: the optimizer, outside of a step.
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none.

    Returns:
        For each of the user's groups one for each ratio, in the order in which its parameters have them.
    """
    found = []
    for index, group in enumerate(optimizer.param_groups):
        lr: Any = group.get("lr")
        # Without a number (None: the optimizer chooses by itself) there is nothing to scale.
        has_lr = isinstance(lr, (Real, Tensor))
        decay: Any = group.get("weight_decay")
        has_decay = isinstance(decay, (Real, Tensor))
        for ratio, params in _by_ratio(group, ratios).items():
            scale = as_scale(ratio)
            own_decay = decay * scale.decay if has_decay else None
            found.append(SplitGroup(index, params, scale.lr, lr * scale.lr if has_lr else None, own_decay))
    return found


class WatchedGroup(dict[str, Any]):
    """A param group that knows whether its learning rate was read.

    Copies of all values (`dict(group)`, `{**group}`) count as reading it. Copies are plain dicts.

    Attributes:
        lr_was_read: whether it was.
    """

    lr_was_read = False

    def __getitem__(self, key: str) -> Any:
        self.lr_was_read |= key == "lr"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        self.lr_was_read |= key == "lr"
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        # Python copies a dict past `__getitem__` unless its class defines `__iter__`.
        return super().__iter__()

    def items(self) -> Any:
        """Return all keys and values."""
        self.lr_was_read = True
        return super().items()

    def values(self) -> Any:
        """Return all values."""
        self.lr_was_read = True
        return super().values()

    def copy(self) -> dict[str, Any]:
        """Return a plain dict of the same values."""
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


class ShownGroups:
    """The groups that one step sees.

    Args:
        optimizer: the optimizer that steps.
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none.
        kept: the splits of the last step, which are used again where they still hold.
        compiled: whether the step is compiled. Such a step is torch's own, which the compiler merges by itself.
        watched: whether to note if the learning rates are read.

    Attributes:
        groups: the groups, in the order of the user's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ratios: Mapping[int, Ratio],
        kept: Sequence[_Split | None] = (),
        *,
        compiled: bool = False,
        watched: bool = False,
    ) -> None:
        self._optimizer, self._ratios = optimizer, ratios
        self._compiled, self._watched = compiled, watched
        users = self._users()
        self._parts: list[_Split | _Merged] = []
        for group, old in zip_longest(users, kept[: len(users)]):
            self._parts.append(self._part(group, old))
        self.groups: list[Group] = []
        self._show()

    def refresh(self) -> None:
        """Follow what became of the user's groups since they were split: a closure may change them."""
        users = self._users()
        known = users[: len(self._parts)]
        replaced = [id(part.group) for part in self._parts] != [id(group) for group in known]
        # Torch may look at the groups before it calls the closure, which makes other gradients.
        if replaced or type(self._optimizer) in RULES:
            self._parts = []
        for part in self._parts:
            part.follow_user()
        for group in users[len(self._parts) :]:
            self._parts.append(self._part(group, None))
        self._show()

    def finish(self) -> list[_Split | None]:
        """Update what was merged, and write back to the user's groups what the step wrote into its own.

        Returns:
            The splits that the next step may use again. Merged groups are none, because they hold gradients, nor
            are watched ones, which are slow to read.

        Raises:
            RuntimeError: the step did to its groups what cannot be carried over.
        """
        if len(self.groups) != sum(len(part.shown) for part in self._parts):
            raise incompatible(self._optimizer, "added or removed param groups")
        writes_nothing = type(self._optimizer) in TORCH_OPTIMIZERS
        kept: list[_Split | None] = []
        for part in self._parts:
            if isinstance(part, _Merged):
                part.update()
                kept.append(None)
                continue
            if not part.whole and not writes_nothing:
                self._write_back(part)
            kept.append(None if self._watched else part)
        return kept

    def _users(self) -> list[Group]:
        """Return the user's groups, past the property of the view that shows others in their place."""
        users: list[Group] = self._optimizer.__dict__["param_groups"]
        return users

    def _show(self) -> None:
        # In place, because the step may hold the list.
        self.groups[:] = [group for part in self._parts for group in part.shown]

    def _part(self, group: Group, old: _Split | None) -> _Split | _Merged:
        """Return what stands for one of the user's groups, where possible the split of the last step.

        Args:
            group: the user's group.
            old: how the group in its place was split in the last step; None where it was not.
        """
        update = None if self._compiled else merged_update(self._optimizer, group, self._ratios)
        if update is not None:
            return _Merged(group, update)
        if old is None or not old.still_of(group):
            return _Split(group, _by_ratio(group, self._ratios), self._watched)
        old.follow_user()
        return old

    def _write_back(self, split: _Split) -> None:
        """Carry what the step wrote into its groups over to the user's group.

        Args:
            split: the user's group and those that the step saw in its place.

        Raises:
            RuntimeError: the step wrote the learning rate or the scaled weight decay, or wrote values that differ
                between groups of different ratios.
        """
        written = split.written_by_step()
        if "lr" in written:
            raise incompatible(self._optimizer, "wrote group['lr']")
        if "weight_decay" in written and split.scales_decay:
            raise incompatible(self._optimizer, "wrote group['weight_decay']")
        for key in written:
            first, *others = (shown.get(key, _MISSING) for shown in split.shown)
            if not all(_same(first, other) for other in others):
                deed = f"keeps group[{key!r}], which depends on the learning rate,"
                raise incompatible(self._optimizer, deed)
            _store(split.group, key, first)


class _Split:
    """One of the user's groups, and the groups that a step sees in its place.

    Tensors in the groups of the step are copies, so that a tensor that is written in place (a counter) is written
    once, and is seen to be.

    Args:
        group: the user's group.
        by_ratio: its parameters by their ratio.
        watched: whether to note if the learning rates are read.

    Attributes:
        group: the user's group.
        whole: whether no ratio differs from 1, so that the step sees the user's group itself.
        scales_decay: whether some ratio scales the weight decay.
        shown: the groups that the step sees.
    """

    def __init__(self, group: Group, by_ratio: Mapping[Ratio, list[Tensor]], watched: bool = False) -> None:
        self.group = group
        self.scales_decay = any(isinstance(ratio, Scale) for ratio in by_ratio)
        self.whole = set(by_ratio) <= {1.0}
        self._ratios = list(by_ratio)
        self._params = list(group["params"])
        self.shown = [group]
        if not self.whole:
            self.shown = [self._scaled(ratio, params) for ratio, params in by_ratio.items()]
        self._given = [_Snapshot(shown) for shown in self.shown]
        self._users = _Snapshot(group)
        if watched and not self.whole:
            self.shown = [WatchedGroup(shown) for shown in self.shown]

    def still_of(self, group: Group) -> bool:
        """Return whether this is how `group` is split now too, provided that the ratios are the same.

        Never where the group holds tensors, whose copies are made anew.

        Args:
            group: one of the user's groups, as it is now.
        """
        if group is not self.group or group.keys() != self.shown[0].keys():
            return False
        if any(isinstance(value, Tensor) for value in group.values()):
            return False
        params = group["params"]
        # By identity: tensors compare by value.
        return len(params) == len(self._params) and all(map(is_, params, self._params))

    def follow_user(self) -> None:
        """Hand what the user changed since on to the groups of the step, scaled where it is the lr."""
        if self.whole:
            return
        changed = self._users.changes(self.group) & self.group.keys()
        if not changed:
            return
        for shown, given, ratio in zip(self.shown, self._given, self._ratios, strict=True):
            for key in changed:
                value = self._own(key, self.group[key], ratio)
                shown[key] = value
                given.update(key, value)
        self._users = _Snapshot(self.group)

    def written_by_step(self) -> set[str]:
        """Return the keys of the groups of the step that differ from what the step was given."""
        written: set[str] = set()
        for shown, given in zip(self.shown, self._given, strict=True):
            written |= given.changes(shown)
        return written

    def _scaled(self, ratio: Ratio, params: list[Tensor]) -> Group:
        """Return the group that a step sees in place of the user's, for the parameters of one ratio.

        Args:
            ratio: the ratio.
            params: the parameters of the user's group that have it.
        """
        own = {key: self._own(key, value, ratio) for key, value in self.group.items()}
        return own | {"params": params}

    @staticmethod
    def _own(key: str, value: Any, ratio: Ratio) -> Any:
        """Return the value of one key in a group of the step.

        Args:
            key: the key.
            value: its value in the user's group.
            ratio: the ratio of the parameters in the group of the step.

        Returns:
            The scaled value where the ratio scales it; else the value itself, or a copy of a tensor.
        """
        if key == "lr":
            return value * as_scale(ratio).lr
        if key == "weight_decay" and isinstance(ratio, Scale):
            return value * ratio.decay
        if isinstance(value, Tensor):
            return value.clone()
        return value


class _Merged:
    """One of the user's groups that is updated as a whole, after a step that sees it without parameters."""

    def __init__(self, group: Group, update: Callable[[], None]) -> None:
        self.group = group
        self.shown = [{**group, "params": []}]
        self.update = update

    def follow_user(self) -> None:
        """Do nothing: the update reads the user's group itself."""


class _Snapshot:
    """The values of a group at some time but for its parameters, with the versions of the tensors among them.

    Values are compared by identity: a value that was replaced counts as written even if it is equal.
    """

    def __init__(self, group: Group) -> None:
        self._values = dict(group)
        self._versions: dict[str, int] = {}
        for key, value in group.items():
            if isinstance(value, Tensor):
                self._versions[key] = value._version

    def update(self, key: str, value: Any) -> None:
        """Note a new value.

        Args:
            key: the key that was written.
            value: its value now.
        """
        self._values[key] = value
        self._versions.pop(key, None)
        if isinstance(value, Tensor):
            self._versions[key] = value._version

    def changes(self, group: Group) -> set[str]:
        """Return the keys that were written, added or removed since.

        Args:
            group: the group as it is now.

        Returns:
            The keys; never that of the parameters.
        """
        values = self._values
        same = group.keys() == values.keys() and all(map(is_, group.values(), values.values()))
        if same and not self._versions:
            # Nearly always. It has to be fast: a step has as many groups as there are ratios.
            return set()
        written = group.keys() - values.keys()
        for key, value in values.items():
            if group.get(key, _MISSING) is not value:
                written.add(key)
        for key, version in self._versions.items():
            if values[key]._version != version:
                written.add(key)
        return written - {"params"}


def _by_ratio(group: Group, ratios: Mapping[int, Ratio]) -> dict[Ratio, list[Tensor]]:
    """Return the parameters of a group by their ratio, in the order of the user's.

    Args:
        group: the user's group.
        ratios: ratio of a parameter by its `id`; 1 where there is none.
    """
    by_ratio: dict[Ratio, list[Tensor]] = {}
    for parameter in group["params"]:
        by_ratio.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    return by_ratio


def _store(group: Group, key: str, value: Any) -> None:
    """Set the user's value; a tensor of the user's stays the same tensor.

    Args:
        group: the user's group.
        key: the key that a step wrote into its own groups.
        value: what it wrote; `_MISSING` where it removed the key.
    """
    mine = group.get(key)
    if value is _MISSING:
        group.pop(key, None)
    elif isinstance(mine, Tensor) and isinstance(value, Tensor) and mine.shape == value.shape:
        with torch.no_grad():
            mine.copy_(value)
    else:
        group[key] = value


def _same(first: object, second: object) -> bool:
    """Return whether two values of a group are equal; tensors are if all their entries are."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return not isinstance(first, Tensor) and bool(first == second)
