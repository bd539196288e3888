"""What ratios scale: the learning rate, the weight decay, or both; against torch's own groups."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import TempBalance
from farms_tb.balancing.layerwise_step import LayerwiseStep
from farms_tb.balancing.targets import as_scale, scale_of
from farms_tb.options import RatioOptions
from tests.balancing.test_layerwise_step import RATIOS, available, build, make_params, set_grads
from tests.helpers import assert_same_weights, make_net

# Factors of the learning rate and of the weight decay that a step sees, for a ratio of r.
EXPECTED: list[tuple[str, bool, Any]] = [
    ("lr", True, lambda r: (r, 1)),
    ("lr", False, lambda r: (r, 1 / r)),
    ("weight_decay", True, lambda r: (1, r)),
    ("weight_decay", False, lambda r: (1, r)),
    ("both", True, lambda r: (r, r)),
    ("both", False, lambda r: (r, 1)),
]
WITH_DECAY = [
    key
    for key in available
    if "SparseAdam" not in key and "weight_decay" in build(key, make_params()).param_groups[0]
]


@pytest.mark.parametrize(("target", "follows", "expected"), EXPECTED)
def test_by_hand(target: Any, follows: bool, expected: Any) -> None:
    options = RatioOptions(target=target, decay_follows_lr=follows, assign_func="tb_linear_map")
    assert as_scale(scale_of(0.5, options)) == expected(0.5)
    assert as_scale(scale_of(1.0, options)) == (1, 1)


def test_a_rate_of_zero_leaves_no_decay() -> None:
    assert scale_of(0.0, RatioOptions(decay_follows_lr=False, assign_func="tb_linear_map")) == 0


@pytest.mark.parametrize(("target", "follows", "expected"), [EXPECTED[1], EXPECTED[2], EXPECTED[4]])
@pytest.mark.parametrize("key", WITH_DECAY)
def test_a_step_is_that_of_an_optimizer_with_those_groups(
    key: str, target: Any, follows: bool, expected: Any
) -> None:
    """Every optimizer of torch that has weight decay: lr and decay written by hand before each step."""
    options = RatioOptions(target=target, decay_follows_lr=follows, assign_func="tb_linear_map")
    ours, theirs = make_params(), make_params()
    optimizer, by_hand = build(key, ours), build(key, [{"params": [p]} for p in theirs])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    LayerwiseStep(optimizer).ratios = {id(p): scale_of(r, options) for p, r in zip(ours, RATIOS, strict=False)}
    base = by_hand.param_groups[0]["lr"]
    base = base.clone() if isinstance(base, torch.Tensor) else base
    for step in range(3):
        decay = 0.1 * (1 + step)
        optimizer.param_groups[0]["weight_decay"] = decay
        for group, ratio in zip(by_hand.param_groups, (*RATIOS, 1.0), strict=True):
            of_lr, of_decay = expected(ratio)
            group["lr"], group["weight_decay"] = base * of_lr, decay * of_decay
        for params, stepped in ((ours, optimizer), (theirs, by_hand)):
            set_grads(params, step)
            stepped.step()
        assert optimizer.param_groups[0]["weight_decay"] == decay
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("target", "follows", "expected"), EXPECTED)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_effective_decay_of_a_model(cls: Any, target: Any, follows: bool, expected: Any) -> None:
    """Without a gradient a step takes lr * weight_decay of every weight, times both factors."""
    net = make_net()
    optimizer = cls(net.parameters(), lr=0.1, weight_decay=0.2)
    balancer = TempBalance(net, optimizer, target=target, decay_follows_lr=follows, assign_func="tb_linear_map")
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, ratio in balancer.parameter_ratios().items():
        of_lr, of_decay = expected(ratio)
        kept = before[name] * (1 - 0.1 * of_lr * 0.2 * of_decay)
        torch.testing.assert_close(net.get_parameter(name), kept)
    assert set(balancer.ratios.values()) >= {0.5, 1.0, 1.5}
    shown = {group.ratio: group.weight_decay for group in balancer.param_groups(optimizer)}
    assert all(decay is not None and decay > 0 for decay in shown.values())


def test_rates_stay_as_they_are_when_decay_alone_is_balanced() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, target="weight_decay", assign_func="tb_linear_map")
    assert {group.lr for group in balancer.param_groups(optimizer)} == {0.1}


def messages(net: nn.Module, **options: Any) -> list[str]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TempBalance(net, optimizer, assign_func="tb_linear_map", **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("target", "scaled", "large"), [("lr", "rate", 1), ("both", "rate", 1), ("weight_decay", "decay", 0)]
)
def test_warnings_name_what_is_scaled(target: Any, scaled: str, large: int) -> None:
    said = messages(make_net(), target=target, lr_max_ratio=12)
    assert len([message for message in said if "times the base" in message]) == large
    (few,) = messages(make_net(), target=target, exclude=["2", "5"])
    assert "keeps the base" in few
    assert ("weight decay" in few) == (scaled == "decay")
    net = make_net()
    nn.init.zeros_(net[5].weight)
    missing = messages(net, target=target)[0]
    assert "layers with no alpha" in missing
    assert ("weight decay" in missing) == (scaled == "decay")


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}])
def test_an_optimizer_without_decay(options: dict[str, float]) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match=r"target='both' needs .* no group of SGD"):
        TempBalance(net, optimizer, target="both", assign_func="tb_linear_map")
    with pytest.raises(ValueError, match="has a weight_decay other than 0"):
        TempBalance(net, torch.optim.Rprop(net.parameters()), target="weight_decay", assign_func="tb_linear_map")


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_ratios_of_one_are_bitwise_the_plain_step(cls: Any) -> None:
    nets: list[nn.Module] = []
    for options in (None, {"target": "both"}, {"decay_follows_lr": False}):
        net = make_net()
        optimizer = cls(net.parameters(), lr=0.01, weight_decay=0.1)
        if options is not None:
            TempBalance(net, optimizer, lr_min_ratio=1.0, lr_max_ratio=1.0, **options)
        for _ in range(3):
            net(torch.ones(4, 6)).square().mean().backward()
            optimizer.step()
        nets.append(net)
    assert_same_weights(nets[0], nets[1])
    assert_same_weights(nets[0], nets[2])
