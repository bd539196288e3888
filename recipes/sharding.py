"""Networks in parts on several devices: FSDP2 through Lightning's ModelParallelStrategy."""

from __future__ import annotations

from collections.abc import Iterator

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

__all__ = ["ShardedNet"]


class ShardedNet(LightningModule):
    """A module whose network `net` is sharded where the trainer's strategy asks for it, and left alone elsewhere.

    Attributes:
        net: The network.
    """

    net: nn.Module

    def configure_model(self) -> None:
        """Shard the network; called on every process, before training and again before a test."""
        strategy = self.trainer.strategy
        sharded_already = isinstance(self.net, FSDPModule)
        if sharded_already or not isinstance(strategy, ModelParallelStrategy):
            return
        mesh = strategy.device_mesh["data_parallel"]
        for unit in _units(self.net):
            fully_shard(unit, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that are gathered one at a time: the children, and those of lists and dicts of modules."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # these are never called themselves
            yield from _units(child)
        elif list(child.parameters()):
            yield child
