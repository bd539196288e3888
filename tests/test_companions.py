"""Packages that people combine with this one, where they are installed: timm's schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from farms_tb import TempBalance
from tests.helpers import LIGHTNING_NOISE, make_net

pytestmark = LIGHTNING_NOISE

STEPS = 12
TIMM: dict[str, Callable[[Any, Optimizer], Any]] = {
    "cosine": lambda s, o: s.CosineLRScheduler(o, t_initial=8, warmup_t=2, warmup_lr_init=1e-3, cycle_limit=2),
    "step": lambda s, o: s.StepLRScheduler(o, decay_t=3, decay_rate=0.5),
    "multistep": lambda s, o: s.MultiStepLRScheduler(o, decay_t=[2, 5], decay_rate=0.1),
    "poly": lambda s, o: s.PolyLRScheduler(o, t_initial=10, power=0.9),
    "tanh": lambda s, o: s.TanhLRScheduler(o, t_initial=10),
    "plateau": lambda s, o: s.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1),
}


def train(make_scheduler: Callable[[Optimizer], Any], balance: bool) -> tuple[list[list[float]], dict[int, float]]:
    """Return how far SGD moved each parameter per unit of gradient, at each step, and the active ratios."""
    net = make_net()
    # timm's own convention: a group may carry an `lr_scale` of its own.
    parameters = list(net.parameters())
    groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = make_scheduler(optimizer)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map") if balance else None
    moved = []
    for step in range(STEPS):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append([float((b - p.detach()).double().mean()) for b, p in zip(before, parameters, strict=True)])
        scheduler.step(step + 1, metric=1.0)
    ratios = balancer.parameter_ratios() if balancer else {}
    return moved, {i: ratios.get(name, 1.0) for i, (name, _) in enumerate(net.named_parameters())}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("name", TIMM)
def test_timm_schedulers(name: str) -> None:
    schedulers = pytest.importorskip("timm.scheduler")
    plain, _ = train(lambda optimizer: TIMM[name](schedulers, optimizer), balance=False)
    balanced, ratios = train(lambda optimizer: TIMM[name](schedulers, optimizer), balance=True)
    assert len(set(ratios.values())) >= 3, "nothing is balanced: the test shows nothing"
    assert len({step[0] for step in plain}) > 1, "the schedule is flat: the test shows nothing"
    for before, now in zip(plain, balanced, strict=True):
        expected = [lr * ratios[i] for i, lr in enumerate(before)]
        assert now == pytest.approx(expected, rel=1e-4, abs=1e-7)
