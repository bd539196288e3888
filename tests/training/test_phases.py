"""From when, and until when, ratios apply: measured steps, effective learning rates, bad times."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from farms_tb import FARMSTempBalance
from farms_tb.options import LoggingOptions, ScheduleOptions
from farms_tb.training.schedule import RunLength, Schedule
from tests.helpers import (
    LIGHTNING_NOISE,
    Module,
    Recorder,
    fit,
    make_data,
    make_trainer,
    spy_on_updates,
)

pytestmark = LIGHTNING_NOISE
LAYERS = ("net.2", "net.5", "net.7")


class Watch(Callback):
    """Notes the ratios with which each step is made, and the ratio that the optimizer really uses."""

    def __init__(self, balance: FARMSTempBalance) -> None:
        self.balance = balance
        self.ratios: list[dict[str, float]] = []
        self.moved: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.ratios.append(self.balance.ratios)
        groups = self.balance.param_groups(trainer.optimizers[0])
        self.moved.append(max(group.lr / 0.1 for group in groups if group.lr is not None))


def watched(**options: Any) -> tuple[list[dict[str, float]], list[float], list[int]]:
    """Train for three epochs of four steps; return what `Watch` noted, and the steps of the measurements."""
    balance, logger = FARMSTempBalance(assign_func="tb_linear_map", **options), Recorder()
    watch = Watch(balance)
    fit(Module(), [balance, watch], logger=logger)
    steps = [step for step, row in logger.rows if "farms/alpha_mean" in row]
    return watch.ratios, watch.moved, steps


def spread(ratios: dict[str, float]) -> float:
    return max(ratios.values()) - min(ratios.values())


@pytest.mark.parametrize("start", ["5 steps", 5 / 12, 0.4])
def test_every_ratio_is_one_before_start_and_it_is_measured_then(start: Any) -> None:
    ratios, moved, steps = watched(start=start)
    assert [spread(one) > 0 for one in ratios] == [False] * 5 + [True] * 7
    assert moved[:5] == [1.0] * 5
    assert moved[5] == pytest.approx(1.5)
    assert steps == [0, 4, 5, 8, 12]


def test_weights_are_bitwise_those_of_a_plain_run_until_start() -> None:
    balanced, plain = Module(), Module()
    fit(balanced, [FARMSTempBalance(start="2 epochs", assign_func="tb_linear_map")], max_epochs=2)
    fit(plain, [], max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(balanced.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("until", ["1 epoch", "4 steps", 1 / 3])
def test_ratios_stay_after_until_and_nothing_is_measured(until: Any) -> None:
    ratios, _, steps = watched(until=until)
    assert all(one == ratios[0] for one in ratios)
    assert spread(ratios[0]) == 1
    assert steps == [0, 12]


def test_ratios_grow_in_a_straight_line() -> None:
    ratios, moved, _ = watched(start="2 steps", ramp_steps=4, until="3 steps")
    final = ratios[-1]
    strengths = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    for strength, now, largest in zip(strengths, ratios, moved, strict=True):
        assert now == pytest.approx({name: 1 + strength * (ratio - 1) for name, ratio in final.items()})
        assert largest == pytest.approx(max(now.values()))


NEW_NAMES: dict[str, Any] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.2),
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("how", NEW_NAMES)
@pytest.mark.parametrize("clock", [{"every_n_epochs": 3}, {"every_n_steps": 3, "lag_steps": 2}], ids=str)
def test_a_weight_that_gets_another_name_keeps_its_ratio_while_ratios_grow(
    clock: dict[str, Any], how: str
) -> None:
    """Its parameter stays the same object; growing ratios are given out anew before each step."""
    balance = FARMSTempBalance(assign_func="tb_linear_map", ramp_steps=10, **clock)
    module = Module(lambda params: torch.optim.SGD(params, lr=0.1))
    layer = module.net.get_submodule("5")
    weight, expected = layer.weight, list[float]()

    def rename(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            NEW_NAMES[how](layer)

    def note(*_: Any) -> None:
        ratio = balance.ratios["net.5"]
        expected.append(0.1 * ratio)
        (name,) = (name for name, parameter in module.named_parameters() if parameter is weight)
        assert balance.parameter_ratios(module)[name] == ratio
        assert "net.5" in {layer for group in balance.param_groups(module.optimizers()) for layer in group.layers}

    watch = LambdaCallback(on_train_batch_start=rename, on_before_optimizer_step=note)
    with spy_on_updates("SGD") as seen:
        fit(module, [balance, watch])
    assert [lrs[id(weight)] for lrs in seen] == expected
    assert len(set(expected)) >= 10, "no ratio grew: the test shows nothing"


@pytest.mark.parametrize(
    ("number", "steps"), [(1, [0, 4, 8, 12]), (2, [0, 2, 4, 6, 8, 10, 12]), (9, [*range(13)])]
)
def test_measurements_of_an_epoch(number: int, steps: list[int]) -> None:
    assert watched(measurements_per_epoch=number)[2] == steps


def test_measurements_of_an_epoch_that_they_do_not_divide() -> None:
    """Ten in 19 steps are ten: one every second step would be nineteen measurements in two epochs."""
    clock = Schedule(ScheduleOptions(measurements_per_epoch=10), LoggingOptions(), RunLength(19, 57))
    measured = []
    for step in range(57):
        if clock.is_due(step // 19, step):
            clock.tick(step // 19, step)
            measured.append(step)
    assert [sum(step // 19 == epoch for step in measured) for epoch in range(3)] == [10, 10, 10]
    assert {later - step for step, later in itertools.pairwise(measured)} == {1, 2}


class Stream(IterableDataset):
    """Batches whose number nobody knows."""

    def __iter__(self) -> Any:
        return itertools.islice(itertools.cycle(make_data()), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 0.5}, "until=0.5 is a fraction of a run whose length the trainer does not know"),
        ({"measurements_per_epoch": 2}, "measurements_per_epoch needs epochs of a known length"),
    ],
)
def test_a_length_that_nobody_knows(options: Any, message: str) -> None:
    trainer = make_trainer([FARMSTempBalance(assign_func="tb_linear_map", **options)], max_epochs=-1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Module(), DataLoader(Stream(), batch_size=None))


@pytest.mark.parametrize(
    ("start", "until", "first", "last"),
    [(0.5, "5 steps", 6, 5), ("20 steps", "1 epoch", 20, 4), ("2 epochs", "8 steps", 8, 8)],
)
def test_until_before_start_in_other_units(start: Any, until: Any, first: int, last: int) -> None:
    with pytest.raises(
        ValueError, match=rf"until must be later than start, .* is step {first}, .* is step {last}"
    ):
        fit(Module(), [FARMSTempBalance(start=start, until=until, assign_func="tb_linear_map")])
