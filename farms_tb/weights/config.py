"""What the `config.json` of a Hugging Face folder tells of the weights alongside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from farms_tb.weights.stored import ModelFacts, StoredTensor

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_HEADS = {
    "WhisperForConditionalGeneration": "proj_out",
    "BertForMaskedLM": "cls.predictions.decoder",
    "ForConditionalGeneration": "lm_head",
    "ForCausalLM": "lm_head",
    "LMHeadModel": "lm_head",
}
"""Names of the heads of language models by the ends of their architectures' names."""

_MAX_SIZE = 10_000_000


def facts_of(folder: Path) -> ModelFacts:
    """Read a folder's `config.json`; nothing is known where there is none, or one that is no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size < _MAX_SIZE else {}
    except (OSError, ValueError, RecursionError):
        return ModelFacts()
    if not isinstance(config, dict):
        return ModelFacts()
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config
    number = next((text[name] for name in _EXPERTS if isinstance(text.get(name), int)), 0)
    return ModelFacts(max(number, 0), _tied_head(config, text))


def _tied_head(config: dict[str, Any], text: dict[str, Any]) -> str:
    """Return the name of the head that shares the embedding's weight; empty where none does."""
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is not True:
        return ""
    return next((head for end, head in _HEADS.items() if any(name.endswith(end) for name in names)), "")


def with_tied_head(tensors: Sequence[StoredTensor], head: str) -> list[StoredTensor]:
    """Add the language model's head where only the embedding that it shares its weight with is stored.

    Args:
        tensors: the tensors of the model.
        head: the head's name; empty where it has a weight of its own.
    """
    if not head or any(tensor.path.endswith(head) for tensor in tensors):
        return list(tensors)
    words = [tensor for tensor in tensors if tensor.name == "weight" and _is_word_embedding(tensor)]
    if len(words) != 1:
        return list(tensors)
    shared = words[0]
    return [*tensors, replace(shared, key=f"{head}.weight", siblings={"weight": shared})]


def _is_word_embedding(tensor: StoredTensor) -> bool:
    return tensor.path.rpartition(".")[2] in ("embed_tokens", "wte", "shared", "word_embeddings", "embed_in")
