"""From alphas to learning-rate ratios: the temperature maps of TempBalance.

A large alpha marks an undertrained layer, which gets a larger learning rate; a small alpha gives a smaller one.
`favor="small_alpha"` turns that round, for every map that looks at alphas.

The maps are functions of the list of alphas a_1, ..., a_n of the n layers that are balanced together. They return
the ratios r_1, ..., r_n; a layer's learning rate is its ratio times that of the scheduler.

Sources: TempBalance (Zhou et al., NeurIPS 2023, arXiv 2312.00359) and its application to SciML (arXiv 2410.12178).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from farms_tb.options import MAPS, AssignFunc, Favor, RatioOptions
from farms_tb.spectra.random_effects import shrunk_effects


def lr_ratios(  # noqa: PLR0913 - each is an option
    alphas: Mapping[str, float | None],
    assign_func: AssignFunc = "tb_linear_map",
    lr_min_ratio: float = 0.5,
    lr_max_ratio: float = 1.5,
    sigmoid_min: float = 0.5,
    sigmoid_max: float = 0.5,
    sigmoid_tau: float = 10.0,
    ratio_levels: int | None = None,
    *,
    favor: Favor = "large_alpha",
    errors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Map the alphas of layers to the ratios of their learning rates to the base learning rate.

    With n layers that have an alpha, and low = lr_min_ratio, high = lr_max_ratio:

    - `"tb_linear_map"`: low + (high - low) * (alpha - min) / (max - min), min and max those of the alphas;
    - `"tb_sqrt"`: sqrt(alpha) * n / sum of sqrt(alpha);
    - `"tb_log2"`: log2(alpha) * n / sum of log2(alpha);
    - `"tb_step"`: low + (high - low) * rank / n, rank 0 the smallest alpha, n - 1 the largest;
    - `"tb_sigmoid"`: 10^(s * (sigmoid(tau * (alpha - mean)) - 1/2)), s = sigmoid_max above the mean and
      sigmoid_min at or below it, so ratios lie between 10^(-sigmoid_min / 2) and 10^(sigmoid_max / 2);
    - `"noise_aware"`: takes z-scores in place of alphas (`analyze(model, null=True).z_scores`). The linear map of
      z, to the power of lambda, see `noise_lambda`: the share of the spread of z that noise does not explain.
      Layers that differ by no more than random ones would all keep ratio 1; layers far apart get the linear map's
      ratios. It is this package's own, not from the papers.
    - `"shrinkage"`: takes effects in place of alphas (`record.effect`), and their `errors`:
      (low + high) / 2 + (high - low) / 2 * (delta - m) / max |effect - m|, delta the effects shrunk to their mean
      m as far as their errors explain their differences, see `farms_tb.spectra.random_effects`. The mean ratio is
      (low + high) / 2. It is this package's own, not from the papers.

    - `"depth"`: low^(1 - t) * high^t, t from 0 for the first layer to 1 for the last: layer-wise decay by depth,
      whatever the alphas are (high * t where low is 0);
    - `"constant"`: high for every layer, another base rate.

    With `lr_min_ratio` and `lr_max_ratio` both 1, every map gives every layer ratio 1.

    Args:
        alphas: alpha of each layer; None or NaN where a layer has none.
        assign_func: the map. The default is that of the papers, which needs alphas alone; models are balanced by
            `"shrinkage"` unless told otherwise.
        lr_min_ratio: ratio of the smallest alpha (linear map, step); of the noise-aware map before it is shrunk.
            `"tb_sqrt"`, `"tb_log2"` and `"tb_sigmoid"` have no such bounds.
        lr_max_ratio: ratio of the largest alpha (linear map); the bound of the step map.
        sigmoid_min: strength s of the sigmoid at or below the mean.
        sigmoid_max: strength s of the sigmoid above the mean.
        sigmoid_tau: steepness tau of the sigmoid.
        ratio_levels: round each ratio to the nearest of this many values, equally spaced from the smallest ratio
            to the largest, which stay. None rounds none.
        favor: `"large_alpha"` as above; with `"small_alpha"` each alpha is replaced by max + min - alpha before it
            is mapped, so that the smallest alpha gets the ratio of the largest.
        errors: standard error of each effect by layer, for `"shrinkage"` alone. When a model is balanced it is the
            larger of `record.effect_error` and `record.null_std`: that of few windows is itself noisy.

    Returns:
        The ratio of every layer of `alphas`, in its order. A layer without an alpha has ratio 1 and takes no
        part in min, max, mean or n. One layer, or alphas that are all equal: every ratio is 1, except with
        `"depth"` and `"constant"`, which look at no alpha.

    Raises:
        ValueError: an unknown `assign_func`, `lr_min_ratio` above `lr_max_ratio`, an option out of range, an
            infinite alpha, or one that `tb_sqrt` (below 0) or `tb_log2` (not above 1) cannot map. With
            `"shrinkage"`, a layer without an error.

    Example:
        >>> lr_ratios({"conv1": 2.0, "conv2": 3.0, "fc": 4.0})
        {'conv1': 0.5, 'conv2': 1.0, 'fc': 1.5}
    """
    options = RatioOptions(
        assign_func=assign_func,
        lr_min_ratio=lr_min_ratio,
        lr_max_ratio=lr_max_ratio,
        sigmoid_min=sigmoid_min,
        sigmoid_max=sigmoid_max,
        sigmoid_tau=sigmoid_tau,
        ratio_levels=ratio_levels,
        favor=favor,
    )
    return ratios_from(alphas, options, errors or {})


