"""Perplexity of language models by the protocol of the pruning papers, and its comparison segment by segment.

The protocol (Frantar & Alistarh 2023, Sun et al. 2023, Lu et al. 2024): the lines of the WikiText-2 raw test split
are joined by two newlines and tokenised as a whole; the N tokens are cut into floor(N / length) consecutive
segments without overlap, the tail is dropped; each segment gives the mean negative log likelihood (NLL) of its
length - 1 predictions, and the perplexity is

    exp(mean over segments of NLL).

Two models that read the same segments are compared in pairs: most of the spread between segments is common to
both, since some text is harder than other, and cancels in the difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from farms_tb.options import check_integer
from farms_tb.sparsity.calibration import check_vocabulary, vocabulary_size
from farms_tb.sparsity.evaluating import call_on_copy, evaluating
from farms_tb.sparsity.student import half_width, standard_error
from farms_tb.warnings import warn_once
from farms_tb.weights.layers import unwrap
from farms_tb.weights.names import counted


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        segments: `(segments,)` float64, mean negative log likelihood of the predictions of each segment, in nats.
        length: tokens of a segment.
        text: SHA-256 of the tokens that were read, in hexadecimal digits: what two results must have in common
            to be compared.
    """

    segments: NDArray[np.float64]
    length: int
    text: str

    @property
    def nll(self) -> float:
        """Mean negative log likelihood of a token, in nats: the mean over segments."""
        return float(np.mean(self.segments))

    @property
    def value(self) -> float:
        """The perplexity, exp(nll); infinite where that is beyond float64."""
        return _exp(self.nll)

    @property
    def error(self) -> float:
        """Standard error of the perplexity over segments, NaN for a single one.

        By the delta method: value * standard error of `nll`. Neighbouring segments of one document are alike,
        and are counted as independent here.
        """
        return self.value * standard_error(self.segments)

    @property
    def tokens(self) -> int:
        """Tokens that were read, without the tail that fills no segment."""
        return len(self.segments) * self.length

    def compare(self, other: Perplexity) -> PerplexityComparison:
        """Compare with the perplexity of another model on the same segments, pair by pair.

        Args:
            other: the result that this one is compared with, the dense model's for example.

        Returns:
            The difference, this one minus the other.

        Raises:
            ValueError: the results are of other segments, or of a single one, which has no error.
        """
        if self.length != other.length:
            raise ValueError(
                f"perplexities of segments of length={self.length} and length={other.length} cannot be compared "
                "pair by pair: compute both with the same length"
            )
        if self.text != other.text:
            raise ValueError(
                f"perplexities of other tokens cannot be compared pair by pair: {self.tokens} and {other.tokens} "
                "tokens of different content. Use the same text and the same tokenizer for both models"
            )
        if len(self.segments) < 2:
            raise ValueError(
                "a comparison needs at least two segments, got 1: pass more tokens, or a smaller length"
            )
        return PerplexityComparison(self.segments - other.segments)

    def __str__(self) -> str:
        segments = counted(len(self.segments), "segment")
        return f"{self.value:.4g} ± {self.error:.2g} ({segments} of {self.length} tokens)"


