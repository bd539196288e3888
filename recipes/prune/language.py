"""Language models in folders of transformers, scored by their perplexity on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farms_tb.sparsity import perplexity
from farms_tb.sparsity.calibration import calibration_batches, tokens_of_text, tokens_of_texts
from farms_tb.sparsity.transformers_models import load_config, load_model, load_tokenizer
from recipes.errors import RecipeError
from recipes.prune.scores import Score

__all__ = ["LanguageTask"]

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class LanguageTask:
    """A causal language model with its tokenizer, and texts. Nothing is downloaded.

    Args:
        model: `path` of the folder, `dtype` of the weights.
        calibration: `path` of a text or `documents`, `number` of sequences and their `length` in tokens.
        evaluation: the same; `number` counts segments, None for all.

    Raises:
        RecipeError: the model or the text to evaluate is missing, or the type is unknown.
        ValueError: the folder holds no such model or tokenizer, or a text is empty.
    """

    has_loss = True
    """Whether the model gives a loss for a batch of calibration data, by which `method="search"` goes."""

    def __init__(
        self, model: Mapping[str, Any], calibration: Mapping[str, Any], evaluation: Mapping[str, Any]
    ) -> None:
        if model["path"] is None:
            raise RecipeError(
                "model.path is missing: pass a folder of a model of transformers, with its tokenizer"
            )
        if model["dtype"] not in _TYPES:
            raise RecipeError(f"model.dtype must be one of {', '.join(_TYPES)}, got {model['dtype']!r}")
        self._folder, self._dtype = Path(model["path"]), _TYPES[model["dtype"]]
        if not self._folder.is_dir():
            raise RecipeError(f"model.path={self._folder} is not a folder")
        self._config = load_config(self._folder)
        self._tokenizer = load_tokenizer(self._folder)
        self._calibration, self._length = calibration, evaluation["length"]
        tokens = self._tokens("evaluation", evaluation)
        number = evaluation["number"]
        self._text = tokens if number is None else tokens[: number * self._length]

    def load(self) -> nn.Module:
        """Return the model, read anew, in evaluation mode and on the CPU."""
        return load_model(self._folder, self._config, self._dtype)

    def batches(self, seed: int) -> list[dict[str, Tensor]]:
        """Return sequences of the calibration text, each a batch, drawn by a seed.

        Raises:
            RecipeError: there is no text.
            ValueError: it is too short for one sequence.
        """
        tokens = self._tokens("calibration", self._calibration)
        number, length = self._calibration["number"], self._calibration["length"]
        return calibration_batches(tokens, number=number, length=length, seed=seed)

    def score(self, model: nn.Module) -> Score:
        """Return the perplexity on the evaluation text, by the protocol of the papers."""
        found = perplexity(model, self._text, self._length)
        return Score("perplexity", found.value, found.error, found.segments)

    def _tokens(self, section: str, text: Mapping[str, Any]) -> Tensor:
        """Tokenise the text that a section of the settings names."""
        if text["path"] is not None:
            return tokens_of_text(text["path"], self._tokenizer)
        if text["documents"] is not None:
            return tokens_of_texts(text["documents"], self._tokenizer, section)
        raise RecipeError(f"{section}.path is missing: pass a text file in UTF-8")
