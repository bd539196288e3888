"""Weights and options that nobody wants: a status or a clear error, never a NaN learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance, analyze
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net, sharing

pytestmark = LIGHTNING_NOISE

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"esd": "FARMS"}, ValueError, r"esd must be one of 'farms', 'full', got 'FARMS'"),
    ({"fit": "best"}, ValueError, r"fit must be one of 'median', 'goodness-of-fit', 'xmin_peak', got 'best'"),
    ({"assign_func": "linear"}, ValueError, r"assign_func must be one of 'tb_linear_map', .*got 'linear'"),
    ({"metric": "alphas"}, ValueError, r"metric must be one of 'alpha', .*got 'alphas'"),
    ({"norms": None}, ValueError, r"norms must be one of 'follow', 'base', got None"),
    ({"balance": ["complex"]}, ValueError, r"balance must be one of 'real', 'spectral', got 'complex'"),
    ({"balance": "real"}, TypeError, r"balance must be a sequence of strings, got 'real'"),
    ({"exclude": "net.0"}, TypeError, r"exclude must be a sequence of strings, got 'net.0'"),
    ({"exclude": [1]}, TypeError, r"exclude must be a sequence of strings, got \[1\]"),
    ({"exclude": None}, TypeError, r"exclude must be a sequence of strings, got None"),
    ({"exclude": 3}, TypeError, r"exclude must be a sequence of strings, got 3"),
    ({"exclude_first": 1}, TypeError, r"exclude_first must be True or False, got 1 of type int"),
    ({"exclude_last": "no"}, TypeError, r"exclude_last must be True or False, got 'no' of type str"),
    ({"filter_zeros": None}, TypeError, r"filter_zeros must be True or False, got None"),
    (
        {"lr_min_ratio": 2.0},
        ValueError,
        r"lr_min_ratio must not exceed lr_max_ratio, got lr_min_ratio=2.0 and lr_",
    ),
    ({"lr_min_ratio": -0.1}, ValueError, r"lr_min_ratio must be at least 0, got -0.1"),
    ({"lr_max_ratio": math.nan}, ValueError, r"lr_max_ratio must be finite, got nan"),
    ({"lr_max_ratio": "1.5"}, TypeError, r"lr_max_ratio must be a number, got '1.5' of type str"),
    ({"sigmoid_tau": 0}, ValueError, r"sigmoid_tau must be above 0, got 0"),
    ({"sigmoid_min": -1}, ValueError, r"sigmoid_min must be at least 0, got -1"),
    ({"window": 1}, ValueError, r"window must be at least 2, got 1"),
    ({"window": 10.0}, TypeError, r"window must be an integer, got 10.0 of type float"),
    ({"window_step": 0}, ValueError, r"window_step must be at least 1, got 0"),
    ({"windows_per_dim": True}, TypeError, r"windows_per_dim must be an integer, got True of type bool"),
    ({"aspect_ratio": 0}, ValueError, r"aspect_ratio must be above 0, got 0"),
    ({"xmin_pos": 1}, ValueError, r"xmin_pos must be above 1, got 1"),
    ({"relative_cutoff": 1.0}, ValueError, r"relative_cutoff must be below 1, got 1.0"),
    ({"min_eigenvalues": 1}, ValueError, r"min_eigenvalues must be at least 2, got 1"),
    (
        {"metric": "norm", "assign_func": "tb_log2"},
        ValueError,
        r"assign_func='tb_log2' is defined for metric='alpha'",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FARMSTempBalance(**options)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        TempBalance(net, optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_epochs": None}, TypeError, "every_n_epochs must be an integer, got None"),
        ({"every_n_steps": -5}, ValueError, "every_n_steps must be at least 1, got -5"),
        ({"every_n_steps": 2.0}, TypeError, "every_n_steps must be an integer, got 2.0"),
        ({"histogram_every_n": 0}, ValueError, "histogram_every_n must be at least 1, got 0"),
        ({"log": "csv"}, TypeError, "log must be True or False, got 'csv'"),
        ({"assign_function": "tb_step"}, TypeError, "assign_function"),
    ],
)
def test_wrong_options_of_the_callback(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FARMSTempBalance(**options)


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        (lambda net: None, None, TypeError, "expected a torch.nn.Module, got NoneType"),
        (lambda net: nn.ReLU(), None, ValueError, "ReLU has no layer that can be analysed"),
        (lambda net: net, [], ValueError, "there is no optimizer: .*analyze\\(model\\) measures without one"),
        (lambda net: net, 0.1, TypeError, "need a torch.optim.Optimizer, got float"),
        (lambda net: net, "sgd", TypeError, "need a torch.optim.Optimizer, got str"),
        (lambda net: make_net(), None, ValueError, "none of the model's layers has a parameter in the optimizer"),
        (
            lambda net: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 8)),
            None,
            ValueError,
            "no layer that can be anal",
        ),
    ],
)
def test_wrong_arguments(model: Any, optimizer: Any, error: type[Exception], message: str) -> None:
    net = make_net()
    given = torch.optim.SGD(net.parameters(), lr=0.1) if optimizer is None else optimizer
    with pytest.raises(error, match=message):
        TempBalance(model(net), given)


EVIL = "b\x1b[31m"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["zzz"]}, "exclude='zzz' matches no layer"),
        ({"fixed": {"zzz": 2.0}}, "matches no layer and no parameter"),
        ({"unit": "block"}, "finds no repeated blocks"),
        ({"unit": "block", "blocks": ["zzz"]}, "matches no block"),
        ({"unit": "block", "blocks": ["b*", "b*.c"]}, "overlaps another pattern"),
    ],
)
def test_errors_hold_no_control_character_of_a_name(options: dict[str, Any], message: str) -> None:
    """A terminal would take it for a command."""
    inner = nn.ModuleDict({"c": nn.ModuleDict({"d": nn.Linear(32, 32)})})
    net = nn.ModuleDict({"a": nn.Linear(32, 32), EVIL: inner})
    with pytest.raises(ValueError, match=message) as caught:
        TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
    assert str(caught.value).isprintable()
    assert r"b\x1b[31m" in str(caught.value)


def test_the_list_of_reasons_holds_no_control_character_of_a_name() -> None:
    with pytest.raises(ValueError, match="no layer that can be analysed") as caught:
        analyze(nn.ModuleDict({EVIL: nn.Embedding(20, 20)}))
    assert r"b\x1b[31m" in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.filterwarnings("ignore:no layer is left to balance")
def test_second_optimizer_that_cannot_frees_the_first() -> None:
    net = make_net()
    good, bad = torch.optim.SGD(net[:4].parameters(), lr=0.1), torch.optim.LBFGS(net[4:].parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        TempBalance(net, [good, bad])
    assert not good._optimizer_step_pre_hooks
    TempBalance(net, good)


BROKEN: dict[str, tuple[Any, str]] = {
    "nan": (lambda w: w.fill_(math.nan), "weights contain NaN or infinity"),
    "one nan": (lambda w: w[0, :1].fill_(math.nan), "weights contain NaN or infinity"),
    "inf": (lambda w: w[-1, -1:].fill_(-math.inf), "weights contain NaN or infinity"),
    "zero": (lambda w: w.zero_(), "all weights are zero"),
    "rank one": (lambda w: w.copy_(torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 17))), "low rank|flat"),
    "orthogonal": (lambda w: w.copy_(torch.eye(12, 16)), "flat spectrum|low rank"),
    "constant": (lambda w: w.fill_(0.3), "low rank|flat"),
}


@pytest.mark.parametrize("esd", ["farms", "full"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_weights_keep_ratio_one(kind: str, esd: Any) -> None:
    breaks, status = BROKEN[kind]
    net = make_net()
    breaks(net[5].weight.data)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=f"layers with no alpha keep the base learning rate: 5: .*({status})"):
        balancer = TempBalance(net, optimizer, assign_func="tb_linear_map", esd=esd)
    assert balancer.report.layers["5"].alpha is None
    assert balancer.ratios["5"] == 1
    assert {balancer.ratios["2"], balancer.ratios["7"]} == {0.5, 1.5}
    assert all(math.isfinite(group.lr) for group in balancer.param_groups(optimizer))
    balancer.step()  # warned about once: warnings are errors here


@pytest.mark.filterwarnings("ignore:layers with no")
def test_nothing_left_to_balance() -> None:
    net = make_net()
    for p in net.parameters():
        p.data.fill_(math.nan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer)
    assert set(balancer.parameter_ratios().values()) == {1.0}
    assert [group.lr for group in balancer.param_groups(optimizer)] == [0.1]


def test_tiny_and_thin_layers() -> None:
    """They are listed with a reason and stay at the base rate; first and last count all matrix layers."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 12), nn.Linear(12, 12), nn.Linear(12, 16), nn.Linear(16, 3), nn.Linear(3, 1), nn.Linear(1, 1)
    )
    with pytest.warns(UserWarning, match="1: too few eigenvalues: 12 in a sample, min_eigenvalues is 20$"):
        balancer = TempBalance(
            net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map", min_eigenvalues=20
        )
    layers = balancer.report.layers
    assert [layers[name].alpha is None for name in "012345"] == [True, True, False, False, True, True]
    assert layers["0"].status == layers["4"].status == "one row or one column: no spectrum"
    assert set(balancer.ratios.values()) == {0.5, 1.0, 1.5}
    assert {balancer.ratios["2"], balancer.ratios["3"]} == {0.5, 1.5}


