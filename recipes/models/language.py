"""Language models: small ones with random weights, on tokens or bytes, and trained ones to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import RecipeError
from recipes.real import smollm2_folder

__all__ = ["ByteLlama", "Llama", "Pretrained"]

INITIAL_STD = 0.02
"""Standard deviation of all initial matrices."""


class Llama(nn.Module):
    """transformers' LLaMA: the blocks of today's language models, with random weights.

    Args:
        vocabulary: Tokens that the model knows.
        width: Features of a token.
        hidden: Features inside of the gated feed-forward part.
        depth: Blocks.
        heads: Attention heads; divides `width`.
        length: Longest input.
    """

    def __init__(self, vocabulary: int, width: int, hidden: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=length,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            initializer_range=INITIAL_STD,
        )
        self.llama = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, length, vocabulary) of the token after each of the tokens (B, length)."""
        logits: Tensor = self.llama(tokens).logits
        return logits


class ByteLlama(Llama):
    """A LLaMA on bytes, at the size of a CPU.

    Args:
        width: Features of a byte.
        hidden: Features inside of the gated feed-forward part.
        depth: Blocks.
        heads: Attention heads; divides `width`.
        length: Longest input.
        embedding_std: Standard deviation of the embedding's initial entries; transformers' is 0.02. The random
            numbers are the same for any.

    Raises:
        ValueError: `embedding_std` is not positive.
    """

    def __init__(
        self,
        width: int = 128,
        hidden: int = 344,
        depth: int = 4,
        heads: int = 4,
        length: int = 512,
        embedding_std: float = INITIAL_STD,
    ) -> None:
        if embedding_std <= 0:
            raise ValueError(f"model.net.embedding_std must be positive, got {embedding_std}")
        super().__init__(256, width, hidden, depth, heads, length)
        embedding: Any = self.llama.get_input_embeddings()
        with torch.no_grad():
            embedding.weight.mul_(embedding_std / INITIAL_STD)


class Pretrained(nn.Module):
    """A trained causal language model of transformers, whose training goes on.

    Args:
        vocabulary: Tokens of the data; at most as many as the model knows.
        path: Folder of the model, as `model.save_pretrained` writes it; `"smollm2"` for SmolLM2-135M, which
            `make real` brings. Nothing is downloaded.

    Raises:
        RecipeError: There is no such model, or it knows fewer tokens.
    """

    def __init__(self, vocabulary: int, path: str = "smollm2") -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        folder = smollm2_folder() if path == "smollm2" else Path(path)
        if not folder.is_dir():
            raise RecipeError(
                f"model.net.path={path} is no folder: pass one with a model of transformers, as "
                "model.save_pretrained(FOLDER) writes it; nothing is downloaded"
            )
        try:
            network: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.net.path={path} holds no causal language model: {error}") from error
        known = network.config.vocab_size
        if known < vocabulary:
            raise RecipeError(
                f"model.net.path={path} knows {known} tokens, fewer than data.vocabulary={vocabulary}; set "
                f"data.vocabulary={known}, and data.tokenizer to the tokenizer of that model"
            )
        # In float32, whatever the files have: small steps would be rounded away in bfloat16.
        self.network: nn.Module = network.float().train()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, length, vocabulary) of the token after each of the tokens (B, length)."""
        logits: Tensor = self.network(tokens, use_cache=False).logits
        return logits
