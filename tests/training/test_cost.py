"""A warning, once a run, where measuring takes a noticeable share of training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from farms_tb import FARMSTempBalance
from farms_tb.training.cost import MIN_MEASUREMENTS, MIN_SECONDS, MeasuringCost
from tests.helpers import LIGHTNING_NOISE, Module, assert_same_weights, fit

pytestmark = LIGHTNING_NOISE


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that makes each look at the clock take so many seconds."""

    def slow_down(seconds: float) -> None:
        now = iter(range(10**9))
        monkeypatch.setattr(time, "perf_counter", lambda: next(now) * seconds)

    return slow_down


def train(*callbacks: Callback, **options: int) -> tuple[Module, list[str]]:
    module = Module()
    balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [balance, *callbacks])
    return module, [str(w.message) for w in caught if "time of training" in str(w.message)]


def test_slow_measurements_are_named_once_and_change_nothing(slow: Callable[[float], None]) -> None:
    plain, silent = train(every_n_steps=1)
    assert silent == [], "a run this short is a trial"
    slow(10.0)
    module, (said,) = train(every_n_steps=1)
    assert "every_n_epochs" in said
    assert "every_n_steps" in said
    assert_same_weights(module, plain)


def test_every_run_may_say_it(slow: Callable[[float], None]) -> None:
    slow(10.0)
    assert [len(train()[1]) for _ in range(2)] == [1, 1]


def test_the_first_measurement_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that compares layers with random ones takes long once: measuring less often would not help."""
    seconds, now = [1000.0], [0.0]

    def clock() -> float:
        now[0] += seconds[0]
        return now[0]

    class Quick(Callback):
        """Let the clock run slowly from the first batch on."""

        def on_train_batch_start(self, *_: Any) -> None:
            seconds[0] = 0.01

    monkeypatch.setattr(time, "perf_counter", clock)
    assert train(Quick(), every_n_steps=1)[1] == []
    assert now[0] > 1000


def test_a_long_first_measurement_hides_no_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """If its time counted as training, the later ones would be a small share of it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    cost = MeasuringCost()
    with cost.measurement():
        now[0] += 1000.0

    def train_and_measure() -> None:
        for _ in range(MIN_MEASUREMENTS):
            now[0] += MIN_SECONDS
            with cost.measurement():
                now[0] += MIN_SECONDS / 5

    with pytest.warns(UserWarning, match="time of training"):
        train_and_measure()
