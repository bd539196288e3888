"""The models that are pruned, with the texts to calibrate and to judge them on: needs `make real`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.intervals import Array
from farms_tb.sparsity.perplexity import perplexity
from farms_tb.sparsity.search import model_loss
from recipes.real import minilm_folder, smollm2_folder, wikipedia

__all__ = ["SUBJECTS", "Calibration", "Embedding", "Subject", "encoder", "language_model"]

Batch = Mapping[str, Tensor]
_PRUNE, _HELD_BACK = 8, 8  # batches
_LANGUAGE_LENGTH, _ENCODER_LENGTH = 256, 64  # tokens of a segment and of a calibration sequence


@dataclass(frozen=True)
class Calibration:
    """Batches of one calibration seed, that do not overlap.

    Attributes:
        prune: what Wanda and SparseGPT see, one sequence each.
        choose: what a search chooses by, and what epsilon is chosen by.
        confirm: what the winner of a search is confirmed by.
    """

    prune: Sequence[Batch]
    choose: Sequence[Batch]
    confirm: Sequence[Batch]

    @property
    def for_search(self) -> list[Batch]:
        """All batches in the order in which `method="search"` deals them: two to prune for each of the others.

        The sequences to prune with are cut in halves, so that there are as many.
        """
        halves = [{"input_ids": half} for batch in self.prune for half in batch["input_ids"].chunk(2, dim=1)]
        dealt: list[Batch] = []
        for place, (choose, confirm) in enumerate(zip(self.choose, self.confirm, strict=True)):
            dealt += [halves[2 * place], choose, halves[2 * place + 1], confirm]
        return dealt


@dataclass(frozen=True)
class Subject:
    """A model and its texts.

    Attributes:
        model: the dense model, in evaluation mode.
        tokens: of the calibration text, `(tokens,)`.
        length: tokens of a sequence.
        losses: returns the loss of a model on each segment of the evaluation text, `(segments,)`.
    """

    model: nn.Module
    tokens: Tensor
    length: int
    losses: Callable[[nn.Module], Array]

    def calibration(self, seed: int, sequences: int = 1) -> Calibration:
        """Draw sequences of the calibration text, without overlap.

        Args:
            seed: of the draw.
            sequences: in each of the batches to choose and to confirm by.
        """
        number = len(self.tokens) // self.length
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
        drawn = self.tokens[: number * self.length].view(number, self.length)[order]
        pruning = [{"input_ids": ids} for ids in drawn[:_PRUNE].split(1)]
        held_back = [{"input_ids": ids} for ids in drawn[_PRUNE:].split(sequences)]
        return Calibration(pruning, held_back[:_HELD_BACK], held_back[_HELD_BACK : 2 * _HELD_BACK])


def language_model() -> Subject:
    """Return SmolLM2-135M-Instruct in bfloat16; a segment is the start of an article of the evaluation half."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    evaluation = _beginnings(tokenizer, _LANGUAGE_LENGTH)

    def losses(pruned: nn.Module) -> Array:
        return perplexity(pruned, evaluation, length=_LANGUAGE_LENGTH).segments

    tokens = _tokens(tokenizer, "\n\n".join(wikipedia("calibration")))
    return Subject(model.eval(), tokens, _LANGUAGE_LENGTH, losses)


class Embedding(nn.Module):
    """An encoder of sentences, and how far its vectors are from those of the dense model.

    Args:
        encoder: a BERT; the vector of a sequence is the mean of its tokens' outputs, normalised.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._dense = (deepcopy(encoder),)  # in a tuple, so that it is no module of this one and stays dense
        self._vectors: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Return `loss`: 1 - the mean cosine of vectors of sequences `(N, T)` with the dense model's."""
        key = input_ids.numpy().tobytes()
        if key not in self._vectors:
            with torch.no_grad():
                self._vectors[key] = _sentence_vectors(self._dense[0], input_ids)
        vectors = _sentence_vectors(self.encoder, input_ids)
        return SimpleNamespace(loss=1 - (vectors * self._vectors[key]).sum(-1).mean())


def _sentence_vectors(encoder: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the vectors of sequences `(N, T)` without padding, `(N, width)`."""
    outputs = encoder(input_ids=input_ids).last_hidden_state.mean(1)
    return nn.functional.normalize(outputs, dim=-1)


def encoder() -> Subject:
    """Return all-MiniLM-L6-v2; a segment is the start of an article of the evaluation half."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = Embedding(AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()
    beginnings = _beginnings(tokenizer, _ENCODER_LENGTH).view(-1, _ENCODER_LENGTH)
    segments = [{"input_ids": ids[None]} for ids in beginnings]
    tokens = _tokens(tokenizer, "\n\n".join(wikipedia("calibration")))

    def losses(pruned: nn.Module) -> Array:
        with torch.no_grad():
            return np.array([model_loss(pruned, segment) for segment in segments])

    return Subject(model, tokens, _ENCODER_LENGTH, losses)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"language": language_model, "encoder": encoder}


def _beginnings(tokenizer: Any, length: int) -> Tensor:
    """Return the first tokens of each article of the evaluation half, `(articles * length,)`."""
    return torch.cat([_tokens(tokenizer, article)[:length] for article in wikipedia("evaluation")])


def _tokens(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text, `(tokens,)`, without any that mark its beginning or end."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
