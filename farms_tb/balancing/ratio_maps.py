"""From alphas to learning-rate ratios: the temperature maps of TempBalance.

A large alpha marks an undertrained layer, which gets a larger learning rate; a small one a smaller one.
Sources: TempBalance (Zhou et al., NeurIPS 2023, arXiv 2312.00359) and its application to SciML (arXiv 2410.12178).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from farms_tb.options import AssignFunc, RatioOptions


def lr_ratios(
    alphas: Mapping[str, float | None],
    assign_func: AssignFunc = "tb_linear_map",
    lr_min_ratio: float = 0.5,
    lr_max_ratio: float = 1.5,
    sigmoid_min: float = 0.5,
    sigmoid_max: float = 0.5,
    sigmoid_tau: float = 10.0,
    ratio_levels: int | None = None,
) -> dict[str, float]:
    """Map the alphas of layers to the ratios of their learning rates to the base learning rate.

    With n layers that have an alpha:

    - `"tb_linear_map"`: alpha interpolated linearly from [min, max] to [lr_min_ratio, lr_max_ratio];
    - `"tb_sqrt"`: sqrt(alpha) * n / sum of sqrt(alpha);
    - `"tb_log2"`: log2(alpha) * n / sum of log2(alpha);
    - `"tb_step"`: lr_min_ratio + (lr_max_ratio - lr_min_ratio) * rank / n, rank 0 the smallest alpha;
    - `"tb_sigmoid"`: 10^(s * (sigmoid(tau * (alpha - mean)) - 1/2)), s = sigmoid_max above the mean and
      sigmoid_min at or below it, so ratios lie between 10^(-sigmoid_min / 2) and 10^(sigmoid_max / 2);
    - `"noise_aware"`: takes z-scores in place of alphas (`analyze(model, null=True).z_scores`). The linear map of
      z, to the power of `noise_lambda`, the share of the spread of z that noise does not explain. Layers that
      differ by no more than random ones would all keep ratio 1; layers far apart get the linear map's ratios.
      It is this package's own, not from the papers.

    Args:
        alphas: alpha of each layer; None or NaN where a layer has none.
        assign_func: the map.
        lr_min_ratio: ratio of the smallest alpha (linear map, step); of the noise-aware map before it is shrunk.
        lr_max_ratio: ratio of the largest alpha (linear map); the bound of the step map.
        sigmoid_min: strength s of the sigmoid at or below the mean.
        sigmoid_max: strength s of the sigmoid above the mean.
        sigmoid_tau: steepness tau of the sigmoid.
        ratio_levels: round each ratio to the nearest of this many values, equally spaced from the smallest ratio
            to the largest, which stay. None rounds none.

    Returns:
        The ratio of every layer of `alphas`, in its order. A layer without an alpha has ratio 1 and takes no
        part in min, max, mean or n. One layer, or alphas that are all equal: every ratio is 1.

    Raises:
        ValueError: an unknown `assign_func`, `lr_min_ratio` above `lr_max_ratio`, an option out of range, an
            infinite alpha, or one that `tb_sqrt` (below 0) or `tb_log2` (not above 1) cannot map.

    Example:
        >>> lr_ratios({"conv1": 2.0, "conv2": 3.0, "fc": 4.0})
        {'conv1': 0.5, 'conv2': 1.0, 'fc': 1.5}
    """
    options = RatioOptions(
        assign_func, lr_min_ratio, lr_max_ratio, sigmoid_min, sigmoid_max, sigmoid_tau, ratio_levels
    )
    return ratios_from(alphas, options)


def ratios_from(alphas: Mapping[str, float | None], options: RatioOptions) -> dict[str, float]:
    """`lr_ratios` with its options already checked."""
    known = {name: float(alpha) for name, alpha in alphas.items() if alpha is not None and alpha == alpha}
    for name, alpha in known.items():
        if math.isinf(alpha):
            raise ValueError(f"the alpha of {name!r} is infinite; pass None for a layer without an alpha")
    ratios = dict.fromkeys(alphas, 1.0)
    values = list(known.values())
    if values and min(values) < max(values):
        _check_domain(known, options.assign_func)
        mapped = _MAPS[options.assign_func](values, options)
        if options.ratio_levels is not None:
            mapped = _to_levels(mapped, options.ratio_levels)
        ratios.update(zip(known, mapped, strict=True))
    return ratios


def noise_lambda(z_scores: Sequence[float]) -> float:
    """Return the share of the variance of z-scores that noise does not explain, max(0, 1 - 1 / variance).

    The z-scores of random layers have variance 1. 0 for fewer than two.

    Example:
        >>> noise_lambda([-2.0, 0.0, 2.0])
        0.75
    """
    largest = max(map(abs, z_scores), default=0.0)
    if len(z_scores) < 2 or largest == 0:
        return 0.0
    # As shares of the largest, whose squares cannot overflow.
    shares = [z / largest for z in z_scores]
    mean = math.fsum(shares) / len(shares)
    variance = math.fsum((share - mean) ** 2 for share in shares) / (len(shares) - 1) * largest * largest
    return 1 - 1 / variance if variance > 1 else 0.0


def _to_levels(ratios: Sequence[float], levels: int) -> list[float]:
    """Round each to the nearest of equally spaced levels; of two as near, to the larger.

    The ends are the smallest and the largest ratio at hand, not those that the options allow: the noise-aware map
    keeps ratios together that do not differ beyond noise, and levels further apart would part them again.
    """
    low, high = min(ratios), max(ratios)
    if low == high:
        return list(ratios)
    rounded = []
    for ratio in ratios:
        position = math.floor((ratio - low) / (high - low) * (levels - 1) + 0.5) / (levels - 1)
        rounded.append(min(max(low * (1 - position) + high * position, low), high))
    return rounded


def _check_domain(alphas: Mapping[str, float], assign_func: AssignFunc) -> None:
    bound = {"tb_sqrt": 0.0, "tb_log2": 1.0}.get(assign_func, -math.inf)
    for name, alpha in alphas.items():
        if not alpha > bound:
            raise ValueError(f"{assign_func} needs alphas above {bound:g}, got {alpha!r} for {name!r}")


def _linear_map(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    low, high = options.lr_min_ratio, options.lr_max_ratio
    smallest, largest = min(alphas), max(alphas)
    # Halved where the range of two huge values of opposite sign would overflow; tiny ones would vanish.
    scale = 1.0 if math.isfinite(largest - smallest) else 0.5
    span = largest * scale - smallest * scale
    positions = ((alpha * scale - smallest * scale) / span for alpha in alphas)
    return [min(max(low + (high - low) * position, low), high) for position in positions]


def _sqrt(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    return _share([math.sqrt(alpha) for alpha in alphas])


def _log2(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    return _share([math.log2(alpha) for alpha in alphas])


def _share(weights: Sequence[float]) -> list[float]:
    """Scale weights to a mean of 1."""
    mean = math.fsum(weights) / len(weights)
    return [weight / mean for weight in weights]


def _step(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    low, high = options.lr_min_ratio, options.lr_max_ratio
    ratios = [0.0] * len(alphas)
    for rank, index in enumerate(sorted(range(len(alphas)), key=alphas.__getitem__)):
        ratios[index] = low + (high - low) * rank / len(alphas)
    return ratios


def _sigmoid(alphas: Sequence[float], options: RatioOptions) -> list[float]:
    mean = math.fsum(alpha / len(alphas) for alpha in alphas)
    ratios = []
    for alpha in alphas:
        strength = options.sigmoid_max if alpha > mean else options.sigmoid_min
        # sigmoid(x) - 1/2 = tanh(x / 2) / 2, which overflows for no x.
        ratios.append(10 ** (strength * math.tanh(options.sigmoid_tau * (alpha - mean) / 2) / 2))
    return ratios


def _noise_aware(z_scores: Sequence[float], options: RatioOptions) -> list[float]:
    share = noise_lambda(z_scores)
    return [ratio**share for ratio in _linear_map(z_scores, options)]


_MAPS: dict[AssignFunc, Callable[[Sequence[float], RatioOptions], list[float]]] = {
    "tb_linear_map": _linear_map,
    "tb_sqrt": _sqrt,
    "tb_log2": _log2,
    "tb_step": _step,
    "tb_sigmoid": _sigmoid,
    "noise_aware": _noise_aware,
}
