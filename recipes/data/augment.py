"""Random crops and flips of a whole batch at once, on whatever device the batch lies."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

__all__ = ["crop_and_flip", "draw_crops"]


@lru_cache(maxsize=1)  # asked for by every batch of an epoch
def draw_crops(count: int, padding: int, seed: int) -> torch.Tensor:
    """Draw what happens to each of `count` images.

    Args:
        count: Number of images.
        padding: Black pixels that `crop_and_flip` puts around the image.
        seed: Seed of the draws.

    Returns:
        int64 (count, 3): top and left edge of the crop, each uniform in [0, 2 * padding], and 1 for a mirrored
        image, else 0.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    return torch.cat([corners, torch.randint(2, (count, 1), generator=generator)], dim=1)


def crop_and_flip(images: torch.Tensor, crops: torch.Tensor, padding: int) -> torch.Tensor:
    """Pad with zeros, cut a window of the old size out, and mirror it where asked to.

    The same as torchvision's RandomCrop(side, padding) and RandomHorizontalFlip for the same draws.

    Args:
        images: (B, C, H, W), any dtype.
        crops: int64 (B, 3) on the same device, as `draw_crops` makes them.
        padding: Pixels on each side.

    Returns:
        (B, C, H, W), of the same dtype.
    """
    height, width = images.shape[-2:]
    windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    top, left, mirrored = crops.unbind(1)
    cropped = windows[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], cropped.flip(-1), cropped)
