"""What a ratio scales while the optimizer steps, and how much: the learning rate, the weight decay, or both.

In a step the decay of a parameter theta is lr * weight_decay * theta, whether it is decoupled (AdamW) or part of
the gradient (SGD, and Adam before its normalisation). So a ratio of the learning rate scales decay as well, unless
the step is shown a weight decay that is divided by it.

Source of balanced weight decay: AlphaDecay, NeurIPS 2025, arXiv 2506.14562.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from farms_tb.options import RatioOptions


class Scale(NamedTuple):
    """Factors of a parameter's learning rate and weight decay.

    Attributes:
        lr: factor of the learning rate.
        decay: factor of `weight_decay` as the step sees it.
    """

    lr: float
    decay: float


Ratio = float | Scale
"""A number scales the learning rate alone."""


def weakened(ratios: Mapping[str, float], strength: float) -> dict[str, float]:
    """Return 1 + s (r - 1) of each ratio r; where s is 1 the ratios themselves, bitwise.

    Args:
        ratios: ratios r of layers or parameters by name.
        strength: s, from 0 (every ratio is 1) to 1.
    """
    if strength == 1:
        return dict(ratios)
    return {name: 1 + strength * (ratio - 1) for name, ratio in ratios.items()}


def scale_of(ratio: float, options: RatioOptions) -> Ratio:
    """Return what a parameter's ratio scales.

    Args:
        ratio: ratio r of the parameter.
        options: `target` and `decay_follows_lr` are used.

    Returns:
        With `target="lr"` r, with `"weight_decay"` `Scale(1, r)`, with `"both"` `Scale(r, r)`; with
        `decay_follows_lr=False` the factor of the decay is divided by that of the learning rate, unless this is 0,
        where nothing decays. A plain number where the factor of the decay is 1.
    """
    lr = decay = ratio
    if options.target == "weight_decay":
        lr = 1.0
    if options.target == "lr":
        decay = 1.0
    if not options.decay_follows_lr and lr != 0:
        decay /= lr
    if decay == 1:
        return lr
    return Scale(lr, decay)


def as_scale(ratio: Ratio) -> Scale:
    """Return the factors of learning rate and weight decay.

    Args:
        ratio: both, or a number for the learning rate alone.
    """
    return ratio if isinstance(ratio, Scale) else Scale(ratio, 1.0)


def check_decay(optimizers: Sequence[Optimizer], options: RatioOptions) -> None:
    """Raise where weight decay is to be balanced and there is none.

    Args:
        optimizers: those that train the model.
        options: `target` is used.

    Raises:
        ValueError: no group of any optimizer has a `weight_decay` other than 0.
    """
    if options.target == "lr":
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decay = group.get("weight_decay")
            if isinstance(decay, (Real, Tensor)) and decay != 0:
                return
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    raise ValueError(
        f"target={options.target!r} needs an optimizer with weight decay, and no group of {names} has a "
        "weight_decay other than 0: set one, or use target='lr'"
    )
