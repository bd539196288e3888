"""Train a small network on scikit-learn's digits, with another learning rate for one of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.data.digits import DigitsData

__all__ = ["Digits", "Settings", "digits", "error", "train"]

TEST_IMAGES = 500


@dataclass(frozen=True)
class Digits:
    """Images `(N, 64)`, float32, and labels `(N,)`, int64, to train and to test."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Settings:
    """How a network is trained: mini-batches of 64 and a cosine schedule.

    Attributes:
        steps: of the optimizer.
        optimizer: `"SGD"`, with momentum 0.9, or `"AdamW"`.
        lr: learning rate at the start.
        weight_decay: the optimizer's.
        lr_factors: by name of the layer, what the learning rate of its weight is multiplied by; 0 freezes it.
    """

    steps: int = 600
    optimizer: str = "SGD"
    lr: float = 0.1
    weight_decay: float = 5e-4
    lr_factors: Mapping[str, float] = field(default_factory=dict)


def digits(train_size: int, seed: int, label_noise: float = 0.0) -> Digits:
    """Return digits to train and to test.

    Args:
        train_size: training images.
        seed: which images, and whose labels are wrong.
        label_noise: share of the training images that get a label drawn at random.
    """
    data = DigitsData(train_size, 10, TEST_IMAGES, seed=seed)
    data.setup("fit")
    images, labels = data.datasets["train"].tensors
    test_images, test_labels = data.datasets["test"].tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(labels.shape, generator=generator) < label_noise
    drawn = torch.randint(10, labels.shape, generator=generator)
    return Digits(images.flatten(1), torch.where(wrong, drawn, labels), test_images.flatten(1), test_labels)


def train(net: nn.Module, data: Digits, settings: Settings, seed: int) -> None:
    """Train a network in place, by cross-entropy.

    Args:
        net: maps images `(B, 64)` to logits `(B, 10)`.
        data: the digits.
        settings: how.
        seed: of the order of the images.
    """
    optimizer = _optimizer(net, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(settings.steps):
        chosen = torch.randint(len(data.labels), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(net(data.images[chosen]), data.labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def _optimizer(net: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer, with a param group for each layer that has a factor."""
    weights = {name: net.get_parameter(f"{name}.weight") for name in settings.lr_factors}
    apart = {id(weight) for weight in weights.values()}
    groups = [{"params": [parameter for parameter in net.parameters() if id(parameter) not in apart]}]
    for name, weight in weights.items():
        groups.append({"params": [weight], "lr": settings.lr * settings.lr_factors[name]})  # type: ignore[dict-item]
    if settings.optimizer == "SGD":
        return torch.optim.SGD(groups, settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, settings.lr, weight_decay=settings.weight_decay)


@torch.no_grad()
def error(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network gets wrong."""
    return 1 - float((net(images).argmax(1) == labels).float().mean())
