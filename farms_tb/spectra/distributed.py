"""The layers shared among processes, and what each of them found brought together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_tb.spectra.samples import solver_device
from farms_tb.weights.layers import Layer


@dataclass(frozen=True)
class Team:
    """The processes that measure a model together.

    Attributes:
        rank: this process.
        world_size: their number.
        add_up: sums a float64 tensor over them.
    """

    rank: int
    world_size: int
    add_up: Callable[[Tensor], Tensor]

    def own(self, costs: Sequence[int]) -> set[int]:
        """Return which tasks fall to this process: the costliest first, each goes to whoever has least to do.

        Args:
            costs: those of all tasks, the same on every process.
        """
        loads = [0] * self.world_size
        own = set()
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            rank = loads.index(min(loads))
            loads[rank] += costs[task]
            if rank == self.rank:
                own.add(task)
        return own


def own_layers(layers: Sequence[Layer], cost: Callable[[Layer], int], team: Team | None) -> set[int]:
    """Return the positions of the layers that are measured by this process."""
    return set(range(len(layers))) if team is None else team.own([cost(layer) for layer in layers])


def merged(
    table: Tensor, error: Exception | None, layers: Sequence[Layer], team: Team | None
) -> list[list[float]]:
    """Return the rows of all processes, on every one of them.

    Args:
        table: a row for each layer, zeros but for those measured here.
        error: what kept this process from measuring its own, if anything did.
        layers: all layers.
        team: the processes; None where this one is alone.

    Raises:
        RuntimeError: some process has an error; raised on every one.
    """
    if team is not None:
        failed = table.new_zeros(1, table.shape[1])
        failed[0, 0] = 0.0 if error is None else 1.0
        weights = (parameter for layer in layers for parameter in layer.module.parameters())
        device = solver_device(next((weight.device for weight in weights), torch.device("cpu")))
        # The failures travel with the rows: one collective call, and no process waits for one that gave up.
        summed = team.add_up(torch.cat([table, failed]).to(device)).cpu()
        table, failures = summed[:-1], int(summed[-1, 0])
        if failures:
            here = (
                f"on this rank {team.rank}: {error}"
                if error is not None
                else "elsewhere: see the output of other ranks"
            )
            raise RuntimeError(
                f"measuring the layers failed on {failures} of {team.world_size} ranks, {here}"
            ) from error
    if error is not None:
        raise error
    rows: list[list[float]] = table.tolist()
    return rows