def ratios_from(
    alphas: Mapping[str, float | None], options: RatioOptions, errors: Mapping[str, float]
) -> dict[str, float]:
    """Map alphas as `lr_ratios` does, with options that are checked already.

    Raises:
        ValueError: an alpha that is infinite, or that the map cannot map.
    """
    known = _known(alphas)
    ratios = dict.fromkeys(alphas, 1.0)
    values = list(known.values())
    takes = MAPS[options.assign_func].takes
    differ = len(set(values)) > 1 or (takes == "nothing" and bool(known))
    if options.maps_nothing or not differ:
        return ratios
    _check_domain(known, options.assign_func)
    if options.favor == "small_alpha":
        values = _reflected(values)
    if takes == "effect":
        mapped = _shrinkage(values, _errors_of(known, errors), options)
    else:
        mapped = _MAPS[options.assign_func](values, options)
    if options.ratio_levels is not None:
        mapped = _to_levels(mapped, options.ratio_levels)
    return ratios | dict(zip(known, mapped, strict=True))


def _known(alphas: Mapping[str, float | None]) -> dict[str, float]:
    """Return the alphas of the layers that have one; raise where one is infinite."""
    known = {}
    for name, alpha in alphas.items():
        if alpha is None or math.isnan(alpha):
            continue
        if math.isinf(alpha):
            raise ValueError(f"the alpha of {name!r} is infinite; pass None for a layer without an alpha")
        known[name] = float(alpha)
    return known


def _check_domain(alphas: Mapping[str, float], assign_func: AssignFunc) -> None:
    """Raise where the map is not defined for an alpha: where no root or logarithm of it is positive."""
    bound = MAPS[assign_func].above
    for name, alpha in alphas.items():
        if not alpha > bound:
            raise ValueError(f"{assign_func} needs alphas above {bound:g}, got {alpha!r} for {name!r}")


def _reflected(alphas: Sequence[float]) -> list[float]:
    """Return max + min - a of each alpha a, which turns their order round and stays in their range."""
    # Halves, because a sum of two huge values would overflow, as may a rounding above the largest.
    low, high = min(alphas) / 2, max(alphas) / 2
    return [2 * min(max(low + (high - alpha / 2), low), high) for alpha in alphas]


def _errors_of(names: Iterable[str], errors: Mapping[str, float]) -> list[float]:
    """Return the standard errors of layers by their names; raise where one is missing or no error."""
    found = []
    for name in names:
        error = errors.get(name, math.nan)
        if not 0 <= error < math.inf:
            raise ValueError(
                f"assign_func='shrinkage' needs the standard error of every effect, got {errors.get(name)!r} for "
                f"{name!r}: pass errors={{name: record.effect_error, ...}}"
            )
        found.append(error)
    return found


