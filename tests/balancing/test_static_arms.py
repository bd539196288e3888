"""Arms of a comparison that look at no alpha, and the placebo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from farms_tb import FARMSTempBalance, TempBalance, lr_ratios
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net

ALPHAS = {"a": 2.5, "b": 2.0, "c": 3.0, "none": None, "d": 2.0}


def balance(seed: int = 0, **options: Any) -> dict[str, float]:
    net = make_net(seed=seed)
    options = {"exclude_first": False, "exclude_last": False, **options}
    return TempBalance(
        net, torch.optim.SGD(net.parameters(), lr=0.1), **{"assign_func": "tb_linear_map", **options}
    ).ratios


def test_by_depth() -> None:
    found = lr_ratios(ALPHAS, "depth", 0.125, 1.0)
    assert found == pytest.approx({"a": 0.125, "b": 0.25, "c": 0.5, "none": 1.0, "d": 1.0})
    assert list(lr_ratios(dict.fromkeys("abc", 2.0), "depth", 0.0, 1.0).values()) == [0, 0.5, 1]
    assert lr_ratios({"a": 2.0}, "depth", 0.5, 0.8) == {"a": 0.8}
    assert lr_ratios({"a": None}, "depth") == {"a": 1}


def test_constant() -> None:
    assert lr_ratios(ALPHAS, "constant", 1.0, 1.2) == {"a": 1.2, "b": 1.2, "c": 1.2, "none": 1.0, "d": 1.2}


@pytest.mark.parametrize("assign_func", ["depth", "constant"])
def test_weights_do_not_matter(assign_func: Any) -> None:
    assert balance(0, assign_func=assign_func) == balance(1, assign_func=assign_func)


@pytest.mark.parametrize("assign_func", ["depth", "constant"])
def test_layers_without_an_alpha_do_not_matter(assign_func: Any) -> None:
    net = make_net(seed=0)
    with torch.no_grad():
        net[0].weight[1:] = net[0].weight[:1]  # of rank one
        net[5].weight.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"assign_func": assign_func, "exclude_first": False, "exclude_last": False}
    assert TempBalance(net, optimizer, **options).ratios == balance(assign_func=assign_func)


def test_a_permutation_is_drawn_on_the_cpu() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.device("meta"):
        found = TempBalance(
            net, optimizer, assign_func="tb_linear_map", permute=3, exclude_first=False, exclude_last=False
        )
    assert found.ratios == balance(permute=3)


def test_a_permutation_deals_out_the_ratios_of_the_map() -> None:
    plain, first, second = balance(), balance(permute=0), balance(permute=3)
    assert sorted(first.values()) == sorted(second.values()) == sorted(plain.values())
    assert len({tuple(one.values()) for one in (plain, first, second)}) == 3
    assert balance(permute=0) == first


def test_excluded_layers_take_no_part_in_the_permutation() -> None:
    for seed in range(5):
        assert balance(permute=seed, exclude=["5"])["5"] == 1


class TestInTraining:
    pytestmark = LIGHTNING_NOISE

    def test_a_resumed_placebo_continues_bitwise(self, tmp_path: Path) -> None:
        whole, module = FARMSTempBalance(permute=1, assign_func="tb_linear_map"), Module()
        fit(module, [whole], max_epochs=4)
        first, resumed = (
            FARMSTempBalance(permute=1, assign_func="tb_linear_map"),
            FARMSTempBalance(permute=1, assign_func="tb_linear_map"),
        )
        fit(Module(), [first], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
        fit(other := Module(), [resumed], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        assert resumed.ratios == whole.ratios
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        fit(wrong := Module(), [FARMSTempBalance(permute=2, assign_func="tb_linear_map")], max_epochs=4)
        assert not all(torch.equal(a, b) for a, b in zip(module.parameters(), wrong.parameters(), strict=True))
