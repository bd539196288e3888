"""Models and tokenizers of `transformers` from a folder; nothing is downloaded, and no code of the folder runs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farms_tb.missing import cannot_import
from farms_tb.printable import printable
from farms_tb.weights.names import first_few


def _transformers() -> Any:
    """Import the library, without its messages and progress bars."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except Exception as error:  # what a broken installation raises is anything
        remedy = 'pip install "farms-tb[transformers]", or prune by magnitude without them'
        raise ImportError(cannot_import("pruning with calibration data", error, remedy)) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_config(folder: Path) -> Any:
    """Read the `config.json` of a model.

    Raises:
        ImportError: transformers is not installed.
        ValueError: it is not there, or names no model that the installed transformers knows.
    """
    library = _transformers()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, which says how to build the model: pass the folder of a model of "
            "transformers, or prune by magnitude without --calibration"
        )
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"transformers cannot read {folder}/config.json: {_shortened(error)}") from error
    _check_takes_tokens(_architecture(library, config, folder), config)
    return config


def _check_takes_tokens(cls: Any, config: Any) -> None:
    """Refuse a model that cannot be run on the ids of tokens alone."""
    takes_ids = "input_ids" in inspect.signature(cls.forward).parameters
    if not takes_ids or config.is_encoder_decoder:
        raise ValueError(
            f"{cls.__name__} does not run on token ids alone, as calibration from a file needs: load the model "
            "yourself and use farms_tb.sparsity.prune with batches of its inputs"
        )


def _architecture(library: Any, config: Any, folder: Path) -> Any:
    """Return the class that a configuration names."""
    names = config.architectures or [None]
    found = getattr(library, names[0], None) if names[0] else None
    if found is None:
        raise ValueError(
            f"{folder}/config.json names the architecture {names[0]!r}, which transformers {library.__version__} "
            "does not have: load the model yourself and use farms_tb.sparsity.prune in Python"
        )
    return found


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    """Load a model.

    Args:
        folder: where it is.
        config: from `load_config`.
        dtype: type of its weights.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: it cannot be built, or the folder lacks some of its weights.
    """
    library = _transformers()
    cls = _architecture(library, config, folder)
    of_type = {"dtype" if hasattr(config, "dtype") else "torch_dtype": dtype}  # until 4.55
    try:
        model, found = cls.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, **of_type
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"transformers cannot load {folder}: {_shortened(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks weights of {cls.__name__}: {first_few(missing, 3)}. They would be random: is the "
            "architecture in config.json the right one?"
        )
    loaded: nn.Module = model.eval()
    return loaded


def load_tokenizer(folder: Path) -> Callable[..., Any]:
    """Load the tokenizer of a model.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is none.
    """
    library = _transformers()
    try:
        tokenizer: Callable[..., Any] = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load ({_shortened(error)}): pass token ids "
            "instead, a .pt or .safetensors file of integers"
        ) from error
    return tokenizer


def vocabulary_of(config: Any) -> int | None:
    """Return the size of a model's vocabulary; None where its configuration does not say."""
    return _text_value(config, "vocab_size")


def context_length(config: Any) -> int | None:
    """Return how many tokens a model was made for at most; None where its configuration does not say."""
    return _text_value(config, "max_position_embeddings")


def _text_value(config: Any, name: str) -> int | None:
    """Return a positive integer of the configuration of a model, or of its language model."""
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) and value > 0 else None


def _shortened(error: BaseException) -> str:
    """Return the beginning of what an error says, on one line."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__
