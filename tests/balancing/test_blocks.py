"""One ratio for each repeated block of a network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import TempBalance
from tests.helpers import make_net


class Encoder(nn.Module):
    """An embedding, four blocks that are alike but for their weights, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.layer = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(16, 16), "norm": nn.LayerNorm(16), "feed": nn.Linear(16, 24)})
            for _ in range(4)
        )
        self.head = nn.Linear(16, 12)
        self.scale = nn.Parameter(torch.ones(16))


def balance(model: nn.Module, **options: Any) -> TempBalance:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TempBalance(model, optimizer, **{"unit": "block", "assign_func": "tb_linear_map", **options})


def block_means(balancer: TempBalance) -> list[float]:
    alphas = balancer.report.alphas
    found = []
    for index in range(4):
        query, feed = alphas[f"layer.{index}.query"], alphas[f"layer.{index}.feed"]
        assert query is not None
        assert feed is not None
        found.append((query + feed) / 2)
    return found


def test_every_parameter_of_a_block_has_its_ratio() -> None:
    balancer = balance(Encoder())
    ratios = balancer.parameter_ratios()
    for index in range(4):
        own = {ratio for name, ratio in ratios.items() if name.startswith(f"layer.{index}.")}
        assert own == {balancer.ratios[f"layer.{index}.query"]}
    assert {ratios[name] for name in ("embed.weight", "head.weight", "head.bias", "scale")} == {1.0}
    assert set(balancer.ratios.values()) >= {0.5, 1.5}


def test_norms_of_a_block_keep_no_ratio_of_their_own_but_a_fixed_one() -> None:
    with pytest.raises(ValueError, match="norms='base' has no effect with unit='block'"):
        balance(Encoder(), norms="base")
    balancer = balance(Encoder(), fixed={"*norm*": 1.0})  # what the message says instead
    ratios = balancer.parameter_ratios()
    assert {ratios[f"layer.{index}.norm.weight"] for index in range(4)} == {1.0}
    assert {ratios[f"layer.{index}.query.weight"] for index in range(4)} >= {0.5, 1.5}


def test_the_sigmoid_of_block_means_by_hand() -> None:
    """Model Balancing: r = 10^(s (sigmoid(10 (alpha - mean)) - 1/2)), s below and above the mean of the blocks."""
    balancer = balance(Encoder(), assign_func="tb_sigmoid", sigmoid_min=2.0, sigmoid_max=1.0)
    means = block_means(balancer)
    middle = math.fsum(means) / 4
    for index, mean in enumerate(means):
        strength = 1.0 if mean > middle else 2.0
        expected = 10 ** (strength * (1 / (1 + math.exp(-10 * (mean - middle))) - 0.5))
        assert balancer.ratios[f"layer.{index}.feed"] == pytest.approx(expected)


def test_a_mean_weighted_by_the_errors() -> None:
    balancer = balance(Encoder(), block_mean="weighted")
    values = []
    for index in range(4):
        records = [balancer.report.layers[f"layer.{index}.{name}"] for name in ("query", "feed")]
        weights = [1 / record.alpha_error**2 for record in records if record.alpha_error]
        alphas = [record.alpha for record in records if record.alpha]
        values.append(sum(w * a for w, a in zip(weights, alphas, strict=True)) / sum(weights))
    low, high = min(values), max(values)
    found = [balancer.ratios[f"layer.{index}.query"] for index in range(4)]
    assert found == pytest.approx([0.5 + (value - low) / (high - low) for value in values])


def test_excluded_layers_stay_out_of_mean_and_ratio() -> None:
    balancer = balance(Encoder(), exclude=["feed"])
    ratios = balancer.parameter_ratios()
    assert {ratios[f"layer.{index}.feed.weight"] for index in range(4)} == {1.0}
    alphas = [balancer.report.alphas[f"layer.{index}.query"] for index in range(4)]
    lowest = min(range(4), key=lambda index: alphas[index] or 0.0)
    assert ratios[f"layer.{lowest}.query.bias"] == ratios[f"layer.{lowest}.norm.weight"] == 0.5


def test_a_layer_without_an_alpha_takes_the_ratio_of_its_block() -> None:
    model = Encoder()
    nn.init.ones_(model.layer[2]["feed"].weight)
    balancer = balance(model)
    assert balancer.report.layers["layer.2.feed"].alpha is None
    assert balancer.ratios["layer.2.feed"] == balancer.ratios["layer.2.query"]


