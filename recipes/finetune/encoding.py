"""What the heads of all kinds have in common: how texts become tokens, and what encoded examples are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.finetune.reading import Row

__all__ = ["Encoded", "Scores", "Tokens"]

Scores = dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """How texts become tokens.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        length: most tokens of an input; what is longer is cut, or read in windows where spans are looked for.
    """

    tokenizer: Any
    length: int

    def __call__(self, rows: Sequence[Row], text: str, pair: str, **options: Any) -> Any:
        """Return the tokens of examples.

        Args:
            rows: the examples.
            text: what is read of each; names of columns in braces.
            pair: the second text, likewise; empty for none.
            **options: more options of the tokenizer.
        """
        texts = [text.format(**row).strip() for row in rows]
        pairs = [pair.format(**row) for row in rows] if pair else None
        return self.tokenizer(texts, pairs, max_length=self.length, **options)


@dataclass(frozen=True)
class Encoded:
    """Examples as a network reads them.

    Attributes:
        features: one dict of inputs each; a long text may have several.
        score: takes the predictions for `features`, with labels, and returns scores by name.
    """

    features: list[dict[str, Any]]
    score: Callable[[Any], Scores]
