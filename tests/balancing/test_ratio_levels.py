"""Ratios rounded to a number of levels, so that a step has few groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance, lr_ratios
from farms_tb.options import AssignFunc
from farms_tb.viewing.run_folder import read_run_folder
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net

MAPS = get_args(AssignFunc)


def mapped(alphas: Sequence[float | None], assign_func: Any, **options: Any) -> list[float]:
    return list(lr_ratios(dict(enumerate(alphas)), assign_func, **options).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("assign_func", MAPS)
@given(
    alphas=st.lists(st.floats(1.001, 20), min_size=2, max_size=40),
    levels=st.integers(2, 12),
    low=st.floats(0, 1, allow_subnormal=False),
    width=st.floats(0, 2, allow_subnormal=False),
)
def test_each_goes_to_the_nearest_of_few_levels(
    assign_func: Any, alphas: list[float], levels: int, low: float, width: float
) -> None:
    assume(min(alphas) < max(alphas) and low + width > 0)
    bounds: dict[str, Any] = {"lr_min_ratio": low, "lr_max_ratio": low + width}
    if assign_func == "shrinkage":
        bounds["errors"] = dict.fromkeys(range(len(alphas)), 0.1)
    exact = mapped(alphas, assign_func, **bounds)
    rounded = mapped(alphas, assign_func, ratio_levels=levels, **bounds)
    smallest, largest = min(exact), max(exact)
    assert (min(rounded), max(rounded)) == (smallest, largest)
    assert len(set(rounded)) <= levels
    grid = [smallest + (largest - smallest) * index / (levels - 1) for index in range(levels)]
    for one, other in zip(exact, rounded, strict=True):
        assert abs(other - one) <= min(abs(level - one) for level in grid) + 1e-12 * largest
        assert min(abs(level - other) for level in grid) <= 1e-12 * largest
    # A larger ratio stays the larger one, or becomes equal.
    by_size = [rounded[index] for index in sorted(range(len(exact)), key=exact.__getitem__)]
    assert by_size == sorted(by_size)


def test_two_levels_by_hand() -> None:
    assert mapped([1.0, 1.4, 1.5, 1.6, 2.0], "tb_linear_map", ratio_levels=2) == [0.5, 0.5, 1.5, 1.5, 1.5]
    assert mapped([1.0, 1.2, 1.4, 2.0], "tb_linear_map", ratio_levels=3) == [0.5, 0.5, 1.0, 1.5]


def test_layers_that_are_not_balanced_keep_one_exactly() -> None:
    assert mapped([1.0, None, 1.3, 2.0], "tb_linear_map", ratio_levels=2) == [0.5, 1.0, 0.5, 1.5]
    assert mapped([2.0, 2.0], "tb_linear_map", ratio_levels=2) == [1.0, 1.0]
    assert mapped([2.0, 3.0], "tb_linear_map", ratio_levels=2, lr_min_ratio=1, lr_max_ratio=1) == [1.0, 1.0]


def test_noise_stays_together() -> None:
    """Levels between the bounds would part layers that the noise-aware map has drawn together."""
    scores = [-0.5, 0.1, 0.4, 0.7]
    assert set(mapped(scores, "noise_aware", ratio_levels=4)) == {1.0}
    scores = [-1.5, 0.1, 0.4, 1.7]
    assert max(mapped(scores, "noise_aware", ratio_levels=4)) == max(mapped(scores, "noise_aware"))


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        (1, ValueError, "ratio_levels must be at least 2, got 1"),
        (0, ValueError, "ratio_levels must be at least 2, got 0"),
        (4.0, TypeError, r"ratio_levels must be an integer, got 4\.0 of type float"),
        (True, TypeError, "ratio_levels must be an integer, got True of type bool"),
    ],
)
def test_refused(levels: Any, error: type[Exception], message: str) -> None:
    for build in (FARMSTempBalance, lambda ratio_levels: lr_ratios({"a": 2.0}, ratio_levels=ratio_levels)):
        with pytest.raises(error, match=message):
            build(ratio_levels=levels)


class ManyLayers(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(6, 12)]
        for _ in range(12):
            layers += [nn.Linear(12, 12), nn.LayerNorm(12)]
        super().__init__(*layers, nn.Linear(12, 2))


class TestThroughATrainer:
    pytestmark = LIGHTNING_NOISE

    def test_few_groups_and_the_rounded_ratio_is_logged(self, tmp_path: Path) -> None:
        module = Module(net=ManyLayers())
        groups: list[set[float]] = []

        class Watch(FARMSTempBalance):
            def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                groups.append({group.ratio for group in self.param_groups(optimizer)})

        balancer = Watch(assign_func="tb_linear_map", ratio_levels=3)
        fit(module, [balancer], logger=CSVLogger(tmp_path, name="", version=""))
        assert len(groups) > 3
        assert all(ratios == {0.5, 1.0, 1.5} for ratios in groups)
        assert len(set(balancer.ratios.values())) == 3
        logged = read_run_folder(tmp_path).history.ratio
        assert {float(ratio) for curve in logged.values() for ratio in curve.values} == {0.5, 1.0, 1.5}


class Attention(nn.Module):
    """Packs q, k and v into one parameter, which has one learning rate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.MultiheadAttention(16, 2) for _ in range(4)])


def test_packed_parameters_add_no_ratio() -> None:
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = TempBalance(
        model, optimizer, ratio_levels=4, exclude_first=False, exclude_last=False, assign_func="tb_linear_map"
    )
    packed = [balancer.parameter_ratios()[f"parts.{i}.in_proj_weight"] for i in range(4)]
    assert balancer.report is not None
    alone = lr_ratios(balancer.report.alphas, assign_func="tb_linear_map", ratio_levels=4)
    means = [sum(alone[f"parts.{i}.{part}"] for part in "qkv") / 3 for i in range(4)]
    ratios = set(alone.values())
    assert any(mean not in ratios for mean in means), "nothing to round"
    for ratio, mean in zip(packed, means, strict=True):
        assert ratio in ratios
        assert abs(ratio - mean) == min(abs(other - mean) for other in ratios)
    assert len({group.ratio for group in balancer.param_groups(optimizer)}) <= 4


def test_a_state_from_before_the_option_loads(recwarn: pytest.WarningsRecorder) -> None:
    net = make_net()
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    state = balancer.state_dict()
    del state["options"]["ratio_levels"]
    balancer.load_state_dict(state)
    assert not [w for w in recwarn if re.search("other settings", str(w.message))]
