"""The search of a power law's tail with every candidate looked at in full: quadratic in N."""

from __future__ import annotations

import torch

CHUNK = 2**24


def distances(logs, alphas, candidates):
    """Return D `(S, N)` for a tail that starts at each candidate, 1 elsewhere; all arguments are `(S, N)`."""
    samples, size = logs.shape
    table = torch.ones_like(logs)
    step = max(1, CHUNK // (samples * size))
    for start in range(0, size, step):
        stop = min(start + step, size)
        offset = torch.arange(start, size) - torch.arange(start, stop)[:, None]
        rise = logs[:, None, start:] - logs[:, start:stop, None]
        fitted = 1 - ((1 - alphas[:, start:stop, None]) * rise).exp()
        empirical = offset / torch.arange(size - start, size - stop, -1, dtype=logs.dtype)[:, None]
        found = (fitted - empirical).abs().where(offset >= 0, 0).amax(-1)
        table[:, start:stop] = found.where(candidates[:, start:stop], 1)
    return table