def ratios_inside(balancer: TempBalance, *parts: str) -> list[float]:
    """Return the one ratio that the named parts of each block have."""
    ratios = balancer.parameter_ratios()
    found = []
    for index in range(4):
        own = {ratios[f"layer.{index}.{part}"] for part in parts}
        assert len(own) == 1, own
        found.append(own.pop())
    return found


def test_norms_have_the_ratio_of_a_block_whose_first_layer_is_frozen() -> None:
    model = Encoder()
    for block in model.layer:
        block["query"].requires_grad_(False)
    found = ratios_inside(balance(model), "norm.weight", "norm.bias", "feed.weight", "feed.bias")
    assert {0.5, 1.5} <= set(found)


def test_norms_have_the_ratio_of_a_block_whose_first_layer_is_of_a_kind_that_is_not_balanced() -> None:
    model = Encoder()
    for block in model.layer:
        block["query"] = nn.Linear(16, 16, dtype=torch.complex64)
    balancer = balance(model, balance=("real",))
    found = ratios_inside(balancer, "norm.weight", "norm.bias", "feed.weight", "feed.bias")
    assert {0.5, 1.5} <= set(found)
    assert ratios_inside(balancer, "query.weight", "query.bias") == [1.0] * 4


def test_resumed_norms_have_the_ratio_of_their_block() -> None:
    other = Encoder()
    for block in other.layer:
        nn.init.normal_(block["query"].weight)
    first, second = balance(Encoder()), balance(other)
    assert second.parameter_ratios() != first.parameter_ratios()
    second.load_state_dict(first.state_dict())
    assert second.parameter_ratios() == first.parameter_ratios()
    assert {0.5, 1.5} <= set(ratios_inside(second, "query.weight", "norm.weight", "feed.weight"))


def test_shrunk_effects_of_blocks() -> None:
    found = list(balance(Encoder(), assign_func="shrinkage").ratios.values())
    assert all(abs(ratio - 1) < 0.3 for ratio in found)


def test_blocks_by_name() -> None:
    balancer = balance(Encoder(), blocks=["layer.[01]"])
    assert {balancer.ratios[f"layer.{index}.query"] for index in (0, 1)} == {0.5, 1.5}
    assert {balancer.ratios[f"layer.{index}.query"] for index in (2, 3)} == {1.0}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (make_net, {}, "unit='block' finds no repeated blocks in the model: name them"),
        (Encoder, {"blocks": ["layers.*"]}, "matches no block of layers; the layers are embed, layer.0"),
        (Encoder, {"blocks": ["layer.*", "layer.0"]}, None),
        (Encoder, {"blocks": ["layer", "layer.0"]}, "'layer.0' overlaps another pattern: layer.0 is inside"),
    ],
)
def test_blocks_that_cannot_be(model: Any, options: Any, message: str | None) -> None:
    if message is None:
        assert len(set(balance(model(), **options).ratios.values())) > 2
        return
    with pytest.raises(ValueError, match=message):
        balance(model(), **options)


def test_blocks_keep_their_ratio_when_layers_are_unfrozen_before_a_checkpoint() -> None:
    """What else is in a block has the block's ratio until the next measurement, in a resumed run as well."""
    model = Encoder()
    for block in model.layer:
        block["query"].requires_grad_(False)
    balancer = balance(model)
    for block in model.layer:
        block["query"].requires_grad_(True)
    before, state = balancer.parameter_ratios(), balancer.state_dict()
    balancer.load_state_dict(state)
    assert balancer.parameter_ratios() == before
    assert before["layer.0.norm.weight"] != 1


@pytest.mark.parametrize("leader", ["layer.9.query", 3, None])
def test_a_state_with_a_damaged_leader_is_refused(leader: Any) -> None:
    balancer = balance(Encoder())
    state = {**balancer.state_dict(), "leaders": {"layer.0": leader}}
    with pytest.raises(ValueError, match=r"damaged: leaders\['layer.0'\]"):
        balancer.load_state_dict(state)


def test_a_single_block_has_nothing_to_differ_from() -> None:
    model = Encoder()
    for block in list(model.layer)[:3]:
        block.requires_grad_(False)
    with pytest.warns(UserWarning, match="only one block of a kind is left to balance"):
        balancer = balance(model)
    assert set(balancer.ratios.values()) == {1.0}
