"""Times of several ways of doing one thing, taken in turn, so that what else the machine does hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]


def processor_seconds(work: Work) -> float:
    """Return the processor time of one call, over all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Work, device: str = "cpu") -> float:
    """Return the wall-clock time of one call, what it queued on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait for all that was queued on the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def rounds(
    ways: Sequence[Work],
    times: int,
    seconds: Callable[[Work], float] = processor_seconds,
    limit: float = math.inf,
) -> list[list[float]]:
    """Call all ways in turn, again and again, and time each call.

    Args:
        ways: what to time.
        times: rounds that count. One more comes first, to warm up.
        seconds: times one call.
        limit: in seconds; no round begins after this. Where that leaves the first round alone, it counts.

    Returns:
        The times of each way, in seconds, in order of `ways`: those of one round at the same place.
    """
    start = time.monotonic()
    found = [[seconds(way) for way in ways]]
    while len(found) <= times and time.monotonic() - start < limit:
        found.append([seconds(way) for way in ways])
    return [list(column) for column in zip(*(found[1:] or found), strict=True)]
