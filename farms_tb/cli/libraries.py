"""Models of torchvision and timm by their names there.

Neither library is needed: what is not installed is not searched. An unknown name is answered by similar ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from torch import nn

from farms_tb.missing import cannot_import

__all__ = ["LIBRARIES", "model_by_name", "model_of_library"]

LIBRARIES = ("torchvision", "timm")
_NO_LIBRARY = "there is no torchvision or timm here to look for a model of this name: pip install torchvision"


def model_by_name(name: str, pretrained: bool) -> nn.Module:
    """Return the model of this name in the first installed library that knows it.

    Its weights are random unless `pretrained`, which may download them.

    Raises:
        ValueError: no installed library knows it; the message names similar ones.
    """
    searched, failed = [], ""
    for library in filter(find_spec, LIBRARIES):
        try:
            known = _models_of(library).list_models()
        except ImportError as error:
            failed += f"; {error}"
            continue
        if name in known:
            return model_of_library(library, name, pretrained)
        searched.append(library)
    if searched:
        knows = f"{' and '.join(searched)} know no model of this name{_similar(name, searched)}"
    else:
        knows = "it cannot be looked up as the name of a model" if failed else _NO_LIBRARY
    raise ValueError(f"{name!r} is no file, and {knows}{failed}")


def model_of_library(library: str, name: str, pretrained: bool) -> nn.Module:
    """Return a model of one library.

    Args:
        library: one of `LIBRARIES`.
        name: as the library lists it; timm's may end in a tag that says which weights are meant.
        pretrained: load the library's weights, which may download them.

    Raises:
        ImportError: the library is not installed, or fails when it is imported.
        ValueError: it knows no such model, or cannot make it.
    """
    if name.partition(".")[0] not in _models_of(library).list_models():
        raise ValueError(f"{library} knows no model {name!r}{_similar(name, [library])}")
    try:
        model: nn.Module
        if library == "torchvision":
            model = _models_of(library).get_model(name, weights="DEFAULT" if pretrained else None)
        else:
            model = _models_of(library).create_model(name, pretrained=pretrained)
    except Exception as error:
        raise ValueError(f"{library} cannot make {name!r}: {type(error).__name__}: {error}") from error
    return model


def _models_of(library: str) -> Any:
    """Return the module of a library's models, which lists and makes them by name.

    Raises:
        ImportError: it is not installed, or fails when it is imported.
    """
    try:
        return importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except Exception as error:  # of a torchvision for another torch: RuntimeError
        raise ImportError(cannot_import(f"a model of {library}", error, f"pip install {library}")) from error


def _similar(name: str, libraries: Iterable[str]) -> str:
    """Return a question that names the most similar models; nothing where none is similar."""
    known = dict.fromkeys(name for library in libraries for name in _models_of(library).list_models())
    found = get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""
