"""The map of shrunk effects: against numbers worked out by hand, random nets, and layers of planted alphas."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance, lr_ratios
from farms_tb.balancing import measured_model
from farms_tb.spectra.random_effects import shrunk_effects
from recipes.models.resnet import SmallImageResNet
from recipes.models.vgg import SmallImageVGG
from tests.balancing.test_noise import planted
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net


def ratios(effects: list[float], errors: list[float], low: float = 0.5, high: float = 1.5) -> list[float]:
    names = [str(index) for index in range(len(effects))]
    found = lr_ratios(
        dict(zip(names, effects, strict=True)),
        "shrinkage",
        low,
        high,
        errors=dict(zip(names, errors, strict=True)),
    )
    return list(found.values())


class TestPauleMandel:
    def test_equal_errors_by_hand(self) -> None:
        """With equal errors tau^2 is the sample variance minus the squared error: 0.25 - 0.09 = 0.16."""
        shrunk = shrunk_effects([1.5, 2.0, 2.5], [0.3, 0.3, 0.3])
        assert (shrunk.mean, shrunk.tau) == pytest.approx((2.0, 0.4))
        assert shrunk.weights == pytest.approx([0.64] * 3)
        assert shrunk.effects == pytest.approx([1.68, 2.0, 2.32])

    def test_unequal_errors_solve_the_equation(self) -> None:
        effects, errors = [-0.9, -0.4, 0.1, 0.05, 0.6], [0.05, 0.4, 0.1, 0.3, 0.2]
        shrunk = shrunk_effects(effects, errors)
        weights = [1 / (shrunk.tau**2 + error**2) for error in errors]
        mean = sum(w * d for w, d in zip(weights, effects, strict=True)) / sum(weights)
        assert shrunk.mean == pytest.approx(mean)
        assert sum(w * (d - mean) ** 2 for w, d in zip(weights, effects, strict=True)) == pytest.approx(4)

    def test_noise_explains_all(self) -> None:
        shrunk = shrunk_effects([-0.1, 0.0, 0.1], [0.2, 0.3, 0.2])
        assert (shrunk.tau, shrunk.mean_weight) == (0, 0)
        assert shrunk.effects == pytest.approx([0.0] * 3, abs=1e-12)

    def test_one_layer_and_layers_alike(self) -> None:
        assert shrunk_effects([0.7], [0.1]).effects == [0.7]
        assert shrunk_effects([0.7, 0.7], [0.1, 0.0]).tau == 0


class TestRatios:
    def test_by_hand(self) -> None:
        assert ratios([1.5, 2.0, 2.5], [0.3] * 3) == pytest.approx([0.68, 1.0, 1.32])
        assert ratios([-0.1, 0.1], [0.2, 0.2], 1.0, 3.0) == [2.0, 2.0]

    @pytest.mark.parametrize("size", [1.0, 1e-6, 1e300])
    def test_without_noise_the_spacing_is_that_of_the_linear_map(self, size: float) -> None:
        effects = [-0.5 * size, -0.1 * size, 0.2 * size, 0.5 * size]
        exact = ratios(effects, [0.0] * 4)
        linear = list(lr_ratios(dict(enumerate(effects))).values())  # type: ignore[arg-type]
        gaps = [b - a for a, b in pairwise(exact)]
        linear_gaps = [b - a for a, b in pairwise(linear)]
        scale = gaps[0] / linear_gaps[0]
        assert gaps == pytest.approx([scale * gap for gap in linear_gaps])
        assert ratios(effects, [1e-5 * size] * 4) == pytest.approx(exact, abs=1e-6)
        assert max(abs(ratio - 1) for ratio in exact) == pytest.approx(0.5)

    def test_equal_effects_differ_by_their_errors_alone(self) -> None:
        """The surer of two layers with one effect is further from the mean, by just the ratio of the weights."""
        found = ratios([-0.5, -0.5, 0.4, 0.1, 0.3], [0.01, 0.2, 0.1, 0.1, 0.1])
        shrunk = shrunk_effects([-0.5, -0.5, 0.4, 0.1, 0.3], [0.01, 0.2, 0.1, 0.1, 0.1])
        assert (found[1] - 1) / (found[0] - 1) == pytest.approx(shrunk.weights[1] / shrunk.weights[0])
        assert found[0] < found[1] < 1

    @given(
        layers=st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-3, 1)), min_size=2, max_size=20),
        low=st.floats(0, 1),
        width=st.floats(0.1, 2),
    )
    def test_the_mean_is_the_middle_and_no_ratio_is_outside(
        self, layers: list[tuple[float, float]], low: float, width: float
    ) -> None:
        effects, errors = map(list, zip(*layers, strict=True))
        assume(max(effects) - min(effects) > 1e-6)
        found = ratios(effects, errors, low, low + width)
        assert math.fsum(found) / len(found) == pytest.approx(low + width / 2, rel=1e-6)
        assert low <= min(found) <= max(found) <= low + width

    @pytest.mark.parametrize("errors", [{}, {"a": 0.1}, {"a": 0.1, "b": math.nan}, {"a": 0.1, "b": -1.0}])
    def test_every_effect_needs_an_error(self, errors: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="'shrinkage' needs the standard error of every effect"):
            lr_ratios({"a": 0.1, "b": 0.2}, "shrinkage", errors=errors)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class TestModels:
    @pytest.mark.parametrize(
        ("make", "nets"),
        [(lambda: SmallImageResNet(width=8), 7), (lambda: SmallImageVGG(width=8), 7), (encoder, 6)],
        ids=["resnet", "vgg", "transformer"],
    )
    def test_random_nets_keep_their_rates(self, make: Callable[[], nn.Module], nets: int) -> None:
        off = 0.0
        for seed in range(nets):
            torch.manual_seed(seed)
            net = make()
            for module in net.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
            balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="shrinkage")
            found = list(balancer.ratios.values())
            off += math.fsum((ratio - 1) ** 2 for ratio in found) / len(found) / nets
            assert math.fsum(found) / len(found) == pytest.approx(1, abs=0.02)
        assert math.sqrt(off) < 0.05

    def test_planted_layers_keep_their_order(self) -> None:
        torch.manual_seed(0)
        alphas = [2.0, 2.0, 4.0, 3.0, 2.5, 3.5, 2.0]
        net = nn.Sequential(*(planted(alpha) for alpha in alphas))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        found = list(TempBalance(net, optimizer, assign_func="shrinkage").ratios.values())[1:-1]
        inner = alphas[1:-1]
        order = sorted(range(len(inner)), key=inner.__getitem__)
        assert order == sorted(range(len(inner)), key=found.__getitem__)
        assert math.fsum(found) / len(found) == pytest.approx(1, abs=0.02)
        assert max(abs(ratio - 1) for ratio in found) > 0.4

    def test_a_collapsed_layer_takes_no_part(self) -> None:
        net = make_net()
        with torch.no_grad():
            left, _, right = torch.linalg.svd(net[5].weight, full_matrices=False)
            net[5].weight.copy_(left * torch.logspace(0, -8, 12) @ right)
        with pytest.warns(UserWarning, match="5: collapsed"):
            balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="shrinkage")
        assert balancer.report.layers["5"].collapsed
        assert balancer.ratios["5"] == 1


def heavy_net() -> nn.Sequential:
    """Return a net with one layer that stands out of the noise: its tail is the heaviest."""
    net = make_net()
    with torch.no_grad():
        left, _, right = torch.linalg.svd(net[5].weight, full_matrices=False)
        net[5].weight.copy_(left * torch.logspace(0, -2, 12) @ right)
    return net


def slow(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


class TestInTraining:
    pytestmark = LIGHTNING_NOISE

    def test_what_is_logged(self, tmp_path: Path) -> None:
        callback = FARMSTempBalance(assign_func="shrinkage")
        fit(Module(), [callback], logger=CSVLogger(tmp_path, name="", version=""))
        with (tmp_path / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["farms/alpha_mean"]]
        for row in rows[:-1]:
            assert float(row["farms/tau"]) >= 0
            assert 0 <= float(row["farms/mean_weight"]) <= 1
            assert float(row["farms/ratio_mean"]) == pytest.approx(1, abs=0.02)

    def test_a_resumed_run_continues_bitwise(self, tmp_path: Path) -> None:
        options = {"assign_func": "shrinkage", "favor": "small_alpha"}
        whole, module = FARMSTempBalance(**options), Module(slow, net=heavy_net())  # type: ignore[arg-type]
        fit(module, [whole], max_epochs=4)
        assert whole.ratios["net.5"] > 1.01
        first, resumed = (FARMSTempBalance(**options) for _ in range(2))  # type: ignore[arg-type]
        fit(Module(slow, net=heavy_net()), [first], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
        fit(other := Module(slow, net=heavy_net()), [resumed], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        assert resumed.ratios == whole.ratios
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


class TestDefault:
    pytestmark = LIGHTNING_NOISE

    def test_it_is_the_map_of_a_callback_without_options(self) -> None:
        found = {}
        for name, options in {
            "default": {},
            "shrinkage": {"assign_func": "shrinkage"},
            "farms": {"preset": "farms"},
        }.items():
            callback = FARMSTempBalance(**options)  # type: ignore[arg-type]
            fit(Module(slow, net=heavy_net()), [callback])
            found[name] = callback.ratios
        assert found["default"] == found["shrinkage"]
        assert max(found["default"].values()) < max(found["farms"].values())
        assert set(found["farms"].values()) >= {0.5, 1.5}

    def test_random_layers_keep_their_rates(self) -> None:
        """The map of the papers would give them 0.5 to 1.5."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 48), *(nn.Linear(48, 48) for _ in range(10)), nn.Linear(48, 2))
        callback = FARMSTempBalance()
        fit(Module(lambda params: torch.optim.SGD(params, lr=1e-6), net=net), [callback])
        assert all(abs(ratio - 1) < 0.05 for ratio in callback.ratios.values())

    def test_a_long_start_is_announced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a large model would take is taken from the shapes; here any time counts as long."""
        monkeypatch.setattr(measured_model, "LONG_NULLS", 1e-9)
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match=r"shuffled entries .* 1 min .*preset='farms'"):
            balancer = TempBalance(net, optimizer)
        balancer.step()  # the shuffled layers are known: warnings are errors here
        balancer.detach()
        other = make_net()
        TempBalance(other, torch.optim.SGD(other.parameters(), lr=0.1), preset="farms").detach()

    @pytest.mark.parametrize("assign_func", ["shrinkage", "noise_aware"])
    def test_where_nothing_is_mapped_nothing_is_compared(self, assign_func: Any) -> None:
        """Bounds of 1, or no kind of layer: shuffled layers would be measured for nothing."""
        net = make_net()
        for options in ({"lr_min_ratio": 1.0, "lr_max_ratio": 1.0}, {"balance": ()}):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            balancer = TempBalance(net, optimizer, assign_func=assign_func, **options)  # type: ignore[arg-type]
            assert all(record.null is None for record in balancer.report.layers.values())
            assert set(balancer.ratios.values()) == {1.0}
            balancer.detach()
