"""The temperature maps: one alpha at a time, for layers that all have one."""

from __future__ import annotations

import math


def tb_linear_map(alphas, low=0.5, high=1.5):
    """Interpolate from [min, max] to [low, high]."""
    smallest, largest = min(alphas), max(alphas)
    return [low + (alpha - smallest) / (largest - smallest) * (high - low) for alpha in alphas]


def tb_sqrt(alphas):
    """sqrt(alpha) * n / sum of sqrt(alpha)."""
    return [math.sqrt(alpha) * len(alphas) / sum(map(math.sqrt, alphas)) for alpha in alphas]


def tb_log2(alphas):
    """log2(alpha) * n / sum of log2(alpha)."""
    return [math.log2(alpha) * len(alphas) / sum(map(math.log2, alphas)) for alpha in alphas]


def tb_step(alphas, low=0.5, high=1.5):
    """Rank to ratio: low + (high - low) * rank / n; of equal alphas the first has the lower rank."""
    ratios = []
    for index, alpha in enumerate(alphas):
        rank = sum(other < alpha for other in alphas) + sum(other == alpha for other in alphas[:index])
        ratios.append(low + (high - low) * rank / len(alphas))
    return ratios


def tb_sigmoid(alphas, s_min=0.5, s_max=0.5, tau=10.0):
    """10^(s * (sigmoid(tau * (alpha - mean)) - 1/2))."""
    mean = sum(alphas) / len(alphas)
    ratios = []
    for alpha in alphas:
        strength = s_max if alpha > mean else s_min
        ratios.append(10 ** (strength * (1 / (1 + math.exp(-tau * (alpha - mean))) - 0.5)))
    return ratios
