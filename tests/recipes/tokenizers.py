"""A folder with a small tokenizer of transformers, as users have one."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = 60
"""Words that the tokenizer knows: `w00`, `w01`, ...; the number is the id."""

UNKNOWN, END = 0, 1


def write_tokenizer(folder: Path, *, eos: bool = True) -> Path:
    """Save a tokenizer that reads other words as `w00`; its end-of-text token, where it has one, is `w01`."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number:02d}": number for number in range(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=f"w{UNKNOWN:02d}"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": f"w{UNKNOWN:02d}", **({"eos_token": f"w{END:02d}"} if eos else {})}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder
