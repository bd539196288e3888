"""What the `config.json` of a Hugging Face folder tells of the weights alongside it.

Two facts cannot be told by names and shapes: how many experts a mixture has, and whether the language model's head
shares the embedding's weight, of which a file then holds one name. The file is input as any other: whatever is not
of the expected type counts as not said.
"""

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
    "AlbertForMaskedLM": "predictions.decoder",
    "BertForMaskedLM": "cls.predictions.decoder",
    "CamembertForMaskedLM": "lm_head.decoder",
    "DistilBertForMaskedLM": "vocab_projector",
    "ElectraForMaskedLM": "generator_lm_head",
    "ModernBertForMaskedLM": "decoder",
    "MPNetForMaskedLM": "lm_head.decoder",
    "RobertaForMaskedLM": "lm_head.decoder",
    "XLMRobertaForMaskedLM": "lm_head.decoder",
}
"""Names of the heads of language models by architecture."""

_WITH_LM_HEAD = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
"""Ends of the names of other architectures whose head is called `lm_head`."""

_WORD_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "shared", "word_embeddings", "embed_in")

_MAX_SIZE = 10_000_000
"""Bytes of the largest JSON file that is read."""


def facts_of(folder: Path) -> ModelFacts:
    """Return what a folder's `config.json` tells; nothing where there is none, or one that is no JSON object."""
    try:
        config = json_object(folder / "config.json") or {}
    except OSError:
        config = {}
    nested = config.get("text_config")  # A model of several modalities has one for each.
    text = {**config, **nested} if isinstance(nested, dict) else config
    return ModelFacts(_number_of_experts(text), _tied_head(config, text))


def json_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a small JSON file; None where it is no JSON object, or larger than 10 MB.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_SIZE else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _number_of_experts(text: dict[str, Any]) -> int:
    """Return the experts of a mixture by the first of their names; 0 where none is there."""
    numbers = (text.get(name) for name in _EXPERTS)
    return max(0, next((number for number in numbers if isinstance(number, int)), 0))


def _tied_head(config: dict[str, Any], text: dict[str, Any]) -> str:
    """Return the name of the head that shares the embedding's weight; empty where none does."""
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    architectures = config.get("architectures")
    if tied is not True or not isinstance(architectures, list):
        return ""
    names = [name for name in architectures if isinstance(name, str)]
    heads = (_HEADS.get(name, "lm_head" if name.endswith(_WITH_LM_HEAD) else "") for name in names)
    return next(filter(None, heads), "")


def with_tied_head(tensors: Sequence[StoredTensor], head: str) -> list[StoredTensor]:
    """Add the language model's head where only the embedding that it shares its weight with is stored.

    The head, whose name is empty where it has a weight of its own, is a second name of the embedding's weight.
    None is added unless there is exactly one embedding of words.
    """
    found = list(tensors)
    if not head or any(f".{tensor.key}".endswith(f".{head}.weight") for tensor in tensors):
        return found
    embeddings = [tensor for tensor in tensors if _is_word_embedding(tensor)]
    if len(embeddings) == 1:
        shared = embeddings[0]
        found.append(replace(shared, key=f"{head}.weight", siblings={"weight": shared}))
    return found


def _is_word_embedding(tensor: StoredTensor) -> bool:
    """Return whether it is the table of tokens, and not that of positions or token types."""
    module = tensor.path.rpartition(".")[2]
    return tensor.name == "weight" and module in _WORD_EMBEDDINGS
