"""The param groups that a step sees: the user's groups, split by ratio.

`ShownGroups` makes them at the start of a step, and carries over to the user's groups what the step wrote. Each of
the user's groups becomes one part: `_Split`, the groups of its ratios, or `_Merged`, where `foreach_update` moves
all parameters at once. To split a thousand layers takes as long as the step itself, so a split is kept for the
next step while it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from farms_tb.balancing.foreach_update import RULES, merged_update
from farms_tb.balancing.group_values import MISSING, Snapshot, copied, equal, fill, is_container, store
from farms_tb.balancing.optimizer_checks import TORCH_OPTIMIZERS, Group, incompatible
from farms_tb.balancing.targets import Ratio, Scale, as_scale
from farms_tb.balancing.watched_group import WatchedGroup


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
    weight_decay: float | Tensor | None


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
        for ratio, params in _by_ratio(group, ratios).items():
            scale = as_scale(ratio)
            lr, decay = _times(group.get("lr"), scale.lr), _times(group.get("weight_decay"), scale.decay)
            found.append(SplitGroup(index, params, scale.lr, lr, decay))
    return found


def _times(value: Any, factor: float) -> Any:
    """Return a scaled value; None where it is no number, as an lr that the optimizer chooses by itself."""
    return value * factor if isinstance(value, (Real, Tensor)) else None


class ShownGroups:
    """The groups that one step sees.

    Args:
        optimizer: the optimizer that steps.
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none.
        kept: the splits of the last step, with the lists that the optimizer keeps in their groups.
        same_ratios: whether the ratios are those of the last step, so that its splits are used again where they
            still hold.
        compiled: whether the step is compiled. Such a step is torch's own, which the compiler merges by itself.
        watched: whether to note if the learning rates are read.

    Attributes:
        groups: the groups, in the order of the user's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ratios: Mapping[int, Ratio],
        kept: Sequence[_Split | None],
        *,
        same_ratios: bool,
        compiled: bool,
        watched: bool,
    ) -> None:
        self._optimizer, self._ratios = optimizer, ratios
        self._same_ratios, self._compiled, self._watched = same_ratios, compiled, watched
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
            The splits that the next step may use again. Merged groups are none, because they hold gradients.

        Raises:
            RuntimeError: the step did to its groups what cannot be carried over.
        """
        if len(self.groups) != sum(len(part.shown) for part in self._parts):
            raise incompatible(self._optimizer, "added or removed param groups")
        kept: list[_Split | None] = []
        for part in self._parts:
            if isinstance(part, _Merged):
                part.update()
                kept.append(None)
                continue
            if not part.whole and not self._writes_nothing():
                self._write_back(part)
            kept.append(part)
        return kept

    def _writes_nothing(self) -> bool:
        return type(self._optimizer) in TORCH_OPTIMIZERS

    def _users(self) -> list[Group]:
        """Return the user's groups, past the property of the view that shows others in their place."""
        users: list[Group] = self._optimizer.__dict__["param_groups"]
        return users

    def _show(self) -> None:
        # In place, because the step may hold the list.
        self.groups[:] = [group for part in self._parts for group in part.shown]

    def _part(self, group: Group, old: _Split | None) -> _Split | _Merged:
        """Return what stands for one of the user's groups, where possible its split of the last step, `old`."""
        update = None if self._compiled else merged_update(self._optimizer, group, self._ratios)
        if update is not None:
            return _Merged(group, update)
        if old is not None and self._same_ratios and old.still_of(group):
            old.follow_user()
            return old
        by_ratio = _by_ratio(group, self._ratios)
        return _Split(group, by_ratio, old, shares=self._writes_nothing(), watched=self._watched)

    def _write_back(self, split: _Split) -> None:
        """Carry what the step wrote into its groups over to the user's group.

        Raise where it wrote the learning rate or the scaled weight decay, or values that differ between ratios.
        """
        written = split.written_by_step()
        if "lr" in written:
            raise incompatible(self._optimizer, "wrote group['lr']")
        if "weight_decay" in written and split.scales_decay:
            raise incompatible(self._optimizer, "wrote group['weight_decay']")
        for key in written:
            first, *others = (shown.get(key, MISSING) for shown in split.shown)
            if not all(equal(first, other) for other in others):
                deed = f"keeps group[{key!r}], which depends on the learning rate,"
                raise incompatible(self._optimizer, deed)
            store(split.group, key, first)
        split.hand_over_containers(written)


