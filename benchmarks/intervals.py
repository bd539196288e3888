"""95 % intervals by the bootstrap, over the seeds or nets that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap"]

Array = NDArray[np.float64]
Interval = tuple[float, float, float]
"""Value, lower and upper end."""

DRAWS = 500


def bootstrap(samples: Sequence[Array], statistic: Callable[..., float]) -> Interval:
    """Return a statistic and its percentile interval, over `DRAWS` resamples.

    Args:
        samples: one array `(N_g, ...)` for each group g; its N_g rows are drawn anew, with replacement.
        statistic: takes these arrays, one argument each.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    generator = np.random.default_rng(0)
    values = []
    for _ in range(DRAWS):
        drawn = [sample[generator.integers(len(sample), size=len(sample))] for sample in samples]
        values.append(statistic(*drawn))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(statistic(*samples)), float(low), float(high)
