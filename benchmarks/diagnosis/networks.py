"""Small networks for 8x8 digits, with layers of many shapes: a CNN, an MLP and a transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "TinyTransformer", "cnn", "mlp"]

CLASSES, PIXELS = 10, 64


def cnn(widths: Sequence[int] = (16, 16, 32, 32, 64, 64, 32, 64, 64)) -> nn.Module:
    """Return convolutions with BatchNorm, of which the seventh is 1x1, and two poolings.

    Args:
        widths: channels of each convolution.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for position, (inputs, outputs) in enumerate(pairwise([1, *widths])):
        size = 1 if position == 6 else 3
        layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        if position in (3, 7):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


def mlp(widths: Sequence[int] = (128, 128, 64, 256, 64, 128, 128)) -> nn.Module:
    """Return linear layers with BatchNorm.

    Args:
        widths: units of each hidden layer.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([PIXELS, *widths]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class _Block(nn.Module):
    """Self-attention and a feed-forward network of four times the width, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, width) to tokens."""
        normed = self.attention_norm(x)
        # (B, heads, T, width of a head)
        query, key, value = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class TinyTransformer(nn.Module):
    """A vision transformer: 16 patches of 2x2 pixels, the mean of the tokens classified.

    Args:
        width: of a token.
        blocks: number of blocks.
        heads: attention heads of each.
    """

    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 64) to logits (B, 10)."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        tokens = self.blocks(self.embed(patches) + self.position)
        return torch.as_tensor(self.head(self.norm(tokens).mean(dim=1)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "MLP": mlp, "transformer": TinyTransformer}
