"""Multilayer perceptrons for small images, with initial weights of any size."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

__all__ = ["ScaledMLP"]


class ScaledMLP(nn.Module):
    """Linear layers of one width with ReLU between them, whose initial parameters are multiplied by a number.

    With large initial weights a network can fit its training images long before it generalises (Liu, Michaud and
    Tegmark, Omnigrok, ICLR 2023, arXiv 2210.01117).

    Args:
        in_features: Values of one image.
        out_channels: Classes.
        width: Units of each hidden layer.
        depth: Linear layers, the last one included.
        init_scale: What PyTorch's initial weights and biases are multiplied by.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_features: int = 64,
        out_channels: int = 10,
        width: int = 200,
        depth: int = 3,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(width, depth) < 1:
            raise ValueError(f"model.net.width and depth must be at least 1, got {width} and {depth}")
        if not init_scale > 0:
            raise ValueError(f"model.net.init_scale must be above 0, got {init_scale}")
        self.in_features = in_features
        widths = [in_features, *[width] * (depth - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= init_scale

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse images of another number of values.

        Args:
            shape: (channels, height, width).

        Raises:
            ValueError: The number of values is not `in_features`.
        """
        values = torch.Size(shape).numel()
        if values != self.in_features:
            raise ValueError(f"model.net.in_features is {self.in_features}, got images {shape} of {values} values")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, C, H, W) to logits (B, out_channels)."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return torch.as_tensor(self.layers[-1](x))
