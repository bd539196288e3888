"""A Ray cluster: several machines, and fractions of a GPU for a run.

Every node needs this repository at the same path with the same packages, and the data, as on a shared file system.
That is checked on each node before the first task.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.engine.task import Outcome, call, look_around
from recipes.errors import RecipeError

__all__ = ["RayEngine"]

ROOT = Path(__file__).parents[2]
"""The folder from which `recipes` is imported."""

CHECK_SECONDS = 120.0
"""Time that a node has to say which code it has."""


class RayEngine:
    """Runs tasks on a Ray cluster, one core each.

    A node that dies takes its tasks along, and a node that joins is used from then on.

    Args:
        address: As `ray.init` takes it; None for `RAY_ADDRESS`, or a cluster that is started on this machine.
        limit: Most tasks at the same time; None for as many as there are cores and GPUs for.
        gpus: GPUs that a task has, or the share of one; None for none.
        paths: Files and folders that every node must have where this one has them.

    Raises:
        RecipeError: Ray is not installed.
    """

    def __init__(
        self,
        address: str | None,
        limit: int | None = None,
        gpus: float | None = None,
        paths: Sequence[str] = (),
    ) -> None:
        try:
            self._ray: Any = import_module("ray")
        except ImportError as error:
            raise RecipeError("study.engine=ray needs Ray: pip install 'farms-tb[cluster]'") from error
        self._address, self._limit, self._gpus, self._paths = address, limit, gpus, paths
        self._running: dict[Any, Hashable] = {}

    def __enter__(self) -> RayEngine:
        """Connect, and check that every node has the same code.

        Raises:
            RecipeError: No cluster answers, or a node has other code.
        """
        _check_reachable(self._address or os.environ.get("RAY_ADDRESS", ""))
        try:
            self._ray.init(
                address=self._address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            )
        except ConnectionError as error:
            raise RecipeError(
                f"no Ray cluster answers: {error}. Start one with ray start --head; for one that asks for a "
                "token, set RAY_AUTH_MODE=token"
            ) from error
        try:
            self._check_nodes()
            self._warn_of_missing_gpus()
        except BaseException:
            self._ray.shutdown()
            raise
        self._remote = self._ray.remote(num_cpus=1, num_gpus=self._gpus or 0, max_retries=0)(call)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what is going on, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()

    @property
    def slots(self) -> int:
        """Number of tasks that there are cores and GPUs for, on the nodes that are alive now."""
        found = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                resources = node["Resources"]
                cores = int(resources.get("CPU", 0))
                found += min(cores, int(resources.get("GPU", 0) / self._gpus)) if self._gpus else cores
        return max(1, found if self._limit is None else min(found, self._limit))

    @property
    def tasks(self) -> set[Hashable]:
        """Names of the tasks that are going on."""
        return set(self._running.values())

    def submit(self, task: Hashable, function: Callable[[Any], Any], argument: Any) -> None:
        """Begin a task on some node; see `recipes.engine.task.Engine`."""
        self._running[self._remote.remote(function, argument)] = task

    def finished(self, timeout: float) -> Iterator[Outcome]:
        """Wait until a task is done, or `timeout` seconds, and yield the outcome of each that is done."""
        running = list(self._running)
        done, _ = self._ray.wait(running, num_returns=1, timeout=timeout)
        for reference in done:
            task = self._running.pop(reference)
            try:
                result, failure = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:  # it could not even be begun
                yield Outcome(task, failure=str(error.cause))
            except self._ray.exceptions.RayError as error:
                yield Outcome(task, failure=f"its process or node died ({type(error).__name__})", died=True)
            else:
                yield Outcome(task, result, failure)

    def _check_nodes(self) -> None:
        """Refuse a cluster of which some node has no code or another version, or lacks the data."""
        strategies = import_module("ray.util.scheduling_strategies")
        look = self._ray.remote(num_cpus=0, max_retries=0)(look_around)
        own_version, missing = look_around(self._paths)
        here = [path for path in self._paths if path not in missing]
        for node in self._ray.nodes():
            if not node["Alive"]:
                continue
            name = node["NodeManagerHostname"]
            strategy = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                asked = look.options(scheduling_strategy=strategy).remote(here)
                found_version, missing = self._ray.get(asked, timeout=CHECK_SECONDS)
            except self._ray.exceptions.RayError as error:
                raise RecipeError(
                    f"the node {name} cannot run this code, which must lie at {ROOT} with its packages on every "
                    f"node: {error}"
                ) from error
            if found_version != own_version:
                raise RecipeError(f"the node {name} has farms-tb {found_version}, and this one {own_version}")
            if missing:
                raise RecipeError(f"the node {name} has no {', '.join(missing)}: data must be at the same paths")

    def _warn_of_missing_gpus(self) -> None:
        """Warn where no node has the GPUs of a task: Ray waits for one that joins, and says nothing."""
        gpus = [node["Resources"].get("GPU", 0) for node in self._ray.nodes() if node["Alive"]]
        if self._gpus and max(gpus, default=0) < self._gpus:
            warnings.warn(
                f"no node of the cluster has the {self._gpus:g} GPU of study.gpus_per_run yet: runs wait until "
                "one joins; leave that option out to train on CPUs",
                stacklevel=3,
            )


def _check_reachable(address: str) -> None:
    """Refuse `host:port` where nobody listens, which Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RecipeError(
            f"no Ray cluster answers at {address} ({error}): start one with ray start --head"
        ) from error
