"""Calibration data: from text to batches, and what is checked before they are used.

Calibration data are, everywhere in this package, an iterable of batches, and a batch is a dict of keyword
arguments for the model. Nothing here reads from a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farms_tb.options import check_integer
from farms_tb.weights.layers import unwrap

__all__ = [
    "calibration_batches",
    "check_vocabulary",
    "checked_batches",
    "random_tokens",
    "tokens_of_text",
    "vocabulary_size",
]

Batch = Mapping[str, Any]


def tokens_of_text(path: str | PathLike[str], tokenizer: Callable[..., Any]) -> Tensor:
    """Tokenise a text file as a whole, as the papers do with WikiText-2.

    Args:
        path: a text file in UTF-8.
        tokenizer: of `transformers`, or any function from a text to an object or a dict with `input_ids`.

    Returns:
        The ids, int64 `(tokens,)`; special tokens at the start come once.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text in UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    ids = torch.as_tensor(tokenizer(text)["input_ids"], dtype=torch.int64).flatten()
    if len(ids) == 0:
        raise ValueError(f"{path} is empty: expected text for calibration")
    return ids


def random_tokens(vocabulary: int, number: int, seed: int = 0) -> Tensor:
    """Draw tokens at random, for a trial without text. What a model does with them says little of its real inputs.

    Args:
        vocabulary: size of the model's vocabulary, see `vocabulary_size`.
        number: tokens to draw.
        seed: of the draw.

    Returns:
        The ids, int64 `(number,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (number,), generator=generator)


def calibration_batches(
    tokens: Tensor, *, number: int = 128, length: int = 2048, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Cut a long sequence of tokens into calibration batches of one sequence each.

    The text is cut into consecutive sequences without overlap, of which `number` are chosen at random. The papers
    use 128 sequences of 2048 tokens.

    Args:
        tokens: ids `(tokens,)`, see `tokens_of_text`.
        number: sequences; all there are where the text is shorter.
        length: tokens of a sequence.
        seed: of the choice.

    Returns:
        Batches `{"input_ids": (1, length)}`.

    Raises:
        ValueError: there are fewer than `length` tokens.

    Example:
        >>> batches = calibration_batches(torch.arange(100), number=2, length=10)
        >>> [batch["input_ids"].shape for batch in batches]
        [torch.Size([1, 10]), torch.Size([1, 10])]
    """
    check_integer("number", number, at_least=1)
    check_integer("length", length, at_least=1)
    available = len(tokens) // length
    if available == 0:
        raise ValueError(
            f"calibration is too short: {len(tokens)} tokens for sequences of length={length}. Pass a longer "
            "text, or a smaller length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:number].sort().values.tolist()
    return [{"input_ids": tokens[place * length : (place + 1) * length][None]} for place in chosen]


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens a model's embedding has; None where it has none or does not say.

    Args:
        model: a model of `transformers`, or any with a method `get_input_embeddings`.
    """
    get: Callable[[], Any] | None = getattr(unwrap(model), "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:  # a model of transformers without any
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def checked_batches(model: nn.Module, calibration: Iterable[Batch] | None, *, required: bool) -> Sequence[Batch]:
    """Return calibration data as a list, after a check that the model can take them.

    Args:
        model: the model.
        calibration: batches; None for none.
        required: whether there must be some.

    Returns:
        The batches; an empty list where there are none.

    Raises:
        TypeError: a batch is no dict.
        ValueError: data are required and missing, or ids are outside of the model's vocabulary.
    """
    batches = [] if calibration is None else list(calibration)
    if required and not batches:
        raise ValueError(
            "calibration is empty: this method needs the inputs of each layer. Pass an iterable of dicts of "
            "keyword arguments for the model, [{'input_ids': ids}, ...], or use method='magnitude'"
        )
    size = vocabulary_size(model)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"calibration must be an iterable of dicts of keyword arguments for the model, got a batch of "
                f"type {type(batch).__name__}; for a model that takes one tensor x, wrap it: {{'x': tensor}}"
            )
        check_vocabulary(batch.get("input_ids"), size)
    return batches


def check_vocabulary(ids: Any, size: int | None) -> None:
    """Refuse ids that the model's embedding does not have.

    Raises:
        ValueError: there is one, or there is none at all.
    """
    if not isinstance(ids, Tensor):
        return
    if ids.numel() == 0:
        raise ValueError("calibration is too short: a batch has no tokens")
    smallest, largest = (int(value) for value in ids.aminmax())
    if size is not None and not 0 <= smallest <= largest < size:
        wrong = largest if largest >= size else smallest
        raise ValueError(
            f"calibration has the token {wrong}, and the model's vocabulary is 0 to {size - 1}: was the text "
            "tokenised for another model?"
        )