def test_weights_that_turn_nan_in_training() -> None:
    balance = FARMSTempBalance()
    with pytest.warns(UserWarning, match="net.2: weights contain NaN or infinity; net.5: .*; net.7: .*"):
        fit(Module(lambda params: torch.optim.SGD(params, lr=1e30)), [balance])
    assert set(balance.ratios.values()) == {1.0}


def make_layer(draw: Any) -> nn.Module:
    sizes = st.integers(1, 24)
    kind = draw(st.sampled_from(["linear", "conv1", "conv2", "transposed", "norm", "embedding", "attention"]))
    rows, columns = draw(sizes), draw(sizes)
    if kind == "linear":
        return nn.Linear(columns, rows, bias=draw(st.booleans()))
    if kind == "conv1":
        return nn.Conv1d(columns, rows, draw(st.integers(1, 3)))
    if kind == "conv2":
        return nn.Conv2d(columns, rows, draw(st.integers(1, 3)))
    if kind == "transposed":
        return nn.ConvTranspose2d(columns, rows, 2)
    if kind == "norm":
        return nn.BatchNorm2d(rows)
    if kind == "attention":
        return nn.MultiheadAttention(2 * rows, 2)
    return nn.Embedding(rows, columns)


def spoil(draw: Any, weight: torch.Tensor) -> None:
    how = draw(
        st.sampled_from(
            ["as it is"] * 4 + ["nan", "inf", "zero", "tiny", "huge", "rank one", "equal", "orthogonal"]
        )
    )
    with torch.no_grad():
        if how in ("nan", "inf"):
            weight.view(-1)[draw(st.integers(0, weight.numel() - 1))] = float(how)
        elif how == "zero":
            weight.zero_()
        elif how == "tiny":
            weight.mul_(1e-42)
        elif how == "huge":
            weight.mul_(1e37)
        elif how == "rank one":
            weight.copy_(weight.flatten(1)[:, :1].reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight))
        elif how == "equal":
            weight.fill_(0.7)
        elif how == "orthogonal":
            nn.init.orthogonal_(weight)


