"""A tokenizer of `transformers` made here, and texts for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sparsity.models import VOCABULARY


def tokenizer() -> Any:
    """Return a fast tokenizer whose words are `w00`, `w01`, ...: the number is the id; id 1 begins each text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number:02d}": number for number in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w00"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing("w01 $A", "w01 $A $B", [("w01", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="w01", eos_token="w02", unk_token="w00", pad_token="w02"
    )


def words(number: int, seed: int = 0) -> str:
    """Return a text of so many words, drawn at random."""
    drawn = torch.randint(3, VOCABULARY, (number,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{index:02d}" for index in drawn.tolist())
