"""Shows every option on the API pages: an extension of griffe, which reads the code for mkdocstrings.

Entry points are written with `**options`; the decorator `farms_tb.keywords.takes_options` puts the options in its
place when the package is imported. griffe reads the code without importing it, so the same is done here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
DECORATOR = "takes_options"
MODULES = ("farms_tb.options", "farms_tb.sparsity.options")
"""Where the dataclasses of options are."""


class Options(griffe.Extension):
    """Replaces `**options` by the fields of the dataclasses that the decorator names."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Expand the options of a function."""
        classes = _classes(func)
        if classes:
            _expand_signature(func, classes)
            _expand_docstring(func, classes)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Expand the options of a class: the signature is that of `__init__`, the docstring its own."""
        classes = _classes(cls)
        if classes:
            _expand_signature(cls.members["__init__"], classes)
            _expand_docstring(cls, classes)


def _classes(decorated: griffe.Function | griffe.Class) -> list[griffe.Class]:
    """Return the dataclasses of options that the decorator names; none without the decorator."""
    for decorator in decorated.decorators:
        name, *arguments = str(decorator.value).rstrip(")").replace("(", ", ").split(", ")
        if name == DECORATOR:
            return [_options(argument) for argument in arguments]
    return []


@cache
def _options(name: str) -> griffe.Class:
    """Return a dataclass of options by its name, read without this extension."""
    for path in MODULES:
        found = griffe.load(path, search_paths=[ROOT]).members.get(name)
        if isinstance(found, griffe.Class):
            return found
    raise KeyError(f"none of {', '.join(MODULES)} has a class {name}")


def _expand_signature(function: Any, classes: list[griffe.Class]) -> None:
    """Put the fields in the place of `**options`."""
    kept = [one for one in function.parameters if one.kind is not griffe.ParameterKind.var_keyword]
    fields = [field for cls in classes for field in _fields(cls)]
    function.parameters = griffe.Parameters(*kept, *fields)


def _fields(cls: griffe.Class) -> list[griffe.Parameter]:
    """Return the fields of a dataclass as keyword-only parameters."""
    return [
        griffe.Parameter(
            name,
            annotation=attribute.annotation,
            kind=griffe.ParameterKind.keyword_only,
            default=attribute.value,
        )
        for name, attribute in cls.attributes.items()
        if attribute.annotation is not None
    ]


def _expand_docstring(documented: griffe.Function | griffe.Class, classes: list[griffe.Class]) -> None:
    """Add what the dataclasses say of their fields to the end of the section Args."""
    assert documented.docstring is not None
    lines = documented.docstring.value.splitlines()
    begin = lines.index("Args:")
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    described = [line for cls in classes for line in _described(cls)]
    documented.docstring.value = "\n".join([*lines[:end], *described, *lines[end:]])


def _described(cls: griffe.Class) -> list[str]:
    """Return the lines of the section Attributes of a dataclass's docstring."""
    assert cls.docstring is not None
    lines = cls.docstring.value.splitlines()
    begin = lines.index("Attributes:") + 1
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    return lines[begin:end]
