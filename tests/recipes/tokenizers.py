"""Folders with a small tokenizer and a small language model of transformers, as users have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def write_llama(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a LLaMA of one block and width 32 that knows the tokenizer's words, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder
