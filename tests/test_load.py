"""Many layers, many updates, huge models: what grows with them, and what must not.

Counts of calls and of live objects stand in for seconds; those are measured by `python -m benchmarks.load`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import (
    FARMSTempBalance,
    MatrixStack,
    TempBalance,
    analyze,
    layer_matrices,
)
from farms_tb import warnings as warning
from farms_tb.balancing import layerwise_step
from farms_tb.balancing.norms import layers_before_norms
from farms_tb.training import metrics as logs
from farms_tb.weights.layers import find_layers
from farms_tb.weights.values import NO_VALUES
from tests.helpers import EPOCHS, LIGHTNING_NOISE, Module, Recorder, fit, make_net, spy_on_updates


def deep_net(layers: int, size: int = 8) -> nn.Sequential:
    """Return linear layers each followed by a norm."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(size, size), nn.LayerNorm(size))])


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-3 * (-1) ** index)
    optimizer.step()


@pytest.fixture(scope="module")
def balanced() -> tuple[nn.Sequential, torch.optim.Optimizer, TempBalance]:
    net = deep_net(1000)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, TempBalance(net, optimizer, assign_func="tb_linear_map")


class TestThousandLayers:
    def test_every_layer_has_its_ratio(self, balanced: Any) -> None:
        _, _, balancer = balanced
        assert len(balancer.report.layers) == len(balancer.ratios) == 1000
        inner = list(balancer.ratios.values())[1:-1]
        assert (min(inner), max(inner)) == (0.5, 1.5)
        assert len(set(inner)) == 998

    def test_every_parameter_is_stepped_once_with_its_rate(self, balanced: Any) -> None:
        net, optimizer, balancer = balanced
        by_name = balancer.parameter_ratios()
        with spy_on_updates("SGD") as seen:
            for _ in range(2):
                train_step(net, optimizer)
        expected = {id(p): 0.1 * by_name[name] for name, p in net.named_parameters()}
        assert seen == [expected] * 2
        assert sum(len(group.parameters) for group in balancer.param_groups(optimizer)) == 4000

    def test_state_is_bounded(self, balanced: Any) -> None:
        _, _, balancer = balanced
        size = len(json.dumps(balancer.state_dict()))
        balancer.step()
        assert size < 900 * 1000, "bytes: the ratios and one report, however long the run"
        assert abs(len(json.dumps(balancer.state_dict())) - size) < 0.02 * size

    def test_keys_of_a_row(self, balanced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "MAX_LOGGED_LAYERS", 1000)
        _, _, balancer = balanced
        row = logs.measurement_row(balancer.report, balancer.ratios, balancer._balancer.layer_lrs(), {})
        assert len(row) == 4 * 1000


