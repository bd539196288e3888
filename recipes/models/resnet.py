"""ResNet-18 and ResNet-34 for small images (He et al., 2016), from torchvision's BasicBlock."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from recipes.models.initial_weights import init_convolutions

__all__ = ["DEPTHS", "SmallImageResNet"]

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class SmallImageResNet(nn.Module):
    """A ResNet with a 3x3 stride-1 stem and no max-pool; parameter names are torchvision's.

    Args:
        depth: 18 or 34.
        in_channels: Channels of the images.
        out_channels: Classes.
        width: Features of the first stage (64 in the papers); they double at each of the four stages.

    Raises:
        ValueError: There is no ResNet of this depth here, or the width is not positive.
    """

    def __init__(self, depth: int = 18, in_channels: int = 3, out_channels: int = 10, width: int = 64) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"model.net.depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        if width < 1:
            raise ValueError(f"model.net.width must be positive, got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        before = width
        for index, blocks in enumerate(DEPTHS[depth]):
            after = width * 2**index
            stride = 1 if index == 0 else 2
            self.add_module(f"layer{index + 1}", _stage(before, after, blocks, stride))
            before = after
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, out_channels)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_channels, H, W) to logits (B, out_channels)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return torch.as_tensor(self.fc(self.avgpool(x).flatten(1)))


def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    """Return the blocks of a stage; the first one changes channels and grid, and its shortcut with it.

    Args:
        before: Channels that come in.
        after: Channels that go out.
        blocks: Number of blocks.
        stride: Of the first block; 2 halves the grid.
    """
    shortcut = None
    if stride != 1 or before != after:
        projection = nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(after))
    first = BasicBlock(before, after, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))
