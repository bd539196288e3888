"""The networks and the settings of the recipes that are measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from recipes.config import CONFIG_DIR, build
from recipes.models.resnet import SmallImageResNet
from recipes.models.unet import UNet
from recipes.models.vgg import SmallImageVGG
from recipes.models.wrn import WideResNet

CLASSES = 100


def settings(*overrides: str) -> DictConfig:
    """Return the settings of `python -m recipes.train` with these overrides."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("train", overrides=list(overrides))


def vit() -> nn.Module:
    """Return ViT-B/16, with random weights."""
    from torchvision.models import vit_b_16

    model = vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zero otherwise, which has no spectrum
    return model  # type: ignore[no-any-return]


def fno() -> nn.Module:
    """Return neuraloperator's FNO in PDEBench's size, whose Fourier layers are complex."""
    model: nn.Module = build(settings("experiment=darcy_fno"), "model.net")
    return model


def heavy_tailed(model: nn.Module) -> nn.Module:
    """Give the weights spectra like those of a trained network: a power law over several decades.

    Random weights have none, and are easier to solve: single precision is enough for them.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                channels = weight.shape[1]
                scale = 1 / (torch.arange(channels) + 1.0)
                weight *= scale[torch.randperm(channels)].view(-1, *[1] * (weight.ndim - 2))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: SmallImageResNet(18, out_channels=CLASSES),
    "ResNet-18, heavy tails": lambda: heavy_tailed(SmallImageResNet(18, out_channels=CLASSES)),
    "ResNet-34": lambda: SmallImageResNet(34, out_channels=CLASSES),
    "VGG-16": lambda: SmallImageVGG(16, out_channels=CLASSES),
    "VGG-16, heavy tails": lambda: heavy_tailed(SmallImageVGG(16, out_channels=CLASSES)),
    "VGG-19": lambda: SmallImageVGG(19, out_channels=CLASSES),
    "WRN-28-10": lambda: WideResNet(28, 10, out_channels=CLASSES),
    "UNet": lambda: UNet(in_channels=1, out_channels=1, width=32),
    "UNet, heavy tails": lambda: heavy_tailed(UNet(in_channels=1, out_channels=1, width=32)),
    "FNO": fno,
    "FNO, heavy tails": lambda: heavy_tailed(fno()),
    "ViT-B/16": vit,
}
"""Image networks as for CIFAR-100, PDE networks in PDEBench's sizes."""