def calls(function: Callable[[], Any]) -> Counter[str]:
    """Count the calls of Python functions, by their names."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            counts[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts


def unfed_norms(layers: int) -> nn.Sequential:
    """Norms as wide as no layer: the search for the layer that each follows must not walk over all."""
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(8, 8), nn.LayerNorm(5))])


@pytest.mark.parametrize(
    "work",
    [
        lambda net: find_layers(net),
        lambda net: layers_before_norms(net, find_layers(net)),
        lambda net: TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map"),
    ],
    ids=["layers", "norms", "balance"],
)
@pytest.mark.parametrize("make", [deep_net, unfed_norms])
def test_work_is_linear_in_the_number_of_layers(work: Any, make: Any) -> None:
    small, large = make(50), make(200)
    work(small)
    number = {
        name: sum(calls(lambda net=net: work(net)).values()) for name, net in (("50", small), ("200", large))
    }
    assert number["200"] < 4.2 * number["50"]


def test_norms_follow_the_nearest_layer_of_any_of_their_widths() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Linear(6, 8), nn.LayerNorm((6, 8)), nn.Linear(8, 6), nn.LayerNorm((8, 6))
    )
    assert layers_before_norms(model, find_layers(model)) == {"2": "1", "4": "3"}


def held(*roots: object) -> int:
    """Count what the containers that can be reached from `roots` hold."""
    seen: set[int] = set()
    todo, count = list(roots), 0
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, BuiltinFunctionType)):
            continue
        seen.add(id(thing))
        count += len(thing) if isinstance(thing, (list, tuple, dict, set, frozenset, str)) else 1
        todo += gc.get_referents(thing)
    return count


def grown(update: Callable[[], Any], *roots: object, times: int = 300) -> tuple[int, int]:
    """Return how many more objects live, and are held by `roots`, after many updates than after a few."""
    for _ in range(5):
        update()
    gc.collect()
    before = len(gc.get_objects()), held(*roots)
    for _ in range(times):
        update()
    gc.collect()
    return len(gc.get_objects()) - before[0], held(*roots) - before[1]


def test_what_grows_is_seen() -> None:
    rows: dict[str, list[float]] = {"a": []}
    assert grown(lambda: rows["a"].append(0.5), rows)[1] >= 300


class TestManyUpdates:
    @pytest.mark.parametrize("name", ["SGD", "AdamW"])
    def test_nothing_accumulates(self, name: str) -> None:
        net = make_net()
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")

        def update() -> None:
            train_step(net, optimizer)
            scheduler.step()
            balancer.step()
            balancer.param_groups(optimizer)
            balancer.state_dict()

        objects, things = grown(update, balancer, optimizer, warning._said, layerwise_step._attached)
        assert abs(objects) < 50
        # Numbers in the statuses may change their length, and a warning may come once.
        assert abs(things) < 250
        assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
        assert not any(p._backward_hooks for p in net.parameters())

    def test_layers_that_cannot_be_measured_do_not_pile_up_warnings(self) -> None:
        net = make_net()
        nn.init.zeros_(net[5].weight)
        net[5].weight.requires_grad_(True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with pytest.warns(UserWarning, match="keep the base learning rate: 5: all weights are zero"):
            balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
        objects, things = grown(balancer.step, balancer, optimizer, warning._said, times=100)
        assert abs(objects) < 50
        assert abs(things) < 50

    def test_models_that_are_dropped_are_freed(self) -> None:
        """A search over settings in one process trains one model after another, and may never detach."""
        freed = []
        for _ in range(3):
            net = make_net()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
            train_step(net, optimizer)
            freed += [weakref.ref(thing) for thing in (net, net[0].weight, optimizer, balancer)]
        del net, optimizer, balancer
        gc.collect()
        assert [reference() for reference in freed] == [None] * 12

    def test_attaching_and_detaching(self) -> None:
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def once() -> None:
            TempBalance(net, optimizer, assign_func="tb_linear_map").detach()

        objects, things = grown(once, optimizer, warning._said, layerwise_step._attached, times=100)
        assert abs(objects) < 50
        assert abs(things) < 50
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class TestMetaDevice:
    def test_two_billion_parameters(self) -> None:
        with torch.device("meta"):
            blocks = [
                nn.Sequential(nn.Linear(4096, 11008, bias=False), nn.LayerNorm(11008), nn.Linear(11008, 4096))
                for _ in range(24)
            ]
        model = nn.Sequential(*blocks)
        assert sum(p.numel() for p in model.parameters()) > 2_000_000_000
        tracemalloc.start()
        start = time.perf_counter()
        report = analyze(model)
        seconds = time.perf_counter() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(report.layers) == 48
        for record in report.layers.values():
            # 9 x 9 windows of 100 x 100
            assert (record.kind, record.shape, record.num_eigenvalues) == ("real", (1, 11008, 4096), 8100)
            assert record.status == NO_VALUES
            assert record.alpha is record.spectral_norm is record.entropy is None
        assert "1 x 11008 x 4096" in str(report)
        assert seconds < 5
        assert peak < 10_000_000

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Linear(300, 130),
            lambda: nn.Conv2d(16, 40, 3),
            lambda: nn.ConvTranspose1d(12, 24, 5, groups=2),
            lambda: nn.MultiheadAttention(32, 4),
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30)),
        ],
        ids=["linear", "convolution", "groups", "attention", "parametrized"],
    )
    @pytest.mark.parametrize("options", [{}, {"esd": "full"}, {"aspect_ratio": 0.5}, {"window_step": 7}])
    def test_the_plan_is_what_a_measurement_does(self, make: Any, options: dict[str, Any]) -> None:
        model = make()
        done, plan = analyze(model, **options), analyze(model.to("meta"), **options)
        assert plan.layers.keys() == done.layers.keys()
        for name, record in plan.layers.items():
            real = done.layers[name]
            assert real.status == "ok" or record.status == real.status
            assert (record.kind, record.shape, record.num_eigenvalues) == (
                real.kind,
                real.shape,
                real.num_eigenvalues,
            )
            assert record.alpha is None

    @pytest.mark.parametrize(
        ("layer", "options"),
        [(nn.Linear(1, 9), {}), (nn.Linear(3, 3), {}), (nn.Linear(40, 3), {"aspect_ratio": 10})],
        ids=["one column", "too few", "no window"],
    )
    def test_what_the_shape_rules_out_is_said_already(self, layer: nn.Module, options: dict[str, Any]) -> None:
        model = nn.Sequential(layer, nn.Linear(50, 50))
        status = analyze(model, **options).layers["0"].status
        assert status != "ok"
        assert analyze(model.to("meta"), **options).layers["0"].status == status

    def test_some_layers_on_meta(self) -> None:
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30, device="meta"))
        report = analyze(model)
        assert [record.status for record in report.layers.values()] == ["ok", NO_VALUES]
        assert report.layers["0"] == analyze(model[:1]).layers["0"]
        assert report.layers["1"].num_eigenvalues == 30

    def test_a_rule_that_needs_values(self) -> None:
        class Pruned(nn.Linear):
            pass

        @layer_matrices.register(Pruned)
        def _(module: nn.Linear) -> list[MatrixStack]:
            rows = module.weight[module.weight.abs().sum(1).nonzero()[:, 0].tolist()]
            return [MatrixStack(rows.detach()[None])]

        with torch.device("meta"):
            model = nn.Sequential(Pruned(9, 9), nn.Linear(9, 9))
        layers = analyze(model).layers
        assert layers["0"].status == layers["1"].status == NO_VALUES
        assert (layers["0"].shape, layers["1"].shape) == ((), (1, 9, 9))

    def test_balancing_is_refused(self) -> None:
        model = make_net().to("meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"Sequential is on the meta device: .* model.to_empty\(device=...\)"):
            TempBalance(model, optimizer, assign_func="tb_linear_map")
        assert not optimizer._optimizer_step_pre_hooks

    def test_balancing_skips_what_has_no_values(self) -> None:
        model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(5)])
        model[2].to("meta")
        balancer = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), assign_func="tb_linear_map")
        assert sorted(balancer.ratios.values()) == [0.5, 1.0, 1.0, 1.0, 1.5]
        assert balancer.ratios["2"] == 1

    def test_nothing_to_plan_for(self) -> None:
        with pytest.raises(ValueError, match="has no layer that can be analysed"):
            analyze(nn.Embedding(9, 9, device="meta"))


class TestManyKeys:
    pytestmark = LIGHTNING_NOISE
    WARNING = "the model has 5 layers: with more than 4, only what sums them up"

    def rows(self, callback: FARMSTempBalance) -> list[dict[str, float]]:
        logger = Recorder()
        fit(Module(), [callback], logger=logger)
        return [row for _, row in logger.rows if "farms/alpha_mean" in row]

    def test_up_to_the_bound_every_layer_is_logged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "MAX_LOGGED_LAYERS", 5)
        assert len(self.rows(FARMSTempBalance(assign_func="tb_linear_map"))[0]) == 4 + 4 * 5

    @pytest.mark.filterwarnings("ignore:histogram_every_n is set, and no logger takes histograms")
    def test_beyond_it_the_aggregates_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "MAX_LOGGED_LAYERS", 4)
        callback = FARMSTempBalance(histogram_every_n=1, assign_func="tb_linear_map")
        with pytest.warns(UserWarning, match=self.WARNING) as caught:
            rows = self.rows(callback)
        assert sum("farms/alpha_mean" in str(one.message) for one in caught) == 1
        aggregates = {"epoch", "farms/alpha_mean", "farms/alpha_std"}
        expected = [aggregates | {"farms/ratio_mean"}] * EPOCHS + [aggregates]
        assert [set(row) for row in rows] == expected
        assert callback.report is not None
        assert logs.esd_histograms(callback.report) == {}
        assert set(callback.ratios.values()) >= {0.5, 1.0, 1.5}

    def test_nothing_is_said_where_nothing_is_logged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "MAX_LOGGED_LAYERS", 4)
        assert self.rows(FARMSTempBalance(log=False, assign_func="tb_linear_map")) == []

    def test_bound_is_below_what_wandb_advises(self) -> None:
        assert (len(logs.LAYER_METRICS) + 3) * logs.MAX_LOGGED_LAYERS < 10_000 - 100


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import load

    monkeypatch.setattr(load, "BLOCK", 10)
    options = ["--layers", "4", "6", "--updates", "30", "--times", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["load", *options])
    threads = torch.get_num_threads()
    try:
        load.main()
    finally:
        torch.set_num_threads(threads)
    assert {path.name for path in tmp_path.iterdir()} == {"load.png", "run.csv", "scaling.csv"}
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    for word in ("machine", "versions", "find_layers", "30 updates", "2.16 billion parameters, 48 layers"):
        assert word in printed


def test_the_benchmark_refuses_less_than_a_block_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import load

    monkeypatch.setattr(sys, "argv", ["load", "--updates", "50"])
    with pytest.raises(SystemExit):
        load.main()
    said = capsys.readouterr()
    assert "--updates must be at least 100" in said.err
    assert said.out == ""
