"""The warnings of the balancing callback, kept apart from those of the libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["callback_warnings"]

_RECIPES = Path(__file__).parents[1]


@contextmanager
def callback_warnings() -> Iterator[list[str]]:
    """Show no warning, and collect those of the balancing callback.

    Its warnings are plain `UserWarning`s that point at the caller of the trainer, which is a line of the recipes.
    Those of the trainers themselves point into a library, or are of a class of their own.

    Yields:
        A list that has the messages once the block has ended.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [
        str(warning.message)
        for warning in caught
        if warning.category is UserWarning and _RECIPES in Path(warning.filename).parents
    ]
