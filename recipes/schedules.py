"""Schedules of the learning rate that torch has in parts."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

__all__ = ["warmup_cosine"]


def warmup_cosine(optimizer: Optimizer, warmup: int, total: int) -> SequentialLR:
    """Return a linear warm-up followed by a cosine to zero, for a scheduler that is stepped once an epoch.

    The first epoch has 1 / (warmup + 1) of the learning rate, and epoch `warmup`, counted from 0, all of it.
    A run of at most `warmup` epochs ends before that.

    Args:
        optimizer: Its learning rates are scheduled.
        warmup: Epochs of warm-up, at least 1.
        total: Epochs in all.

    Returns:
        torch's two schedulers, one after the other.

    Raises:
        ValueError: `warmup` is below 1.
    """
    if warmup < 1:
        raise ValueError(f"scheduler.warmup must be at least 1, got {warmup}; without a warm-up: scheduler=cosine")
    rising = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    falling = CosineAnnealingLR(optimizer, T_max=max(total - warmup, 1))
    return SequentialLR(optimizer, [rising, falling], milestones=[warmup])
