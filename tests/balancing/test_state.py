"""A saved state is input: a damaged one is refused by name, before anything is changed."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farms_tb import TempBalance
from tests.helpers import assert_same_state, make_net


def make_balancer(**options: Any) -> tuple[Any, torch.optim.Optimizer, TempBalance]:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, TempBalance(net, optimizer, **{"assign_func": "tb_linear_map", **options})


def with_ratio(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["ratios"].update({"2": value})


def with_record(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["report"]["2"].update(fields)


def with_entry(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update(entries)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "ratio NaN": (with_ratio(math.nan), r"ratios\['2'\].*nan"),
    "ratio infinite": (with_ratio(math.inf), r"ratios\['2'\].*inf"),
    "ratio negative": (with_ratio(-0.5), r"ratios\['2'\].*-0.5"),
    "ratio barely negative": (with_ratio(-1e-300), r"ratios\['2'\].*-1e-300"),
    "ratio beyond floats": (with_ratio(10**400), r"ratios\['2'\].*1000"),
    "ratio above its bound": (with_ratio(1e300), r"ratios\['2'\].*lr_max_ratio"),
    "ratio complex": (with_ratio(1j), r"ratios\['2'\].*1j"),
    "ratio None": (with_ratio(None), r"ratios\['2'\].*None"),
    "ratio of text": (with_ratio("1.5"), r"ratios\['2'\].*'1.5'"),
    "ratio of a truth value": (with_ratio(True), r"ratios\['2'\].*True"),
    "ratio of a tensor": (with_ratio(torch.tensor(1.5)), r"ratios\['2'\].*tensor"),
    "ratio of a list": (with_ratio([1.0]), r"ratios\['2'\]"),
    "ratios a list": (with_entry(ratios=[1.0]), "ratios must be a dict"),
    "ratios by number": (with_entry(ratios={2: 1.0}), "ratios must be a dict with names"),
    "options a list": (with_entry(options=[1]), "options must be a dict"),
    "report a list": (with_entry(report=[1]), "report must be a dict"),
    "begun a list": (with_entry(begun=[1]), "begun must be a dict"),
    "version of text": (with_entry(version="2"), "version.*'2'"),
    "version None": (with_entry(version=None), "version.*None"),
    "version a fraction": (with_entry(version=1.5), "version.*1.5"),
    "version zero": (with_entry(version=0), "version.*0"),
    "record a number": (lambda state: state["report"].update({"2": 3}), r"report\['2'\] must be a dict"),
    "record empty": (lambda state: state["report"].update({"2": {}}), r"report\['2'\] has no 'alpha'"),
    "record without shape": (lambda state: state["report"]["2"].pop("shape"), r"report\['2'\] has no 'shape'"),
    "record of a later version": (with_record(new=1), r"report\['2'\].*unknown fields new.*upgrade"),
    "alpha NaN": (with_record(alpha=math.nan), r"report\['2'\]\['alpha'\].*nan"),
    "alpha of text": (with_record(alpha="2"), r"report\['2'\]\['alpha'\].*'2'"),
    "alpha a dict": (with_record(alpha={}), r"report\['2'\]\['alpha'\].*{}"),
    "status a number": (with_record(status=3), r"report\['2'\]\['status'\] must be a string"),
    "shape a number": (with_record(shape=3), r"report\['2'\]\['shape'\] must be a list"),
    "shape of fractions": (with_record(shape=[1, 2.5]), r"report\['2'\]\['shape'\] must be a list"),
    "no entropy's deviation": (with_record(null_entropy_std=0.0), "null_entropy_std.*above 0"),
    "draws a fraction": (with_record(null_draws=8.5), "null_draws.*an integer"),
    "no deviation": (with_record(null_mean=2.0, null_std=0.0), "null_std.*above 0"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_a_damaged_state_is_refused_by_name(key: str) -> None:
    damage, message = DAMAGED[key]
    _, optimizer, balancer = make_balancer()
    state = copy.deepcopy(balancer.state_dict())
    damage(state)
    report, ratios, groups = balancer.report, balancer.ratios, balancer.param_groups(optimizer)
    with pytest.raises(ValueError, match=message):
        balancer.load_state_dict(state)
    assert (balancer.report, balancer.ratios, balancer.param_groups(optimizer)) == (report, ratios, groups)


@pytest.mark.parametrize("key", ["version", "options", "ratios", "report"])
def test_a_state_that_lacks_an_entry_is_refused(key: str) -> None:
    _, _, balancer = make_balancer()
    state = balancer.state_dict()
    del state[key]
    with pytest.raises(ValueError, match="not a state of farms_tb"):
        balancer.load_state_dict(state)


def test_a_damaged_background_measurement_is_refused() -> None:
    _, _, balancer = make_balancer()
    state = balancer.state_dict()
    state["begun"] = {"2": {"alpha": math.inf, "status": "ok", "shape": [1, 2, 3]}}
    with pytest.raises(ValueError, match=r"begun\['2'\]\['alpha'\]"):
        balancer.load_state_dict(state)


def test_numbers_of_other_types_are_read() -> None:
    _, _, balancer = make_balancer()
    state = balancer.state_dict()
    state["ratios"]["2"] = 1
    balancer.load_state_dict(state)
    assert balancer.ratios["2"] == 1.0
    assert type(balancer.ratios["2"]) is float


def test_the_stable_rank_of_an_earlier_version_is_the_pooled_one() -> None:
    """It had the name that is the matrix's now; the options of the run keep it, too."""
    options: dict[str, Any] = {"metric": "stable_rank", "esd": "full"}
    _, _, balancer = make_balancer(**options)
    state, ratios = balancer.state_dict(), balancer.ratios
    for record in state["report"].values():
        record["stable_rank"] = record.pop("pooled_stable_rank")
    _, _, other = make_balancer(**options)
    other.load_state_dict(state)
    assert other.ratios == ratios
    for name, record in other.report.layers.items():
        assert record.stable_rank is None
        assert record.pooled_stable_rank == balancer.report.layers[name].pooled_stable_rank


