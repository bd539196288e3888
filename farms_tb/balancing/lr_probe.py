"""Does a class of optimizers follow the learning rate of each param group, and its changes? Tried on two matrices.

Some optimizers read the rates of all groups and step with one of them, or keep the rates of their first step. No
hook sees that, as every rate is read. So a new optimizer of the same class makes two steps on matrices of its own
that have the same values and gradients, in two param groups: with one rate for both, and then with half of it for
the second. If both still move alike, the class ignores what its groups say.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ALIKE = 1e-3
"""Relative difference of two moves below which they are alike. Rates that count make one of about a half."""


def ignores_lr_of_groups(optimizer: Optimizer) -> bool:
    """Return whether optimizers of this class ignore the learning rates of their groups, or a change of them.

    Args:
        optimizer: only its class and its defaults are used; it is not changed, and neither is the random state.

    Returns:
        True where the probe shows it. False where the rates count, and also where nothing can be said: the class
        cannot be built from its defaults, its step asks for a closure, or nothing moves.
    """
    # Optimizers that find their rate themselves begin with moves that single precision rounds away; some classes
    # take nothing else.
    for dtype in (torch.float64, torch.float32):
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                first, second = _moves_at_half_the_lr(optimizer, dtype)
        except Exception:  # noqa: BLE001 - other people's classes may raise anything
            continue
        distance, difference = first.norm(), (first - second).norm()
        if torch.isfinite(distance) and distance > 0:
            return bool(difference <= ALIKE * distance)
    return False


def _moves_at_half_the_lr(optimizer: Optimizer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return how far two equal matrices move in the second step, the second one at half the learning rate."""
    values = torch.linspace(0.5, 1.5, 16, dtype=dtype, device="cpu").reshape(4, 4)
    gradients = torch.linspace(1.0, -0.9, 16, dtype=dtype, device="cpu").reshape(4, 4)
    params = [nn.Parameter(values.clone()) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [param]} for param in params]
    probe = type(optimizer)(groups, **optimizer.defaults)
    for param in params:
        param.grad = gradients.clone()
    if hasattr(probe, "train"):
        probe.train()  # optimizers that average weights step in this mode alone
    probe.step()
    before = [param.detach().clone() for param in params]
    probe.param_groups[1]["lr"] = 0.5 * probe.param_groups[0]["lr"]
    for param in params:
        param.grad = gradients.clone()
    probe.step()
    first, second = (param.detach() - start for param, start in zip(params, before, strict=True))
    return first, second
