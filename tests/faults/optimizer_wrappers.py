"""Ratios must be those of the step, or the first step must refuse, however an optimizer is built.

Right: the rates that the parameters really take are those that `parameter_ratios` claims, where an optimizer
holds others in a list, has its `step` replaced, or keeps the groups in a list of its own. Second inputs:
optimizers in a dict, in a list within a dict, and a wrapper that is no subclass of SGD and copies the rate of
its groups in `__init__`.
"""

import warnings

import torch
from torch import nn
from torch.optim import SGD

from farms_tb import TempBalance

warnings.simplefilter("ignore")


class Several(torch.optim.Optimizer):
    """Steps with other optimizers."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = self.keep(inner)
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {"lr": 0.1})
        self.param_groups = [g for o in inner for g in o.param_groups]

    def keep(self, inner):
        return list(inner)

    def all_inner(self):
        return self.inner

    def step(self, closure=None):
        for optimizer in self.all_inner():
            optimizer.step()


class InDict(Several):
    def keep(self, inner):
        return dict(enumerate(inner))

    def all_inner(self):
        return self.inner.values()


class InListsInDict(Several):
    def keep(self, inner):
        return {"all": [list(inner)]}

    def all_inner(self):
        return self.inner["all"][0]


class OwnGroups(SGD):
    """Steps with groups and parameters that it has kept."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.1)
        self.mine = [(group, list(group["params"])) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for group, params in self.mine:
            for parameter in params:
                parameter.sub_(group["lr"] * parameter.grad)


class OwnRate(torch.optim.Optimizer):
    """Steps with the learning rate that it had at the start."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})
        self.rate = 0.1

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= self.rate * parameter.grad


def replaced(params) -> SGD:
    optimizer = SGD(params, lr=0.1)

    @torch.no_grad()
    def step(closure=None):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)

    optimizer.step = step
    return optimizer


def two(cls):
    return lambda params: cls(SGD(params[:4], lr=0.1), SGD(params[4:], lr=0.1))


for name, make in {
    "optimizers in a list": two(Several),
    "optimizers in a dict": two(InDict),
    "optimizers in lists in a dict": two(InListsInDict),
    "a step replaced on the instance": replaced,
    "groups of its own": OwnGroups,
    "a rate of its own": OwnRate,
}.items():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 8))
    params = list(net.parameters())
    optimizer = make(params)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    before = [p.detach().clone() for p in params]
    net(torch.randn(8, 16)).square().mean().backward()
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        print(f"{name} refused: {error}")
        continue
    claimed = list(balancer.parameter_ratios().values())
    used = [float(((b - p) / (0.1 * p.grad)).median()) for b, p in zip(before, params, strict=True)]
    print(name, claimed, used)
    assert all(abs(c - u) < 0.02 for c, u in zip(claimed, used, strict=True)), (name, claimed, used)
