"""Layers shared out among the processes that train one model, and their results gathered on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from farms_tb.printable import printable
from farms_tb.weights.layers import Layer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Team:
    """The processes that measure a model together.

    Attributes:
        rank: this process.
        world_size: their number.
        gather: takes an object of this process, and returns those of all processes by rank. A collective call.
    """

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any]]


def current_team() -> Team | None:
    """Return the processes of `torch.distributed`; None where it is not in use.

    They gather objects by `all_gather_object` of the default process group, which pickles them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None

    def gather(own: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return found

    return Team(dist.get_rank(), dist.get_world_size(), gather)


def layers_of_this_process(layers: Sequence[Layer], cost: Callable[[Layer], int], team: Team | None) -> set[str]:
    """Return the names of the layers that fall to this process; all where it is alone.

    The costliest layer first, each goes to the process that has least to do. Every process works this out alike,
    from the same layers and costs.
    """
    if team is None:
        return {layer.name for layer in layers}
    loads = [0] * team.world_size
    own = set()
    for layer in sorted(layers, key=lambda layer: -cost(layer)):
        rank = loads.index(min(loads))
        loads[rank] += cost(layer)
        if rank == team.rank:
            own.add(layer.name)
    return own


def results_of_all(team: Team | None, work: Callable[[], dict[str, Result]]) -> dict[str, Result]:
    """Do this process's part of some work, and return what all processes found, by layer.

    Raises:
        RuntimeError: the work failed on some process; raised on every one, so that none waits for another.
    """
    if team is None:
        return work()
    own: dict[str, Result] = {}
    error: Exception | None = None
    try:
        own = work()
    except Exception as caught:
        error = caught
    # The failures travel with the results: one collective call, which every process reaches.
    found = team.gather((own, error is not None))
    failures = sum(failed for _, failed in found)
    if failures:
        where = "elsewhere: see the output of other ranks"
        if error:
            where = f"on this rank {team.rank}: {printable(error, keep=chr(10))}"
        raise RuntimeError(
            f"measuring the layers failed on {failures} of {team.world_size} ranks, {where}"
        ) from error
    return {name: result for results, _ in found for name, result in results.items()}
