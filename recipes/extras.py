"""Which extra of the project brings a package that is missing."""

from __future__ import annotations

from collections.abc import Mapping

from farms_tb.missing import missing_package

__all__ = ["extra_of"]

_EXTRAS: Mapping[str, str] = {
    "accelerate": "transformers",
    "datasets": "datasets",
    "gguf": "gguf",
    "peft": "finetune",
    "pytorch_optimizer": "baselines",
    "ray": "cluster",
    "timm": "baselines",
    "transformers": "transformers",
}


def extra_of(error: BaseException) -> str:
    """Return the extra with the package that an import did not find, or `recipes`, which has most packages.

    Args:
        error: The error, or one that it is the cause of.
    """
    cause: BaseException | None = error
    while cause is not None:
        if missing_package(cause) in _EXTRAS:
            return _EXTRAS[missing_package(cause)]
        cause = cause.__cause__
    return "recipes"
