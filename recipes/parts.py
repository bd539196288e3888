"""The parts that training and studies have in common: data, model and the balancing callback."""

from __future__ import annotations

from dataclasses import dataclass

from lightning import Callback, LightningDataModule, LightningModule, seed_everything
from omegaconf import DictConfig

from recipes.config import build, build_balancer, check_combination, check_optimizer

__all__ = ["Parts", "build_parts"]


@dataclass(frozen=True)
class Parts:
    """What is trained, and on what.

    Attributes:
        data: The data.
        model: The task with its network.
        balancer: The balancing callback; None for the arm `off`.
    """

    data: LightningDataModule
    model: LightningModule
    balancer: Callback | None


def build_parts(cfg: DictConfig) -> Parts:
    """Build the parts from the settings; none of them makes or loads data yet.

    Args:
        cfg: The composed settings.

    Returns:
        The parts. Weights are drawn from `cfg.seed`.

    Raises:
        RecipeError: A part refuses its settings, model and data do not fit, or the optimizer can't train the
            network.
    """
    data = build(cfg, "data")
    factories = {"optimizer": build(cfg, "optimizer"), "scheduler": build(cfg, "scheduler")}
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build(cfg, "model", **factories)
    check_combination(cfg, model, data)
    check_optimizer(cfg, model, factories["optimizer"])
    return Parts(data, model, build_balancer(cfg))
