"""The trained models, as folders that transformers' `from_pretrained` reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from farms_tb.missing import cannot_import
from recipes.errors import RecipeError
from recipes.real.files import FILES, REAL, checked

__all__ = ["check_packages", "minilm_folder", "smollm2_folder"]


def _converted() -> Path:
    """Return the folder of the converted model, which is made anew when another file is pinned."""
    return REAL / f"smollm2-135m-{FILES['smollm2'].sha256[:8]}"


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2: a BERT of 6 blocks, width 384, 22.7M parameters in float32.

    `AutoModel.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` load it. The vector of a
    sentence is the mean of its tokens' outputs, normalised; `pooler.dense` takes no part in it.

    Raises:
        RecipeError: the files are not there, or are others.
    """
    for name in ("minilm settings", "minilm tokenizer"):
        checked(name)
    return checked("minilm weights").parent


def smollm2_folder() -> Path:
    """Return a folder of SmolLM2-135M-Instruct: a LLaMA of 30 blocks, width 576, 134.5M parameters in float32.

    `AutoModelForCausalLM.from_pretrained(folder)` gives a plain `LlamaForCausalLM`. Its weights were published
    with 4 bits each (Q4_1, blocks of 32); the folder holds the values that those stand for. The first call
    converts the published file, in about half a minute, and needs 540 MB of disk.

    Raises:
        RecipeError: the file is not there or is another, or transformers or gguf is not installed.
    """
    folder, file = _converted(), checked("smollm2")
    with FileLock(REAL / ".smollm2.lock"):
        if not folder.exists():
            _convert(file, folder)
    return folder


def check_packages() -> None:
    """Check that what converts SmolLM2 can be imported, unless that is done.

    Raises:
        RecipeError: transformers or gguf is not installed, or fails when it is imported.
    """
    if _converted().exists():
        return
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise RecipeError(cannot_import("SmolLM2", error, "pip install 'farms-tb[transformers,gguf]'")) from error


def _convert(file: Path, folder: Path) -> None:
    """Save a model of quantised weights as plain float32; the folder gets its name once it is whole."""
    check_packages()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    # transformers refuses to save a model that was loaded from quantised weights, even after dequantising them.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(part)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.save_pretrained(part)
    part.replace(folder)
