"""Verdicts while a trainer trains: what is logged of them, and the warnings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance
from farms_tb.balancing.verdict_warnings import PATIENCE
from farms_tb.training.metrics import verdict_shares
from tests.helpers import LIGHTNING_NOISE, Module, Recorder, fit

pytestmark = LIGHTNING_NOISE


def learn(layer: nn.Linear) -> None:
    """Give a layer the spectrum of a trained one."""
    left, _, right = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
    singular = torch.arange(1.0, len(right) + 1) ** -0.8
    with torch.no_grad():
        layer.weight.copy_(left * singular @ right)


def collapse(layer: nn.Linear) -> None:
    left, _, right = torch.linalg.svd(torch.randn_like(layer.weight, dtype=torch.float64), full_matrices=False)
    singular = torch.logspace(-2, -6, len(right), dtype=torch.float64)
    singular[0] = 1
    with torch.no_grad():
        layer.weight.copy_(left * singular @ right)


def wide_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))


def balancer(net: nn.Module, **options: Any) -> TempBalance:
    return TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="noise_aware", **options)


class TestLogs:
    def rows(self, **options: Any) -> list[dict[str, float]]:
        logger = Recorder()
        fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map", **options)], logger=logger)
        return [row for _, row in logger.rows if "farms/alpha_mean" in row]

    def test_effects_and_shares(self) -> None:
        for row in self.rows(verdicts=True):
            shares = {key: value for key, value in row.items() if key.startswith("farms/share_")}
            assert sum(shares.values()) == pytest.approx(1)
            assert shares["farms/share_random"] > 0.5, "after three epochs of four batches"
            assert -1 < row["farms/effect/net.5"] < 1
            assert row["farms/z/net.5"] * row["farms/effect/net.5"] > 0
            assert 0 < row["farms/rank_share/net.5"] <= 1

    def test_none_of_them_by_default(self) -> None:
        for row in self.rows():
            assert not [key for key in row if key.startswith(("farms/share_", "farms/effect/", "farms/z/"))]

    def test_the_table_has_them(self) -> None:
        from farms_tb.training.metrics import COLUMNS, Measurement, table

        callback = FARMSTempBalance(verdicts=True, assign_func="tb_linear_map")
        fit(Module(), [callback])
        assert callback.report is not None
        (row, *_) = table(Measurement(callback.report, {}, {}, {}, 0, 0))
        named = dict(zip(COLUMNS, row, strict=True))
        record = callback.report.layers["net.0"]
        assert named["verdict"] == str(record.verdict)
        assert (named["effect"], named["rank_share"]) == (record.effect, record.rank_share)

    def test_training_and_ratios_are_the_same(self) -> None:
        runs = []
        for verdicts in (False, True):
            module, callback = Module(), FARMSTempBalance(verdicts=verdicts, assign_func="tb_linear_map")
            fit(module, [callback])
            runs.append((callback.ratios, [parameter.detach().clone() for parameter in module.parameters()]))
        (ratios, weights), (others, other_weights) = runs
        assert ratios == others
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))

    def test_a_resumed_run_keeps_its_permutation_nulls(self, tmp_path: Path) -> None:
        whole, first, resumed = (FARMSTempBalance(verdicts=True, assign_func="tb_linear_map") for _ in range(3))
        fit(Module(), [whole], max_epochs=4)
        fit(Module(), [first], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
        fit(Module(), [resumed], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        assert resumed.report == whole.report


class TestWarnings:
    def test_a_layer_that_stays_random_while_others_learn(self, recwarn: pytest.WarningsRecorder) -> None:
        net = wide_net()
        own = balancer(net)
        for index in (0, 1, 3, 4):
            learn(net[index])
        for _ in range(PATIENCE - 1):
            own.step()
        assert not [w for w in recwarn if "random layer" in str(w.message)]
        with pytest.warns(UserWarning, match="^2 is still like a random layer"):
            own.step()
        recwarn.clear()
        own.step()
        assert not [w for w in recwarn if "random layer" in str(w.message)], "once"

    def test_random_layers_among_random_ones_are_no_alarm(self, recwarn: pytest.WarningsRecorder) -> None:
        own = balancer(wide_net())
        for _ in range(2 * PATIENCE):
            own.step()
        assert not recwarn.list

    def test_layers_that_lose_their_alpha_have_not_learnt(self, recwarn: pytest.WarningsRecorder) -> None:
        net = wide_net()
        own = balancer(net)
        learn(net[0])
        for index in (1, 3, 4):
            with torch.no_grad():
                net[index].weight[1:] = net[index].weight[:1]  # of rank one
        for _ in range(2 * PATIENCE):
            own.step()
        assert not [w for w in recwarn if "random layer" in str(w.message)]
        shares = verdict_shares(own.report)
        assert shares["farms/share_random"] == shares["farms/share_trained"] == 0.5

    def test_one_that_learns_late_is_no_alarm(self, recwarn: pytest.WarningsRecorder) -> None:
        net = wide_net()
        own = balancer(net)
        for index in (0, 1, 3, 4):
            learn(net[index])
        own.step()
        learn(net[2])
        for _ in range(2 * PATIENCE):
            own.step()
        assert not [w for w in recwarn if "random layer" in str(w.message)]

    def test_a_frozen_random_layer_is_no_alarm(self, recwarn: pytest.WarningsRecorder) -> None:
        net = wide_net()
        net[2].requires_grad_(False)
        own = balancer(net)
        for index in (0, 1, 3, 4):
            learn(net[index])
        for _ in range(2 * PATIENCE):
            own.step()
        assert not [w for w in recwarn if "random layer" in str(w.message)]

    @pytest.mark.parametrize("place", [0, 2])
    @pytest.mark.filterwarnings("ignore:.*sampling noise", "ignore:.*largest alpha")
    def test_a_layer_that_collapses_is_named_once(self, place: int, recwarn: pytest.WarningsRecorder) -> None:
        """Also one that takes no part in the map, as the first layer."""
        net = wide_net()
        own = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
        collapse(net[place])
        for _ in range(3):
            own.step()
        said = [str(w.message) for w in recwarn if "collapsed" in str(w.message)]
        assert len(said) == 1
        assert f"{place}" in said[0]

    def test_a_copy_of_the_model_gets_its_own(self) -> None:
        for net in (wide_net(), copy.deepcopy(wide_net())):
            own = TempBalance(
                net, torch.optim.SGD(net.parameters(), lr=0.1), collapsed="keep", assign_func="tb_linear_map"
            )
            collapse(net[0])
            with pytest.warns(UserWarning, match="collapsed"):
                own.step()