class _Split:
    """One of the user's groups, and the groups that a step sees in its place.

    Tensors in the groups of the step are copies, so that a tensor that is written in place (a counter) is written
    once, and is seen to be. So are lists and dicts. An optimizer may keep in them what follows from the learning
    rate, as RAdam's step sizes, so each ratio has its own, from one step to the next: they belong to the
    parameters.

    Args:
        group: the user's group.
        by_ratio: its parameters by their ratio.
        old: how the group in its place was split in the last step, whose lists and dicts go on; None where it was
            not.
        shares: whether lists and dicts need no copies, because no step writes into them.
        watched: whether to note if the learning rates are read.

    Attributes:
        group: the user's group.
        whole: whether no ratio differs from 1, so that the step sees the user's group itself.
        scales_decay: whether some ratio scales the weight decay.
        shown: the groups that the step sees.
    """

    def __init__(
        self,
        group: Group,
        by_ratio: Mapping[Ratio, list[Tensor]],
        old: _Split | None,
        *,
        shares: bool,
        watched: bool,
    ) -> None:
        self.group = group
        self._shares, self._watched = shares, watched
        self.scales_decay = any(isinstance(ratio, Scale) for ratio in by_ratio)
        self.whole = set(by_ratio) <= {1.0}
        self._ratios = list(by_ratio)
        self._params = list(group["params"])
        # The user's lists and dicts, as the groups of the step had them last.
        self._containers: dict[str, Any] = {}
        self.shown = [group]
        if not self.whole:
            self._note_containers(group.keys())
            self.shown = [self._scaled(ratio, params) for ratio, params in by_ratio.items()]
            if old is not None:
                self._inherit(old)
        self._given = [Snapshot(shown) for shown in self.shown]
        self._users = Snapshot(group)
        if watched and not self.whole:
            self.shown = [WatchedGroup(shown) for shown in self.shown]

    def still_of(self, group: Group) -> bool:
        """Return whether this is how `group` is split now too, provided that the ratios are the same.

        Never where the group holds tensors, whose copies are made anew, nor where it was watched, which makes
        groups slow to read.

        Args:
            group: one of the user's groups, as it is now.
        """
        if self._watched or group is not self.group or group.keys() != self.shown[0].keys():
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
        for key in self._containers.keys() & self.group.keys():
            if not equal(self.group[key], self._containers[key]):
                changed.add(key)
        if not changed:
            return
        self._note_containers(changed)
        for shown, given, ratio in zip(self.shown, self._given, self._ratios, strict=True):
            for key in changed:
                value = self._own(key, self.group[key], ratio)
                shown[key] = value
                given.update(key, value)
        self._users = Snapshot(self.group)

    def written_by_step(self) -> set[str]:
        """Return the keys of the groups of the step that differ from what the step was given."""
        written: set[str] = set()
        for shown, given in zip(self.shown, self._given, strict=True):
            written |= given.changes(shown)
        return written

    def hand_over_containers(self, written: set[str]) -> None:
        """Write into the user's lists and dicts what the step wrote into its own.

        The user gets those of ratio 1, which a step without ratios would have written, or else those of the first
        group. Of a dict, the user gets all entries.

        Args:
            written: keys that have other values than the step was given, which the user has already.
        """
        first = self._ratios.index(1.0) if 1.0 in self._ratios else 0
        ordered = [self.shown[first], *self.shown[:first], *self.shown[first + 1 :]]
        for key in self._containers.keys() - written:
            value = ordered[0][key]
            if isinstance(value, dict):
                value = {name: entry for shown in reversed(ordered) for name, entry in shown[key].items()}
            if not equal(value, self._containers[key]):
                self._containers[key] = copied(value)
                fill(self.group[key], copied(value))

    def _note_containers(self, keys: Iterable[str]) -> None:
        """Note what the user's lists and dicts hold, of those keys whose values are new."""
        for key in keys:
            self._containers.pop(key, None)
            if not self._shares and is_container(key, self.group[key]):
                self._containers[key] = copied(self.group[key])

    def _inherit(self, old: _Split) -> None:
        """Let each group go on with the lists and dicts that the first of its parameters had in the last step.

        Not with those that the user has changed since.
        """
        if not self._containers or old.whole or old.group is not self.group:
            return
        before = {id(parameter): shown for shown in old.shown for parameter in shown["params"]}
        for key, value in self._containers.items():
            if key not in old._containers or not equal(value, old._containers[key]):
                continue
            for shown in self.shown:
                last = before.get(id(shown["params"][0]), self.group)[key]
                if isinstance(value, dict):
                    shown[key].update(copied(last))
                else:
                    shown[key] = copied(last)

    def _scaled(self, ratio: Ratio, params: list[Tensor]) -> Group:
        """Return the group that a step sees in place of the user's, for the parameters of one ratio."""
        own = {key: self._own(key, value, ratio) for key, value in self.group.items()}
        names = own.get("param_names")
        if isinstance(names, list) and len(names) == len(self._params):
            by_id = dict(zip(map(id, self._params), names, strict=True))
            own["param_names"] = [by_id[id(parameter)] for parameter in params]
        return own | {"params": params}

    def _own(self, key: str, value: Any, ratio: Ratio) -> Any:
        """Return what a group of the step has of a user's value: scaled, the value itself, or a copy."""
        if key == "lr":
            return value * as_scale(ratio).lr
        if key == "weight_decay" and isinstance(ratio, Scale):
            return value * ratio.decay
        if isinstance(value, Tensor):
            return value.clone()
        return copied(value) if key in self._containers else value


class _Merged:
    """One of the user's groups that is updated as a whole, after a step that sees it without parameters."""

    def __init__(self, group: Group, update: Callable[[], None]) -> None:
        self.group = group
        self.shown = [{**group, "params": []}]
        self.update = update

    def follow_user(self) -> None:
        """Do nothing: the update reads the user's group itself."""


def _by_ratio(group: Group, ratios: Mapping[int, Ratio]) -> dict[Ratio, list[Tensor]]:
    """Return the parameters of a group by their ratio, in the order of the user's."""
    by_ratio: dict[Ratio, list[Tensor]] = {}
    for parameter in group["params"]:
        by_ratio.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    return by_ratio
