"""VGG-16 and VGG-19 with BatchNorm for small images (Simonyan and Zisserman, 2015), from torchvision's layers."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from recipes.models.initial_weights import init_convolutions

__all__ = ["DEPTHS", "SmallImageVGG"]

DEPTHS = {16: "D", 19: "E"}
HALVINGS = 5  # max-pools, one after every stage


class SmallImageVGG(nn.Module):
    """VGG's convolutions, then one Linear layer.

    Args:
        depth: 16 or 19.
        in_channels: Channels of the images.
        out_channels: Classes.
        width: Features of the first stage (64 in the papers), a multiple of 8; the last stage has 8 * width.
        halvings: Max-pools to keep, the first ones of 5. Images of 8x8 pixels allow 3.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        depth: int = 16,
        in_channels: int = 3,
        out_channels: int = 10,
        width: int = 64,
        halvings: int = HALVINGS,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"model.net.depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        if width < 8 or width % 8:
            raise ValueError(f"model.net.width must be a positive multiple of 8, got {width}")
        if not 0 <= halvings <= HALVINGS:
            raise ValueError(f"model.net.halvings must be from 0 to {HALVINGS}, got {halvings}")
        self.halvings = halvings
        plan = _plan(depth, width, halvings)
        self.features = make_layers(plan, batch_norm=True)  # type: ignore[arg-type]
        if in_channels != 3:
            self.features[0] = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, out_channels)
        init_convolutions(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse images that the halvings would make empty.

        Args:
            shape: (channels, height, width) or (batch, channels, height, width).

        Raises:
            ValueError: A side is below 2 ** halvings.
        """
        if min(shape[-2:]) < 2**self.halvings:
            raise ValueError(
                f"VGG halves the image {self.halvings} times and needs sides of at least {2**self.halvings}, "
                f"got {tuple(shape[-2:])}; with data=digits set data.image_size=32"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_channels, H, W) to logits (B, out_channels)."""
        self.check_input(x.shape)
        return torch.as_tensor(self.classifier(self.avgpool(self.features(x)).flatten(1)))


def _plan(depth: int, width: int, halvings: int) -> list[str | int]:
    """Return torchvision's plan of the layers for another width: features of each convolution, "M" for a pool."""
    plan: list[str | int] = []
    pools = 0
    for step in cfgs[DEPTHS[depth]]:
        if step != "M":
            plan.append(int(step) * width // 64)
        elif pools < halvings:
            plan.append("M")
            pools += 1
    return plan
