"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016): WRN-16-8, WRN-28-6 and their like."""

from __future__ import annotations

import torch
from torch import nn

from recipes.models.initial_weights import init_convolutions

__all__ = ["WideResNet"]

STEM_WIDTH = 16


class WideResNet(nn.Module):
    """A pre-activation ResNet of three stages, k times as wide as He et al.'s for CIFAR; no dropout.

    Args:
        depth: Convolutions along the network, 6n + 4; n blocks a stage.
        widen: The factor k.
        in_channels: Channels of the images.
        out_channels: Classes.
        width: Features of the first stage before widening (16 in the paper); they double at each stage.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        depth: int = 16,
        widen: int = 8,
        in_channels: int = 3,
        out_channels: int = 10,
        width: int = STEM_WIDTH,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"model.net.depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}")
        if widen < 1 or width < 1:
            raise ValueError(f"model.net.widen and width must be positive, got {widen} and {width}")
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        before = width
        for index in range(3):
            after = widen * width * 2**index
            stride = 1 if index == 0 else 2
            self.add_module(f"layer{index + 1}", _stage(before, after, depth // 6, stride))
            before = after
        self.bn = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, out_channels)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_channels, H, W) to logits (B, out_channels)."""
        x = self.conv1(x)
        for index in range(3):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return torch.as_tensor(self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1)))


class WideBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice, around a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, before, H, W) to (B, after, H / stride, W / stride)."""
        activated = self.relu(self.bn1(x))
        skipped = x if self.shortcut is None else self.shortcut(activated)
        return torch.as_tensor(skipped + self.conv2(self.relu(self.bn2(self.conv1(activated)))))


def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    """Return the blocks of a stage; the first one changes channels and grid.

    Args:
        before: Channels that come in.
        after: Channels that go out.
        blocks: Number of blocks.
        stride: Of the first block; 2 halves the grid.
    """
    first = WideBlock(before, after, stride)
    others = [WideBlock(after, after, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)
