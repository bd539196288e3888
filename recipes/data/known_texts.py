"""Texts that are at hand under a name: Wikipedia's articles of `make real`, and Python's own modules."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from recipes.real import wikipedia

__all__ = ["KNOWN_TEXTS"]


def _wikipedia() -> list[str]:
    """Return the articles of the English Wikipedia that `make real` brings, 2.3 MB.

    Raises:
        RecipeError: They are not there, or are others.
    """
    return wikipedia("calibration") + wikipedia("evaluation")


def _python() -> list[str]:
    """Return the public modules of the standard library that are one file each, about 4 MB.

    They are those of the running Python, and so differ a little between its versions.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    return [file.read_bytes().decode() for file in files]


KNOWN_TEXTS: dict[str, Callable[[], list[str]]] = {"wikipedia": _wikipedia, "python": _python}
"""Functions that return the documents of a text, by its name. A file or folder of that name is `./python`."""
