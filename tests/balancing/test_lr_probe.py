"""Optimizers that read the learning rate of every param group, and then step with others."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from farms_tb import TempBalance


class PerGroup(Optimizer):
    """Plain gradient descent, as users write it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def rates(self):
        return [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for group, lr in zip(self.param_groups, self.rates(), strict=True):
            for param in group["params"]:
                if param.grad is not None:
                    param -= lr * param.grad


class OneForAll(PerGroup):
    """Reads every rate, and uses the largest."""

    def rates(self):
        rates = super().rates()
        return [max(rates)] * len(rates)


class FirstRates(PerGroup):
    """Keeps the rates of its first step, in a dict, by parameter."""

    def rates(self):
        kept = self.__dict__.setdefault("kept", {})
        return [kept.setdefault(id(group["params"][0]), group["lr"]) for group in self.param_groups]


class FindsItsRate(PerGroup):
    """Takes the largest rate times a tiny estimate, as D-Adaptation begins: single precision loses the moves."""

    def rates(self):
        rates = super().rates()
        return [1e-9 * max(rates)] * len(rates)


class Momentum(PerGroup):
    """Moves by an average of all moves so far: half the rate does not halve the step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, lr in zip(self.param_groups, self.rates(), strict=True):
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["move"] = 0.9 * state.get("move", 0) + lr * param.grad
                    param -= state["move"]


class MovesNothingAtFirst(PerGroup):
    """Collects gradients, as an optimizer that accumulates them does."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"]


class NeedsMore(OneForAll):
    """Cannot be built from its defaults, so nothing can be said."""

    def __init__(self, params, something, lr=0.1):
        super().__init__(params, lr)


class Random(PerGroup):
    """Draws random numbers when it is built."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        torch.rand(3)


def net():
    return nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))


@pytest.mark.filterwarnings("ignore:layer-wise learning rates are untested")
class TestProbe:
    @pytest.mark.parametrize("cls", [OneForAll, FirstRates, FindsItsRate])
    def test_rates_that_do_not_count_are_refused_before_training(self, cls):
        model = net()
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=f"{cls.__name__} does not step with the learning rates"):
            TempBalance(model, cls(model.parameters()), assign_func="tb_linear_map")
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize("cls", [OneForAll, FirstRates])
    def test_they_can_be_measured(self, cls):
        model = net()
        TempBalance(model, cls(model.parameters()), lr_min_ratio=1, lr_max_ratio=1).step()

    @pytest.mark.parametrize("cls", [PerGroup, Momentum, MovesNothingAtFirst])
    def test_others_are_taken(self, cls):
        model = net()
        TempBalance(model, cls(model.parameters()), assign_func="tb_linear_map").step()

    def test_no_verdict_on_a_class_that_cannot_be_built_from_its_defaults(self):
        model = net()
        TempBalance(model, NeedsMore(model.parameters(), something=1), assign_func="tb_linear_map").step()

    def test_random_state_and_gradient_mode_are_left_alone(self):
        model = net()
        optimizer = Random(model.parameters())
        state = torch.get_rng_state()
        with torch.no_grad():
            TempBalance(model, optimizer, assign_func="tb_linear_map")
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state)