# Copies and other processes


def by_pickle(balancer: Any) -> Any:
    return pickle.loads(pickle.dumps(balancer))


@pytest.mark.parametrize("copied", [by_pickle, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("assign_func", ["tb_linear_map", "noise_aware"])
def test_a_copy_keeps_report_and_ratios(copied: Callable[[Any], Any], used: bool, assign_func: str) -> None:
    net, optimizer, balancer = make_balancer(assign_func=assign_func)
    if used:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        balancer.detach()
    other = copied(balancer._balancer) if copied is copy.copy else copied(balancer)
    assert other.report == balancer.report
    assert other.ratios == balancer.ratios
    assert other.parameter_ratios() == balancer.parameter_ratios()
    other.detach()
    for call in (lambda: other.param_groups(optimizer), other.state_dict):
        with pytest.raises(RuntimeError, match="detached from its model"):
            call()


@pytest.mark.parametrize("copied", [by_pickle, copy.deepcopy])
def test_a_copy_of_the_optimizer_steps_without_ratios(copied: Callable[[Any], Any]) -> None:
    net, optimizer, balancer = make_balancer()
    assert balancer.ratios["2"] != 1
    copied_net, copied_optimizer = copied((net, optimizer))
    for p in copied_net.parameters():
        p.grad = torch.ones_like(p)
    before = copied_net[2].weight.detach().clone()
    copied_optimizer.step()
    assert float((before - copied_net[2].weight.detach()).mean()) == pytest.approx(0.1, rel=1e-3)
    assert TempBalance(copied_net, copied_optimizer, assign_func="tb_linear_map").ratios


def test_a_copy_of_a_copy() -> None:
    _, _, balancer = make_balancer()
    other = by_pickle(copy.deepcopy(balancer))
    assert_same_state(other.parameter_ratios(), balancer.parameter_ratios())
    with pytest.raises(RuntimeError, match="Make a new one"):
        other.step()


def test_the_original_goes_on() -> None:
    net, optimizer, balancer = make_balancer()
    by_pickle(balancer)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = net[2].weight.detach().clone()
    optimizer.step()
    moved = float((before - net[2].weight.detach()).mean())
    assert moved == pytest.approx(0.1 * balancer.ratios["2"], rel=1e-3)
