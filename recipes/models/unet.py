"""PDEBench's UNet for fields on a square grid (Ronneberger et al., 2015; Takamoto et al., NeurIPS 2022)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

__all__ = ["UNet"]

LEVELS = 4


def double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions without bias, each followed by BatchNorm and Tanh; keeps (H, W)."""
    layers: dict[str, nn.Module] = {}
    for index, channels in enumerate((in_channels, out_channels), start=1):
        layers[f"conv{index}"] = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(out_channels)
        layers[f"tanh{index}"] = nn.Tanh()
    return nn.Sequential(OrderedDict(layers))


class UNet(nn.Module):
    """Four levels down by max-pooling, four up by 2x2 transposed convolutions, a 1x1 convolution as the head.

    Args:
        in_channels: Channels of the input field.
        out_channels: Channels of the output field.
        width: Features of the first level; they double at each level, to 16 * width at the bottom.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        if min(in_channels, out_channels, width) < 1:
            raise ValueError(f"channels and width must be positive, got {in_channels}, {out_channels} and {width}")
        widths = [width * 2**level for level in range(LEVELS + 1)]
        self.encoders = nn.ModuleList()
        for before, after in zip([in_channels, *widths[: LEVELS - 1]], widths[:LEVELS], strict=True):
            self.encoders.append(double_convolution(before, after))
        self.bottleneck = double_convolution(widths[LEVELS - 1], widths[LEVELS])
        self.decoders = nn.ModuleList()
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            up = nn.ConvTranspose2d(wide, narrow, kernel_size=2, stride=2)
            self.decoders.append(nn.ModuleDict({"up": up, "merge": double_convolution(wide, narrow)}))
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)
        self.pool = nn.MaxPool2d(2)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse grids that four halvings would not map back onto themselves.

        Args:
            shape: (channels, height, width) or (batch, channels, height, width).

        Raises:
            ValueError: Height or width does not divide by 16.
        """
        factor = 2**LEVELS
        if any(side % factor for side in shape[-2:]):
            raise ValueError(
                f"the UNet halves the grid {LEVELS} times, so its sides must divide by {factor}, "
                f"got {tuple(shape[-2:])}; choose another data.resolution"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map fields (B, in_channels, H, W) to (B, out_channels, H, W)."""
        self.check_input(x.shape)
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            x = decoder["merge"](torch.cat([decoder["up"](x), skip], dim=1))  # type: ignore[index]
        return torch.as_tensor(self.head(x))
