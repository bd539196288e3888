"""Which extra of the project brings a package that is missing."""

from __future__ import annotations

from collections.abc import Mapping

from farms_tb.missing import missing_package

__all__ = ["extra_of", "remedy"]

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "baselines": ("pytorch_optimizer", "timm"),
    "cluster": ("ray",),
    "datasets": ("datasets",),
    "finetune": ("peft",),
    "gguf": ("gguf",),
    "recipes": (
        *("PIL", "filelock", "h5py", "hydra", "matplotlib", "neuralop", "omegaconf", "rich", "scipy", "sklearn"),
        *("threadpoolctl", "tltorch", "torchvision", "wandb", "yaml"),
    ),
    "safetensors": ("safetensors",),
    "transformers": ("accelerate", "transformers"),
}
"""The packages that the recipes need, as they are imported, by the extra that brings them."""
_EXTRAS = {package: extra for extra, packages in _PACKAGES.items() for package in packages}


def extra_of(error: BaseException) -> str:
    """Return the extra with the package that an import did not find; empty where no extra brings it.

    Args:
        error: The error, or one that it is the cause of.
    """
    cause: BaseException | None = error
    while cause is not None:
        if missing_package(cause) in _EXTRAS:
            return _EXTRAS[missing_package(cause)]
        cause = cause.__cause__
    return ""


def remedy(error: BaseException) -> str:
    """Return the end of a message, after a semicolon, that says which extra to install; empty for any other error.

    Args:
        error: The error, or one that it is the cause of. A package that is installed and fails, and one that no
            extra brings, are not helped by any.
    """
    extra = extra_of(error)
    return f"; pip install 'farms-tb[{extra}]'" if extra else ""
