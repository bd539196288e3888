"""An optimizer that chooses its learning rate by itself has lr=None: to be refused, or only measured.

Right: a ValueError that names the optimizer where ratios differ from 1, and a run that measures where both
bounds are 1. Second inputs: LBFGS, and an optimizer whose lr is text.
"""

import warnings

import torch
from torch import nn
from transformers.optimization import Adafactor

from farms_tb import TempBalance

warnings.simplefilter("ignore")


class Named(torch.optim.SGD):
    """An optimizer whose groups name their learning rate."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = "fast"

    def step(self, closure=None):
        return None


def train(optimizer: torch.optim.Optimizer, net: nn.Module, **options: float) -> None:
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map", **options)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 16)).square().mean()
        loss.backward()
        return loss

    closure()
    optimizer.step(*([closure] if isinstance(optimizer, torch.optim.LBFGS) else []))
    print(type(optimizer).__name__, [group.lr for group in balancer.param_groups(optimizer)])


for make in (Adafactor, torch.optim.LBFGS, Named):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    try:
        train(make(net.parameters()), net)
    except ValueError as error:
        assert make.__name__ in str(error), error
        print("refused:", error)
    else:
        raise AssertionError(f"{make.__name__} was balanced")
    if make is not Named:
        train(make(net.parameters()), net, lr_min_ratio=1.0, lr_max_ratio=1.0)
