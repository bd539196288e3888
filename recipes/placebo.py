"""The control of a study: FARMS's learning-rate ratios on the wrong layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule, Trainer

from farms_tb import FARMSTempBalance
from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.balancing.ratio_maps import MappedRatios
from farms_tb.options import check_integer
from farms_tb.report import Report

__all__ = ["PlaceboTempBalance"]


class _ShuffledBalancer(LayerBalancer):
    """Hand each layer's ratio to another layer."""

    placebo_seed = 0

    def map_ratios(self, report: Report) -> MappedRatios:
        """Permute the ratios of the layers that take part, each kind within itself."""
        mapped = super().map_ratios(report)
        shuffled = dict(mapped.ratios)
        for names in mapped.members.values():
            generator = torch.Generator().manual_seed(self.placebo_seed)
            sources = torch.randperm(len(names), generator=generator).tolist()
            shuffled |= {name: mapped.ratios[names[source]] for name, source in zip(names, sources, strict=True)}
        return replace(mapped, ratios=shuffled)


class PlaceboTempBalance(FARMSTempBalance):
    """`FARMSTempBalance` whose ratios go to the wrong layers.

    At every measurement the ratios are those that FARMS would give, under one permutation of the layers that is
    drawn uniformly from the seed and fixed for the whole run. So the layers train at unequal rates of the same
    sizes, changing as often, but a layer's rate has nothing to do with its own alpha. An arm that does not beat
    its placebo owes what it gains to unequal rates, not to its measurement. As the seed alone decides, a resumed
    run has the same permutation.

    Args:
        placebo_seed: Seed of the permutation, at least 0.
        options: The options of `FARMSTempBalance`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option unknown or out of range.
    """

    def __init__(self, *, placebo_seed: int, **options: Any) -> None:
        super().__init__(**options)
        check_integer("placebo_seed", placebo_seed, at_least=0)
        self._placebo_seed = placebo_seed

    def _make_balancer(self, trainer: Trainer, pl_module: LightningModule) -> LayerBalancer:
        """Attach the balancer that shuffles."""
        options = self.options
        balancer = _ShuffledBalancer(
            pl_module, trainer.optimizers, options.spectrum, options.ratios, share=trainer.world_size > 1
        )
        balancer.placebo_seed = self._placebo_seed
        return balancer
