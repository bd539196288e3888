"""Tiny models, plans and calibration data for the tests of pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb.sparsity import PlannedLayer, SparsityPlan
from farms_tb.weights.blocks import blocks_of
from farms_tb.weights.layers import find_layers

VOCABULARY = 97
LEFT_OUT = ("lm_head", "embed", "classifier", "pooler", "conv1", "fc", "projection")
"""What the papers do not prune: embeddings, heads and the first convolution."""


def plan_of(model: nn.Module, sparsity: float = 0.6, step: float = 0.03) -> SparsityPlan:
    """Plan another sparsity for each of five layers in turn."""
    layers = [layer for layer in find_layers(model) if layer.shape and not layer.problem]
    layers = [layer for layer in layers if layer.name.rpartition(".")[2] not in LEFT_OUT]
    blocks = blocks_of({layer.name: layer.shape for layer in layers})
    planned = {}
    for place, layer in enumerate(layers):
        share = sparsity + step * (place % 5 - 2)
        planned[layer.name] = PlannedLayer(
            math.prod(layer.shape), share, blocks.get(layer.name, ""), shape=layer.shape
        )
    return SparsityPlan(planned, sparsity, "alpha", granularity="matrix")


def uniform_plan(model: nn.Module, sparsity: float) -> SparsityPlan:
    """Plan one sparsity for all layers."""
    return plan_of(model, sparsity, step=0.0)


def llama(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **options})).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    return transformers.BertModel(config).eval()


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(1)
    return transformers.T5ForConditionalGeneration(config).eval()


def gemma() -> nn.Module:
    """A decoder whose blocks get one of two masks, with windows or without."""
    transformers = pytest.importorskip("transformers", minversion="4.50")
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    return transformers.Gemma3ForCausalLM(config).eval()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    torch.manual_seed(1)
    return transformers.ViTForImageClassification(config).eval()


class Residual(nn.Module):
    """A block of a ResNet that writes into its input."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.before = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding="same", padding_mode="reflect", dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sub_(0.1)
        return x + self.second(self.first(self.before(x)).relu())


class TinyResNet(nn.Module):
    """Convolutions of several kinds, a change between two blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Residual(16), Residual(16, groups=4), Residual(16)])
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.blocks[1](self.blocks[0](x))
        x = x.mul_(1.1)
        return self.fc(self.blocks[2](x).mean((2, 3)))


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return TinyResNet().eval()


def token_batches(number: int = 3, sequences: int = 2, length: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    size = (sequences, length)
    return [{"input_ids": torch.randint(VOCABULARY, size, generator=generator)} for _ in range(number)]


def image_batches(name: str, size: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{name: torch.randn(3, 3, size, size, generator=generator)} for _ in range(2)]


def padded_batches() -> list[dict[str, torch.Tensor]]:
    """Batches of one shape, of which the model drops one mask and keeps the other."""
    batches = token_batches(2)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 15:] = 0
    masks = [torch.ones_like(mask), mask]
    return [{**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]


def t5_batches() -> list[dict[str, torch.Tensor]]:
    return [{**batch, "labels": batch["input_ids"][:, :9].clone()} for batch in token_batches()]


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, torch.Tensor]]]]] = {
    "llama": (llama, token_batches),
    "gemma": (gemma, token_batches),
    "gpt2": (gpt2, token_batches),
    "bert": (bert, padded_batches),
    "t5": (t5, t5_batches),
    "vit": (vit, lambda: image_batches("pixel_values")),
    "resnet": (resnet, lambda: image_batches("x")),
}
