"""The values of a param group: what a step wrote, whether two are equal, and copies of lists and dicts.

Optimizers keep more in their groups than numbers: counters in tensors, step sizes in lists, whatever by name in
dicts. `split_groups` gives each ratio a group of its own, and needs to know of each value whether the step has
changed it, and how to give it to the user's group without exchanging the user's objects.
"""

from __future__ import annotations

import copy
from collections import deque
from operator import is_
from typing import Any

import torch
from torch import Tensor

from farms_tb.balancing.optimizer_checks import Group

MISSING = object()
"""The value of a key that a group does not have."""
_LISTS = (list, tuple, deque)
_OF_PARAMETERS = ("params", "param_names")
"""Lists in a group with an entry for each of its parameters."""


class Snapshot:
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
        """Note the value that was written under a key."""
        self._values[key] = value
        self._versions.pop(key, None)
        if isinstance(value, Tensor):
            self._versions[key] = value._version

    def changes(self, group: Group) -> set[str]:
        """Return the keys that were written, added or removed since; never that of the parameters."""
        values = self._values
        identical = group.keys() == values.keys() and all(map(is_, group.values(), values.values()))
        if identical and not self._versions:
            # Nearly always. It has to be fast: a step has as many groups as there are ratios.
            return set()
        written = group.keys() - values.keys()
        for key, value in values.items():
            if group.get(key, MISSING) is not value:
                written.add(key)
        for key, version in self._versions.items():
            if values[key]._version != version:
                written.add(key)
        return written.difference(_OF_PARAMETERS)


def store(group: Group, key: str, value: Any) -> None:
    """Set the user's value; a tensor of the user's stays the same tensor.

    Args:
        group: the user's group.
        key: the key that a step wrote into its own groups.
        value: what it wrote; `MISSING` where it removed the key.
    """
    mine = group.get(key)
    if value is MISSING:
        group.pop(key, None)
    elif isinstance(mine, Tensor) and isinstance(value, Tensor) and mine.shape == value.shape:
        with torch.no_grad():
            mine.copy_(value)
    else:
        group[key] = value


def equal(first: object, second: object) -> bool:
    """Return whether two values of a group are equal; tensors, lists and dicts are if all their entries are."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, _LISTS) and isinstance(second, _LISTS):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, Tensor):
        return False
    try:
        return bool(first == second)
    except (TypeError, ValueError, RuntimeError):  # arrays, which compare entry by entry
        return False


def is_container(key: str, value: object) -> bool:
    """Return whether each group of a step needs its own copy of a value: lists, and dicts with names as keys.

    Others, with parameters as keys say, hold what is a parameter's own, and all groups share them.
    """
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value)
    return key not in _OF_PARAMETERS and isinstance(value, (list, deque))


def copied(value: Any) -> Any:
    """Return a copy of a list or dict, of those inside it and of numbers in tensors.

    Objects of other types, and larger tensors, stay the same ones: they may be a model's, or as large.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        return value.clone()
    if not isinstance(value, (list, dict, deque)):
        return value
    own = copy.copy(value)  # of the same class, a defaultdict say
    for key, entry in list(own.items() if isinstance(own, dict) else enumerate(own)):
        own[key] = copied(entry)
    return own


def fill(mine: Any, value: Any) -> None:
    """Give a list or dict of the user's, which stays the same object, the entries of another one."""
    mine.clear()
    if isinstance(mine, dict):
        mine.update(value)
    else:
        mine.extend(value)
