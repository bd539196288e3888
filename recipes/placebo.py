"""The control of a study: FARMS's learning-rate ratios on the wrong layers.

An arm with unequal learning rates may win just because they are unequal. The placebo has the same ratios as
FARMS, changing at the same times, but a layer's ratio says nothing about that layer's alpha. It uses the two
places that the library offers for rules of one's own: the callback's `make_balancer` and the balancer's
`map_ratios`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule, Trainer

from farms_tb import FARMSTempBalance
from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.balancing.report_ratios import MappedRatios
from farms_tb.options import check_integer
from farms_tb.report import Report

__all__ = ["PlaceboTempBalance"]


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
        self.placebo_seed = placebo_seed

    def make_balancer(self, trainer: Trainer, pl_module: LightningModule) -> LayerBalancer:
        """Attach the balancer that permutes the ratios."""
        options = self.options
        balancer = _PermutedBalancer(
            pl_module, trainer.optimizers, options.spectrum, options.ratios, share=trainer.world_size > 1
        )
        balancer.seed = self.placebo_seed
        return balancer


class _PermutedBalancer(LayerBalancer):
    """Give each layer the ratio of another layer.

    Attributes:
        seed: Seed of the permutation.
    """

    seed: int

    def map_ratios(self, report: Report) -> MappedRatios:
        """Permute the ratios of the layers that take part, each kind within itself.

        Real and spectral weights are balanced apart from each other, so their ratios are permuted apart too.
        Layers that take no part keep ratio 1.
        """
        mapped = super().map_ratios(report)
        ratios = dict(mapped.ratios)
        for names in mapped.members.values():
            sources = _permutation(names, self.seed)
            for name, source in zip(names, sources, strict=True):
                ratios[name] = mapped.ratios[source]
        return replace(mapped, ratios=ratios)


def _permutation(names: Sequence[str], seed: int) -> list[str]:
    """Return the names in an order drawn uniformly from the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator)
    return [names[index] for index in order.tolist()]
