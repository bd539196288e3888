"""PDEBench's UNet for fields on a regular grid (Ronneberger et al., 2015; Takamoto et al., NeurIPS 2022)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["UNet"]

LEVELS = 4

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


def double_convolution(in_channels: int, out_channels: int, dimension: int = 2) -> nn.Sequential:
    """Return two convolutions of width 3 without bias, each followed by BatchNorm and Tanh; they keep the grid.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels between the two, and of the output.
        dimension: Dimensions of space, 1 or 2.
    """
    layers: dict[str, nn.Module] = {}
    for index, channels in enumerate((in_channels, out_channels), start=1):
        layers[f"conv{index}"] = CONVOLUTIONS[dimension](
            channels, out_channels, kernel_size=3, padding=1, bias=False
        )
        layers[f"norm{index}"] = NORMS[dimension](out_channels)
        layers[f"tanh{index}"] = nn.Tanh()
    return nn.Sequential(OrderedDict(layers))


class UNet(nn.Module):
    """Four levels down by max-pooling, four up by transposed convolutions of width 2, a head of width 1.

    Args:
        in_channels: Channels of the input field.
        out_channels: Channels of the output field.
        width: Features of the first level; they double at each level, to 16 * width at the bottom.
        dimension: Dimensions of space, 1 or 2.

    Raises:
        ValueError: A size is not positive, or there is no UNet of this dimension.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, width: int = 32, dimension: int = 2) -> None:
        super().__init__()
        if min(in_channels, out_channels, width) < 1:
            raise ValueError(f"channels and width must be positive, got {in_channels}, {out_channels} and {width}")
        if dimension not in CONVOLUTIONS:
            raise ValueError(f"dimension must be 1 or 2, got {dimension}")
        self.in_channels = in_channels
        self.dimension = dimension
        widths = [width * 2**level for level in range(LEVELS + 1)]
        self.encoders = nn.ModuleList()
        for before, after in zip([in_channels, *widths[: LEVELS - 1]], widths[:LEVELS], strict=True):
            self.encoders.append(double_convolution(before, after, dimension))
        self.bottleneck = double_convolution(widths[LEVELS - 1], widths[LEVELS], dimension)
        self.decoders = nn.ModuleList()
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            up = TRANSPOSED[dimension](wide, narrow, kernel_size=2, stride=2)
            self.decoders.append(nn.ModuleDict({"up": up, "merge": double_convolution(wide, narrow, dimension)}))
        self.head = CONVOLUTIONS[dimension](width, out_channels, kernel_size=1)
        self.pool = POOLS[dimension](2)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse grids that four halvings would not map back onto themselves.

        Args:
            shape: (channels, *space).

        Raises:
            ValueError: The dimension is another, or a side does not divide by 16.
        """
        factor, space = 2**LEVELS, tuple(shape[1:])
        if len(space) != self.dimension:
            raise ValueError(
                f"this UNet takes fields in {self.dimension}D, (channels, *space), got shape {tuple(shape)}; "
                "choose the model for the data"
            )
        if any(side % factor for side in space):
            raise ValueError(
                f"the UNet halves the grid {LEVELS} times, so its sides must divide by {factor}, got {space}; "
                "choose another resolution under data"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map fields (B, in_channels, *space) to (B, out_channels, *space)."""
        self.check_input(x.shape[1:])
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            x = decoder["merge"](torch.cat([decoder["up"](x), skip], dim=1))  # type: ignore[index]
        return torch.as_tensor(self.head(x))
