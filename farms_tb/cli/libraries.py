"""Models of torchvision and timm by their names there.

Neither library is needed: what is not installed is not searched. An unknown name is answered by similar ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

from torch import nn

__all__ = ["LIBRARIES", "model_by_name", "model_of_library"]

LIBRARIES = ("torchvision", "timm")


def model_by_name(name: str, pretrained: bool) -> nn.Module:
    """Return the model of this name in the first installed library that knows it.

    Args:
        name: as the library lists it.
        pretrained: load the library's weights, which may download them.

    Returns:
        The model, with random weights unless `pretrained`.

    Raises:
        ValueError: no installed library knows it; the message names similar ones.
    """
    installed = [library for library in LIBRARIES if find_spec(library)]
    for library in installed:
        if name in _names(library):
            return model_of_library(library, name, pretrained)
    searched = f"{' and '.join(installed)} know no model" if installed else "neither torchvision nor timm is here"
    raise ValueError(f"{name!r} is no file, and {searched} of this name{_similar(name, installed)}")


def model_of_library(library: str, name: str, pretrained: bool) -> nn.Module:
    """Return a model of one library.

    Args:
        library: one of `LIBRARIES`.
        name: as the library lists it; timm's may end in a tag that says which weights are meant.
        pretrained: load the library's weights, which may download them.

    Raises:
        ImportError: the library is not installed.
        ValueError: it knows no such model, or cannot make it.
    """
    if not find_spec(library):
        raise ImportError(f"{library}:{name} needs {library}: pip install {library}")
    if name.partition(".")[0] not in _names(library):
        raise ValueError(f"{library} knows no model {name!r}{_similar(name, [library])}")
    make = _from_torchvision if library == "torchvision" else _from_timm
    try:
        return make(name, pretrained)
    except Exception as error:
        raise ValueError(f"{library} cannot make {name!r}: {type(error).__name__}: {error}") from error


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None)
    return model


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def _names(library: str) -> list[str]:
    """Return the names of all models of an installed library."""
    module = "torchvision.models" if library == "torchvision" else "timm"
    names: list[str] = importlib.import_module(module).list_models()
    return names


def _similar(name: str, libraries: Iterable[str]) -> str:
    """Return a question that names the most similar models; nothing where none is similar."""
    known: dict[str, None] = {}
    for library in libraries:
        known.update(dict.fromkeys(_names(library)))
    found = get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""
