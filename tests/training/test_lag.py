"""Measuring in the background: the ratios become active a fixed number of steps later."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance, analyze
from farms_tb.options import SpectrumOptions
from farms_tb.spectra import background
from farms_tb.weights.layers import find_layers
from tests.helpers import (
    BATCHES,
    EPOCHS,
    LIGHTNING_NOISE,
    Module,
    Probe,
    Recorder,
    assert_same_state,
    assert_same_weights,
    fit,
)
from tests.spectra.test_distributed import results

pytestmark = [*LIGHTNING_NOISE, pytest.mark.filterwarnings("ignore:histogram_every_n")]


@pytest.fixture(params=["in the background", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where measuring runs in the background, as on a GPU, and where it is done at once, as on the CPU."""
    if request.param == "in the background":
        monkeypatch.setattr(background, "BACKGROUND_DEVICES", ("cpu",))
    return request.param


class Nets(Callback):
    """Keep a copy of the net as it is at the start of each epoch."""

    def __init__(self) -> None:
        self.nets: list[nn.Module] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.nets.append(copy.deepcopy(pl_module))


def train(lag_steps: int, **options: Any) -> tuple[Module, FARMSTempBalance, Nets, Probe, Recorder]:
    module, nets, logger = Module(), Nets(), Recorder()
    balance = FARMSTempBalance(lag_steps=lag_steps, **{"assign_func": "tb_linear_map", **options})
    probe = Probe(balance)
    fit(module, [nets, balance, probe], logger=logger)
    return module, balance, nets, probe, logger


@pytest.mark.parametrize("lag", [1, 2, BATCHES - 1, BATCHES, BATCHES + 3, 1000])
def test_ratios_are_those_of_the_weights_so_many_steps_ago(lag: int, way: str) -> None:
    module, _, nets, probe, logger = train(lag)
    names = [name for name, _ in module.named_parameters()]
    assert len(nets.nets) == EPOCHS
    assert len(probe.ratios) == EPOCHS * BATCHES
    by_epoch = []
    for net in nets.nets:
        other = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
        by_epoch.append([other.parameter_ratios()[name] for name in names])
    for step, ratios in enumerate(probe.ratios):
        epoch, into = divmod(step, BATCHES)
        # The first measurement is waited for; one that is not over when the next begins is finished then.
        known = epoch if epoch == 0 or into >= lag else epoch - 1
        assert list(ratios.values()) == by_epoch[known], f"step {step}"
    # A row is of the step at which its ratios take effect, and has the alphas that these follow from. The last one
    # is of the final weights; what was begun to be measured and no step would take is not logged.
    effect = [0] + [epoch * BATCHES + min(lag, BATCHES) for epoch in range(1, EPOCHS)]
    expected = [(at, net) for at, net in zip(effect, nets.nets, strict=True) if at < EPOCHS * BATCHES]
    rows = [(step, row) for step, row in logger.rows if "farms/alpha_mean" in row]
    assert [step for step, _ in rows] == [*(step for step, _ in expected), EPOCHS * BATCHES]
    for (_, row), net in zip(rows, [*(net for _, net in expected), module], strict=True):
        assert row["farms/alpha/net.5"] == analyze(net).alphas["net.5"]
        assert ("farms/ratio/net.5" in row) is (net is not module)
    assert len({tuple(ratios) for ratios in by_epoch}) == EPOCHS


def test_a_run_that_ends_where_it_was_measured_has_a_row_of_its_final_weights(way: str) -> None:
    """Begun in the background, that measurement has no row of its own, as no step follows."""

    class Ends(Module):
        def on_train_batch_start(self, *_: Any) -> int | None:
            return -1 if self.global_step == 2 * BATCHES else None

    module, logger = Ends(), Recorder()
    fit(module, [FARMSTempBalance(lag_steps=2, assign_func="tb_linear_map")], logger=logger)
    rows = [(step, row) for step, row in logger.rows if "farms/alpha_mean" in row]
    assert [step for step, _ in rows] == [0, BATCHES + 2, 2 * BATCHES]
    assert rows[-1][1]["farms/alpha/net.5"] == analyze(module).alphas["net.5"]
    assert "farms/ratio/net.5" not in rows[-1][1]


def test_in_the_background_is_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = train(2, histogram_every_n=2, assign_func="noise_aware")
    monkeypatch.setattr(background, "BACKGROUND_DEVICES", ("cpu",))
    threaded = train(2, histogram_every_n=2, assign_func="noise_aware")
    assert_same_weights(threaded[0], at_once[0])
    assert threaded[1].report == at_once[1].report
    assert threaded[-1].rows == at_once[-1].rows


def test_it_is_measured_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BACKGROUND_DEVICES", ("cpu",))
    measure, threads = background.measure_stacks, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return measure(*args, **kwargs)

    monkeypatch.setattr(background, "measure_stacks", watched)
    train(2)
    assert len(threads) == EPOCHS - 1
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_steps_meanwhile_do_not_touch_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are copied before the next step changes them in place."""
    monkeypatch.setattr(background, "BACKGROUND_DEVICES", ("cpu",))
    measure, stepped = background.measure_stacks, threading.Event()

    def after_a_step(*args: Any, **kwargs: Any) -> Any:
        assert stepped.wait(timeout=60)
        stepped.clear()
        return measure(*args, **kwargs)

    class Stepped(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            stepped.set()

    at_once = Module()
    fit(at_once, [FARMSTempBalance(lag_steps=2, assign_func="tb_linear_map")])
    module = Module()
    monkeypatch.setattr(background, "measure_stacks", after_a_step)
    fit(module, [FARMSTempBalance(lag_steps=2, assign_func="tb_linear_map"), Stepped()])
    assert_same_weights(module, at_once)


def test_an_error_is_raised_where_it_is_waited_for(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("planned")

    monkeypatch.setattr(background, "measure_stacks", fail)
    with pytest.raises(ArithmeticError, match="planned"):
        train(2)


def test_copies_that_do_not_fit_are_an_error_of_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised at once on one process, it would leave the others waiting for its share of a gathered weight."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("planned")

    layers = find_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    monkeypatch.setattr(torch.Tensor, "clone", fail)
    measurement = background.BackgroundMeasurement(layers, SpectrumOptions())
    with pytest.raises(torch.OutOfMemoryError, match="planned"):
        measurement.finish()


def test_an_interrupted_run_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BACKGROUND_DEVICES", ("cpu",))

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == BATCHES + 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Module(), [FARMSTempBalance(lag_steps=3, assign_func="tb_linear_map"), Fails()])
    assert not [thread for thread in threading.enumerate() if thread.name == "farms_tb"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_runs_are_the_same() -> None:
    runs = []
    for _ in range(2):
        module = Module()
        fit(module, [FARMSTempBalance(lag_steps=2, assign_func="tb_linear_map")], accelerator="gpu")
        runs.append(module)
    assert_same_weights(*runs)


def test_processes_apply_the_same(tmp_path: Path) -> None:
    first, second = results("lightning with a lag", tmp_path)
    for way, in_a_thread in (("at once", False), ("in the background", True)):
        assert set(first[way].pop("in a thread")) == {in_a_thread}
        assert set(second[way].pop("in a thread")) == {in_a_thread}
        assert first[way].pop("rows")
        assert not second[way].pop("rows")
    assert_same_state(first, second)
    assert_same_state(first["in the background"], first["at once"])
