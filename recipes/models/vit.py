"""A vision transformer for small images (Dosovitskiy et al., ICLR 2021), from torchvision's class."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import VisionTransformer

__all__ = ["SmallImageViT"]


class SmallImageViT(VisionTransformer):  # type: ignore[misc]
    """torchvision's vision transformer, with any number of input channels; its MLPs are `4 * width` wide.

    Args:
        image_size: Side of the images, pixels.
        in_channels: Channels of the images.
        out_channels: Classes.
        patch_size: Side of a patch, pixels; divides `image_size`.
        width: Features of a token.
        depth: Blocks.
        heads: Attention heads; divides `width`.

    Raises:
        ValueError: A size does not divide the other.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 10,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(f"model.net.patch_size must divide the image's {image_size} pixels, got {patch_size}")
        if width % heads:
            raise ValueError(f"model.net.heads must divide model.net.width={width}, got {heads}")
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            num_layers=depth,
            num_heads=heads,
            hidden_dim=width,
            mlp_dim=4 * width,
            num_classes=out_channels,
        )
        if in_channels != 3:
            self.conv_proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
            deviation = (in_channels * patch_size**2) ** -0.5  # as torchvision's, of which this takes the place
            nn.init.trunc_normal_(self.conv_proj.weight, std=deviation)
            nn.init.zeros_(torch.as_tensor(self.conv_proj.bias))

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse images of another size: the network has one position embedding for each patch.

        Args:
            shape: (channels, height, width).

        Raises:
            ValueError: A side is not `image_size`.
        """
        if tuple(shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"this vision transformer takes images of {self.image_size}x{self.image_size} pixels, got "
                f"{tuple(shape[-2:])}; set model.net.image_size"
            )
