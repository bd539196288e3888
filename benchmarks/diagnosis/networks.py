"""Small networks for 8x8 digits, with layers of many shapes: a CNN, an MLP and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "TinyTransformer", "cnn", "mlp"]

CLASSES, PIXELS = 10, 64

_CHANNELS = (16, 16, 32, 32, 64, 64, 32, 64, 64)
"""Of each convolution of the CNN."""
_UNITS = (128, 128, 64, 256, 64, 128, 128)
"""Of each hidden layer of the MLP."""
_WIDTH, _BLOCKS, _HEADS = 64, 2, 4
"""Of the transformer: width of a token, blocks, attention heads of each."""


def cnn() -> nn.Module:
    """Return convolutions with BatchNorm, of which the seventh is 1x1, and two poolings."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for position, (inputs, outputs) in enumerate(pairwise([1, *_CHANNELS])):
        size = 1 if position == 6 else 3
        layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        if position in (3, 7):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_CHANNELS[-1], CLASSES))


def mlp() -> nn.Module:
    """Return linear layers with BatchNorm."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([PIXELS, *_UNITS]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(_UNITS[-1], CLASSES))


class _Block(nn.Module):
    """Self-attention and a feed-forward network of four times the width, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, width) to tokens."""
        normed = self.attention_norm(x)
        # (B, heads, T, width of a head)
        query, key, value = (
            part(normed).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class TinyTransformer(nn.Module):
    """A vision transformer: 16 patches of 2x2 pixels, the mean of the tokens classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, _WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(16, _WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 64) to logits (B, 10)."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        tokens = self.blocks(self.embed(patches) + self.position)
        return torch.as_tensor(self.head(self.norm(tokens).mean(dim=1)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "MLP": mlp, "transformer": TinyTransformer}
