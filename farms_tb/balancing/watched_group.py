"""A param group that tells whether a step has read its learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


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