@dataclass(frozen=True, eq=False)
class PerplexityComparison:
    """Difference of two models on the same segments.

    Attributes:
        segments: `(segments,)` float64, difference of the mean negative log likelihoods of each segment, in nats;
            negative where the first model is better.
    """

    segments: NDArray[np.float64]

    @property
    def difference(self) -> float:
        """Mean difference of the negative log likelihoods of a token, in nats."""
        return float(np.mean(self.segments))

    @property
    def error(self) -> float:
        """Standard error of `difference` over segments."""
        return standard_error(self.segments)

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % for `difference`, by Student's t distribution."""
        half = half_width(self.segments)
        return self.difference - half, self.difference + half

    @property
    def ratio(self) -> float:
        """Perplexity of the first model divided by that of the second, exp(difference)."""
        return _exp(self.difference)

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """Interval of 95 % for `ratio`: exp of `interval`."""
        low, high = self.interval
        return _exp(low), _exp(high)

    def __str__(self) -> str:
        low, high = self.ratio_interval
        return (
            f"perplexity times {self.ratio:.4g} (95 %: {low:.4g} to {high:.4g}), "
            f"{self.difference:+.4f} ± {self.error:.4f} nats a token"
        )


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    length: int = 2048,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Compute the perplexity of a causal language model by the protocol of the pruning papers.

    Args:
        model: called as `model(input_ids=ids)` with ids int64 `(segments, length)`; returns logits
            `(segments, length, vocabulary)` or an object with such `logits`. It runs in evaluation mode, without
            gradients; its modes are put back.
        tokens: ids of the whole text, integers `(N,)` or `(1, N)`, from a tokenizer.
        length: tokens of a segment. The papers use 2048; some tables for Llama 2 use 4096, which gives lower
            values.
        batch_size: segments of one call. The value does not depend on it but for rounding.
        progress: called after each batch with the number of segments done and of all.

    Returns:
        The perplexity with the mean negative log likelihood of each segment. Logits of lower precision are
        converted to float32 first, sums are float64.

    Raises:
        TypeError: `tokens` are no integers.
        ValueError: there are fewer than `length` tokens, a token is outside of the model's vocabulary, the model
            has fewer positions than `length`, or returns no such logits.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids):
        ...         return torch.zeros(*input_ids.shape, 50)
        >>> result = perplexity(Uniform(), torch.arange(50), length=20)
        >>> round(result.value, 4), len(result.segments), result.tokens
        (50.0, 2, 40)
    """
    check_integer("length", length, at_least=2)
    check_integer("batch_size", batch_size, at_least=1)
    segments = _segments(tokens, length)
    check_vocabulary("tokens", segments, vocabulary_size(model))
    _check_positions(model, length)
    losses: list[float] = []
    with evaluating(model):
        for start in range(0, len(segments), batch_size):
            losses += _losses(model, segments[start : start + batch_size])
            if progress is not None:
                progress(len(losses), len(segments))
    values = np.array(losses, dtype=np.float64)
    if np.isnan(values).any():
        warn_once(f"{int(np.isnan(values).sum())} of {len(values)} segments have logits that are NaN", model)
    return Perplexity(values, length, hashlib.sha256(segments.numpy().tobytes()).hexdigest())


def _segments(tokens: Tensor | Sequence[int], length: int) -> Tensor:
    """Cut a text into segments, int64 `(segments, length)` on the CPU; the tail that fills none is dropped."""
    ids = torch.as_tensor(tokens).detach().cpu()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {ids.dtype}: pass the ids of a tokenizer")
    if ids.ndim != 1 and not (ids.ndim == 2 and len(ids) == 1):
        raise ValueError(
            f"tokens must have the shape (N,) or (1, N), got {tuple(ids.shape)}: tokenise the text as a whole, "
            "and join tokens that come in parts"
        )
    ids = ids.flatten().to(torch.int64)
    number = len(ids) // length
    if number == 0:
        raise ValueError(
            f"tokens are too few: {len(ids)} for segments of length={length}. Pass a longer text, or a "
            "smaller length"
        )
    return ids[: number * length].reshape(number, length)


def _check_positions(model: nn.Module, length: int) -> None:
    """Refuse segments that are longer than a model of `transformers` has positions."""
    config = getattr(unwrap(model), "config", None)
    # A model of text and images has the positions of its text in a part of its configuration.
    if (text_config := getattr(config, "get_text_config", None)) is not None:
        config = text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise ValueError(
            f"length={length} is more than the {positions} positions of {type(unwrap(model)).__name__}: pass "
            f"length={positions} or less"
        )


def _losses(model: nn.Module, ids: Tensor) -> list[float]:
    """Return the mean negative log likelihood of each of some segments, ids `(segments, length)`."""
    parameter = next(model.parameters(), None)
    device = ids.device if parameter is None else parameter.device
    output = call_on_copy(model, {"input_ids": ids.to(device)})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{type(model).__name__} returned no logits of shape (segments, length, vocabulary) for input_ids of "
            f"shape {tuple(ids.shape)}: perplexity needs a causal language model, with its head"
        )
    targets = ids[:, 1:].to(logits.device)
    # One segment at a time: its logits in float32 are a gigabyte where a vocabulary has 128 000 tokens.
    each = [
        functional.cross_entropy(of_one[:-1].float(), target, reduction="none").double().mean()
        for of_one, target in zip(logits, targets, strict=True)
    ]
    return [float(loss) for loss in each]


def _exp(value: float) -> float:
    """Return the exponential function, infinite beyond float64."""
    return math.inf if value > 709 else math.exp(value)
