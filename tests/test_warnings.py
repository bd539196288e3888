"""Warnings come once, from rank zero."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farms_tb import TempBalance
from farms_tb.warnings import warn_once
from tests.helpers import make_net


def spoilt(seed: int = 0) -> nn.Sequential:
    net = make_net(seed=seed)
    nn.init.zeros_(net[5].weight)
    return net


def messages(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Of what is said about such small nets; tests/balancing/test_noise.py looks at it.
        warnings.filterwarnings("ignore", message=".* is sampling noise")
        function()
    return [str(warning.message).split(":")[0] for warning in caught]


def balance(net: nn.Module, *optimizers: type[torch.optim.Optimizer]) -> TempBalance:
    parameters = list(net.parameters())
    # Each optimizer has its own share of the parameters.
    shares = [parameters[index :: len(optimizers)] for index in range(len(optimizers))]
    return TempBalance(net, [cls(share, lr=0.1) for cls, share in zip(optimizers, shares, strict=True)])


def test_two_optimizers_of_one_class_warn_once() -> None:
    class Own(torch.optim.SGD):
        pass

    assert messages(lambda: balance(make_net(), Own, Own)) == ["layer-wise learning rates are untested with Own"]
    assert messages(lambda: balance(make_net(), Own)) == []


def test_a_layer_without_alpha_warns_once_a_model() -> None:
    net = spoilt()

    def run() -> None:
        balancer = balance(net, torch.optim.SGD)
        balancer.step()
        balancer.detach()
        # A finder or a second fit makes a new one.
        balance(net, torch.optim.SGD).detach()

    said = "layers with no alpha keep the base learning rate"
    assert messages(run) == [said]
    assert messages(lambda: balance(spoilt(), torch.optim.SGD)) == [said]


def test_changed_settings_warn_once() -> None:
    net = make_net()
    state = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), lr_max_ratio=2).state_dict()
    balancer = balance(net, torch.optim.SGD)

    def load() -> None:
        balancer.load_state_dict(state)
        balancer.load_state_dict(state)

    assert messages(load) == ["the checkpoint was written with other settings, measuring anew"]


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 0), (7, 0)])
def test_rank_zero_alone(rank: int, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    net = spoilt()
    state = {**balance(make_net(), torch.optim.SGD).state_dict(), "ratios": {"gone": 1.0}}

    class Own(torch.optim.SGD):
        pass

    def load() -> None:
        balance(net, Own).load_state_dict(state)

    assert len(messages(load)) == 3 * said


def test_another_message_or_object_is_another_warning() -> None:
    class About:
        pass

    first, second = About(), About()

    def say() -> None:
        for message, about in (("a", first), ("a", first), ("b", first), ("a", second), ("a", About)):
            warn_once(message, about)

    assert messages(say) == ["a", "b", "a", "a"]


def test_the_line_that_is_blamed_is_the_callers() -> None:
    def caller() -> None:
        warn_once("look here", balance, stacklevel=1)

    with pytest.warns(UserWarning, match="look here") as caught:
        caller()
    assert caught[0].filename == __file__
