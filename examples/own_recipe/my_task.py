"""A model and data of your own in a recipe, from a folder outside of the repository.

In the repository's root:

    PYTHONPATH=examples/own_recipe python -m recipes.train --config-dir examples/own_recipe/conf experiment=mine

Arms, loggers, checkpoints, pictures and the page come from the recipes. The folder conf/ has the settings.
"""

import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Sequential):
    """A small convolutional network. The recipe's task adds loss, metrics and optimizer."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 32) -> None:
        blocks = [nn.Sequential(nn.LazyConv2d(width, 3, padding=1), nn.ReLU()) for _ in range(4)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, out_channels))
        self(torch.zeros(1, in_channels, 8, 8))  # fixes the shapes of the lazy layers


class Data(LightningDataModule):
    """Images of stripes, to be classified as horizontal or vertical."""

    kind, num_classes = "images", 2

    def __init__(self, size: int = 128, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (3, size), generator=generator)
        rows = torch.randn(3, size, 1, 1, 8, generator=generator).expand(-1, -1, 1, 8, 8)
        images = torch.where(labels.view(3, size, 1, 1, 1) == 0, rows, rows.mT)
        parts = [TensorDataset(*part) for part in zip(images, labels, strict=True)]
        self.train_dataloader = lambda: DataLoader(parts[0], batch_size)
        self.val_dataloader = lambda: DataLoader(parts[1], batch_size)
        self.test_dataloader = lambda: DataLoader(parts[2], batch_size)