@st.composite
def models(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = nn.Sequential(*[make_layer(draw) for _ in range(draw(st.integers(1, 6)))])
    for p in net.parameters():
        if p.ndim > 1:
            spoil(draw, p.data)
        if draw(st.sampled_from([False] * 9 + [True])):
            p.requires_grad_(False)
    return net


@st.composite
def options(draw: Any) -> dict[str, Any]:
    low = draw(st.floats(0, 2))
    return {
        "esd": draw(st.sampled_from(["farms", "full"])),
        "fit": draw(st.sampled_from(["median", "goodness-of-fit", "xmin_peak"])),
        "assign_func": draw(st.sampled_from(["tb_linear_map", "tb_sqrt", "tb_log2", "tb_step", "tb_sigmoid"])),
        "lr_min_ratio": low,
        "lr_max_ratio": low + draw(st.floats(1e-3, 3)),
        "window": draw(st.integers(2, 30)),
        "windows_per_dim": draw(st.integers(1, 4)),
        "aspect_ratio": draw(st.sampled_from([0.5, 1.0, 2.0, 7.3])),
        "filter_zeros": draw(st.booleans()),
        "relative_cutoff": draw(st.sampled_from([0.0, 1e-6, 0.3])),
        "min_eigenvalues": draw(st.integers(2, 8)),
        "exclude_first": draw(st.booleans()),
        "exclude_last": draw(st.booleans()),
        "norms": draw(st.sampled_from(["follow", "base"])),
    }


@settings(max_examples=200)
@given(models(), options())
@pytest.mark.filterwarnings(
    "ignore:layers with no",
    "ignore:.* left to balance",
    "ignore:the learning rate of .* times the base",
    "ignore:Initializing zero-element tensors",
)
def test_any_model_any_option(net: nn.Module, options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    try:
        balancer = TempBalance(net, optimizer, **options)
    except ValueError as error:
        assert "has no layer that can be analysed" in str(error)  # noqa: PT017
        return
    ratios = balancer.ratios
    assert all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios.values())
    if options["assign_func"] in ("tb_linear_map", "tb_step"):
        low, high = options["lr_min_ratio"], options["lr_max_ratio"]
        assert all(ratio == 1 or low <= ratio <= high for ratio in ratios.values())
    for name, record in balancer.report.layers.items():
        assert (record.alpha is None) == (record.status != "ok")
        assert record.alpha is not None or ratios[name] == 1 or name in sharing(net)
    names = [name for group in balancer.param_groups(optimizer) for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    matrix_layers = [
        name for name, module in net.named_children() if not isinstance(module, (nn.BatchNorm2d, nn.Embedding))
    ]
    for end, excluded in ((0, options["exclude_first"]), (-1, options["exclude_last"])):
        if excluded:
            assert ratios.get(matrix_layers[end], 1) == 1
