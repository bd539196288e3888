"""An optimizer that pairs its groups with a list made in `__init__` must not leave layers untrained.

AdaBound of several packages does: it goes through `zip(self.param_groups, self.base_lrs)`, and a step sees more
groups than the list has entries. Right: every layer moves, or the first step refuses. Second inputs: a list of
other numbers, one that is read by index, one in a dict, a list of momentum, and a tuple of one coefficient for
each group.
"""

import warnings

import torch
from torch import nn

from farms_tb import TempBalance

warnings.simplefilter("ignore")


class Zipped(torch.optim.Optimizer):
    """Pairs groups and learning rates."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.own = self.make_list()

    def make_list(self):
        return [group["lr"] for group in self.param_groups]

    def pairs(self):
        return zip(self.param_groups, self.own, strict=False)

    @torch.no_grad()
    def step(self, closure=None):
        for group, own in self.pairs():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group["lr"], own)

    def update(self, parameter, lr, own):
        parameter.sub_(lr * parameter.grad)


class Counted(Zipped):
    """Counts the steps of each group in a list."""

    def make_list(self):
        return [0 for _ in self.param_groups]


class ByIndex(Zipped):
    """Reads its list by the index of the group."""

    def pairs(self):
        return ((group, self.own[i]) for i, group in enumerate(self.param_groups))


class ByName(Zipped):
    """Has its list in a dict."""

    def make_list(self):
        return {"first": [group["lr"] for group in self.param_groups]}

    def pairs(self):
        return zip(self.param_groups, self.own["first"], strict=False)


class Coefficients(Zipped):
    """Has a coefficient for each group, which is no learning rate."""

    def make_list(self):
        return tuple(2.0 for _ in self.param_groups)

    def update(self, parameter, lr, own):
        parameter.sub_(own * lr * parameter.grad)


class Momentum(Zipped):
    """Has the momentum of its parameters in a list, by their order."""

    def make_list(self):
        return [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        params = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        for (parameter, lr), momentum in zip(params, self.own, strict=True):
            momentum.mul_(0.9).add_(parameter.grad)
            parameter.sub_(lr * momentum)


class MomentumOfGroups(Momentum):
    """Has a list of them for each group."""

    def make_list(self):
        return [[torch.zeros_like(p) for p in group["params"]] for group in self.param_groups]


for cls in (Momentum, MomentumOfGroups):
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])
    optimizer = cls(net.parameters(), lr=0.1)
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    net(torch.randn(8, 32)).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "list of its own" in str(error), error
        print("refused:", error)
    else:
        raise AssertionError(f"{cls.__name__}: layers of one shape may get the momentum of others")

for cls in (Zipped, Counted, ByIndex, ByName, Coefficients):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 8))
    optimizer = cls(net.parameters(), lr=0.1)
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(8, 16)).square().mean().backward()
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        assert cls.__name__ in str(error), error
        print("refused:", error)
        continue
    except IndexError as error:
        # Its own: the user sees that the optimizer and the groups do not fit.
        print(f"{cls.__name__} itself raises: {error}")
        continue
    moved = [not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)]
    assert all(moved), f"{cls.__name__} left out parameters: {moved}"
