"""Learning-rate ratios of shrunk effects: layers of which little is known stay near the mean ratio.

The effect of a layer is alpha minus the mean of its permutation null. `farms_tb.spectra.random_effects` shrinks it
by its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from farms_tb.spectra.random_effects import shrunk_effects


def shrinkage_ratios(effects: Sequence[float], errors: Sequence[float], low: float, high: float) -> list[float]:
    """Return r_i = (low + high) / 2 + (high - low) / 2 * (delta_i - m) / max_j |d_j - m|.

    Their mean is (low + high) / 2, for any effects: 1 for a range around 1, so that balancing does not change the
    base learning rate. All lie in [low, high]. Where tau is 0, every ratio is that mean.

    Args:
        effects: d_i of each layer, at least one.
        errors: standard error of each.
        low: the smallest ratio.
        high: the largest ratio.
    """
    if not math.isfinite(4 * max(map(abs, effects))):
        # The ratios do not depend on the unit of the effects; differences of such huge ones would overflow.
        effects, errors = [effect / 4 for effect in effects], [error / 4 for error in errors]
    shrunk = shrunk_effects(effects, errors)
    middle, reach = (low + high) / 2, (high - low) / 2
    furthest = max(abs(effect - shrunk.mean) for effect in effects)
    if shrunk.tau == 0:
        return [middle] * len(effects)
    ratios = [middle + reach * ((effect - shrunk.mean) / furthest) for effect in shrunk.effects]
    return [min(max(ratio, low), high) for ratio in ratios]
