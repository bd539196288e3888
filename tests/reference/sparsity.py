"""The allocation of sparsity, written down as slowly and as plainly as possible, in plain Python floats."""

import math


def line(low, high, values):
    """Map values linearly, the smallest to `low` and the largest to `high`; 1 for all where they are equal."""
    smallest, largest = min(values), max(values)
    if smallest == largest:
        return [1.0] * len(values)
    return [low + (high - low) * (value - smallest) / (largest - smallest) for value in values]


def block_sparsities(alphas, sizes, target, epsilon):
    """AlphaPruning's steps, one after the other.

    Args:
        alphas: a list of alphas for each block.
        sizes: a list of sizes for each block.
        target: the sparsity over all entries.
        epsilon: half-width of the ratios.

    Returns:
        The sparsity of each block, without bounds.
    """
    means = [sum(block) / len(block) for block in alphas]
    ratios = line(1 - epsilon, 1 + epsilon, means)
    entries = sum(sum(block) for block in sizes)
    weighted = sum(ratio * sum(block) for ratio, block in zip(ratios, sizes, strict=True))
    return [ratio * target * entries / weighted for ratio in ratios]


def filled(ratios, sizes, target, low, high):
    """Find c by bisection such that clip(c r, low, high) has the mean `target`, weighted by size."""

    def at(c):
        return [min(max(c * ratio, low), high) for ratio in ratios]

    def total(c):
        return math.fsum(p * n for p, n in zip(at(c), sizes, strict=True)) / math.fsum(sizes)

    below, above = 0.0, 1.0
    while total(above) < target and above < 1e300:
        above *= 2
    for _ in range(2000):
        middle = (below + above) / 2
        if total(middle) < target:
            below = middle
        else:
            above = middle
    return at(above)


def paule_mandel(effects, errors):
    """Find tau^2 on a fine grid, then refine: the weighted sum of squares equals the degrees of freedom."""

    def statistic(tau2):
        weights = [1 / (tau2 + error**2) for error in errors]
        mean = sum(w * d for w, d in zip(weights, effects, strict=True)) / sum(weights)
        return sum(w * (d - mean) ** 2 for w, d in zip(weights, effects, strict=True)), mean

    freedom = len(effects) - 1
    low, step = 0.0, 1.0
    if statistic(0.0)[0] <= freedom:
        return 0.0, statistic(0.0)[1]
    while step > 1e-15:
        while statistic(low + step)[0] > freedom:
            low += step
        step /= 10
    return low, statistic(low)[1]