def _linear_map(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = low + (high - low) * (a_i - min a) / (max a - min a)."""
    low, high = options.lr_min_ratio, options.lr_max_ratio
    smallest, largest = min(alphas), max(alphas)
    # Halved where the difference of two huge values of opposite sign would overflow. Not always, because the
    # smallest floats would become 0.
    scale = 1.0 if math.isfinite(largest - smallest) else 0.5
    span = largest * scale - smallest * scale
    positions = ((alpha * scale - smallest * scale) / span for alpha in alphas)
    return [min(max(low + (high - low) * position, low), high) for position in positions]


def _sqrt(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = sqrt(a_i) * n / sum_j sqrt(a_j)."""
    return _with_mean_one([math.sqrt(alpha) for alpha in alphas])


def _log2(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = log2(a_i) * n / sum_j log2(a_j)."""
    return _with_mean_one([math.log2(alpha) for alpha in alphas])


def _with_mean_one(weights: Sequence[float]) -> list[float]:
    """Scale weights to a mean of 1."""
    mean = fmean(weights)
    return [weight / mean for weight in weights]


def _step(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = low + (high - low) * rank_i / n, where rank_i is the number of alphas before a_i in order."""
    low, high = options.lr_min_ratio, options.lr_max_ratio
    ratios = [0.0] * len(alphas)
    for rank, index in enumerate(sorted(range(len(alphas)), key=alphas.__getitem__)):
        ratios[index] = low + (high - low) * rank / len(alphas)
    return ratios


def _sigmoid(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = 10^(s_i * (sigmoid(tau * (a_i - mean a)) - 1/2)).

    s_i is `sigmoid_max` where a_i is above the mean, and else `sigmoid_min`.
    """
    mean = math.fsum(alpha / len(alphas) for alpha in alphas)
    ratios = []
    for alpha in alphas:
        strength = options.sigmoid_max if alpha > mean else options.sigmoid_min
        # sigmoid(x) - 1/2 = tanh(x / 2) / 2, which overflows for no x.
        ratios.append(10 ** (strength * math.tanh(options.sigmoid_tau * (alpha - mean) / 2) / 2))
    return ratios


def noise_lambda(z_scores: Sequence[float]) -> float:
    """Return lambda = max(0, 1 - 1 / Var(z)), the share of the variance of z-scores that noise does not explain.

    The z-scores of random layers have variance 1. Var(z) is the unbiased sample variance.

    Args:
        z_scores: z-score of each layer.

    Returns:
        A number from 0 to 1; 0 for fewer than two layers.

    Example:
        >>> noise_lambda([-2.0, 0.0, 2.0])
        0.75
    """
    largest = max(map(abs, z_scores), default=0.0)
    if len(z_scores) < 2 or largest == 0:
        return 0.0
    # Scaled by the largest, because squares of huge values would overflow.
    scaled = [z / largest for z in z_scores]
    mean = fmean(scaled)
    variance = math.fsum((z - mean) ** 2 for z in scaled) / (len(scaled) - 1) * largest * largest
    if variance <= 1:
        return 0.0
    return 1 - 1 / variance


def _noise_aware(z_scores: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i^lambda, r_i the linear map of the z-scores and lambda their `noise_lambda`."""
    share = noise_lambda(z_scores)
    return [ratio**share for ratio in _linear_map(z_scores, options)]


def _depth(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = low^(1 - t_i) * high^t_i for t_i = i / (n - 1), i the place in order; linear where low is 0."""
    low, high = options.lr_min_ratio, options.lr_max_ratio
    ratios = []
    for place in range(len(alphas)):
        share = place / (len(alphas) - 1) if len(alphas) > 1 else 1.0
        ratios.append(low ** (1 - share) * high**share if low > 0 else high * share)
    return [min(max(ratio, low), high) for ratio in ratios]


def _constant(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = high for every layer."""
    return [options.lr_max_ratio] * len(alphas)


def _shrinkage(effects: Sequence[float], errors: Sequence[float], options: RatioOptions) -> list[float]:
    """Return r_i = (low + high) / 2 + (high - low) / 2 * (delta_i - m) / max_j |d_j - m|.

    delta_i is the effect d_i after it was shrunk towards the mean m by its standard error, so that layers of which
    little is known stay near the mean ratio. That is (low + high) / 2, for any effects: 1 for a range around 1, so
    that balancing does not change the base learning rate. Where tau is 0, every ratio is that mean.
    """
    low, high = options.lr_min_ratio, options.lr_max_ratio
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


def _to_levels(ratios: Sequence[float], levels: int) -> list[float]:
    """Round each ratio to the nearest of L equally spaced levels; where two are equally near, to the larger.

    The levels are low + (high - low) * k / (L - 1) for k = 0, ..., L - 1. `low` and `high` are the smallest and
    the largest of the ratios, not those that the options allow: the noise-aware map keeps ratios together where
    they do not differ beyond noise, and levels further apart would separate them again.
    """
    low, high = min(ratios), max(ratios)
    if low == high:
        return list(ratios)
    rounded = []
    for ratio in ratios:
        position = math.floor((ratio - low) / (high - low) * (levels - 1) + 0.5) / (levels - 1)
        rounded.append(min(max(low * (1 - position) + high * position, low), high))
    return rounded


_MAPS: dict[AssignFunc, Callable[[Sequence[float], RatioOptions], list[float]]] = {
    "tb_linear_map": _linear_map,
    "tb_sqrt": _sqrt,
    "tb_log2": _log2,
    "tb_step": _step,
    "tb_sigmoid": _sigmoid,
    "noise_aware": _noise_aware,
    "depth": _depth,
    "constant": _constant,
}
"""All but `"shrinkage"`, which takes effects and their standard errors."""
