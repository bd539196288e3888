"""`max_overhead`: which times to measure are left out, and that it depends on the timings alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from farms_tb import FARMSTempBalance
from farms_tb.training import overhead
from farms_tb.training.overhead import TIMINGS_FILE, Tally, read_timings
from farms_tb.training.schedule import Schedule
from tests.helpers import BATCHES, LIGHTNING_NOISE, Module, Recorder, assert_same_state, assert_same_weights, fit
from tests.spectra.test_distributed import results
from tests.training.test_resume import STOPS, finish_and_compare, train

pytestmark = [
    *LIGHTNING_NOISE,
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]
less_often = pytest.mark.filterwarnings("ignore:measuring has taken .* less often than configured")
file_ends = pytest.mark.filterwarnings("ignore:.* is used up")

# Powers of two, so that sums are exact.
SECOND, QUARTER, EIGHTH = 1.0, 0.25, 0.125


def write_timings(path: Path, training: Sequence[float], measurements: Sequence[float]) -> str:
    """Write a file of timings; what is of which epoch is for readers alone."""
    rows = [f"training,0,0,{seconds!r}" for seconds in training]
    rows += [f"{'plain' if number else 'first'},0,0,{seconds!r}" for number, seconds in enumerate(measurements)]
    path.write_text("\n".join(["what,epoch,step,seconds", *rows, ""]))
    return str(path)


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, Any]:
    """Options under which measuring takes a quarter of an epoch and may take an eighth."""
    path = write_timings(tmp_path / "slow.csv", [SECOND] * 99, [QUARTER] * 99)
    return {"max_overhead": EIGHTH, "timings_file": path}


def run(folder: Path, epochs: int, **options: Any) -> tuple[Module, FARMSTempBalance, list[dict[str, float]]]:
    """Train, and return what was logged of the measurements."""
    module, balance, logger = Module(), FARMSTempBalance(**options), Recorder()
    fit(module, [balance], logger=logger, max_epochs=epochs, default_root_dir=folder)
    rows = [{**row, "step": step or 0} for step, row in logger.rows if "farms/alpha_mean" in row]
    return module, balance, rows


def choose(schedule: Schedule, times: int) -> list[int]:
    """Return the epochs at which a run would measure."""
    chosen = []
    for epoch in range(times):
        if schedule.is_due(epoch, epoch) and schedule.claim(epoch, epoch):
            with schedule.timed(epoch, epoch):
                schedule.tick(epoch, epoch)
            chosen.append(epoch)
    return chosen


# What is left out


@less_often
def test_slow_measurements_are_left_out(slow: dict[str, Any], tmp_path: Path) -> None:
    """A quarter of a second is an eighth of two, four quarters are one of eight, and so on in steps of two."""
    _, balance, rows = run(tmp_path, 20, **slow)
    measured = [0, 2, *range(8, 20, 2)]
    assert [row["epoch"] for row in rows] == [*measured, 20]
    assert "farms/interval" not in rows[0]
    assert "farms/overhead" not in rows[0]
    assert [row["farms/interval"] for row in rows[1:-1]] == [2, 6] + [2] * 5
    shares = [QUARTER * number / epoch for number, epoch in enumerate(measured) if epoch]
    assert [row["farms/overhead"] for row in rows[1:-1]] == shares
    assert max(shares) == EIGHTH
    # The final weights are counted before they come: with them, the run is within its budget.
    assert len(rows) * QUARTER <= EIGHTH * 20 < (len(rows) + 2) * QUARTER
    assert balance.ratios != dict.fromkeys(balance.ratios, 1.0)


@less_often
@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"every_n_epochs": 2}, 20, [0, 16, 64, 80]),
        ({"every_n_steps": 3}, 9, [0, 6, 24, 30, 36]),
        ({"every_n_steps": 3, "every_n_epochs": 7}, 9, [0, 6, 24, 30, 36]),
    ],
)
def test_the_interval_is_a_multiple_of_the_one_configured(
    options: dict[str, Any], epochs: int, steps: list[int], slow: dict[str, Any], tmp_path: Path
) -> None:
    _, _, rows = run(tmp_path, epochs, **options, **slow)
    assert [row["step"] for row in rows] == steps
    unit = 1 if "every_n_steps" in options else BATCHES
    gaps = [(after - before) / unit for before, after in pairwise(steps)]
    assert [row["farms/interval"] for row in rows[1:-1]] == gaps[:-1]


def test_cheap_measurements_are_all_made(tmp_path: Path) -> None:
    path = write_timings(tmp_path / "cheap.csv", [SECOND] * 9, [0.001] * 9)
    _, _, rows = run(tmp_path, 5, max_overhead=0.02, timings_file=path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.get("farms/interval") for row in rows] == [None, 1, 1, 1, 1, None]


@less_often
def test_a_slow_first_measurement_is_paid_off_first(tmp_path: Path) -> None:
    """That of the noise-aware map measures random layers too; it says nothing of those that follow it."""
    path = write_timings(tmp_path / "first.csv", [SECOND] * 300, [8.0] + [QUARTER] * 300)
    chosen = choose(Schedule(max_overhead=EIGHTH, timings_file=path), 300)
    assert chosen[:3] == [0, 8 * 8, 8 * 8 + 3 * 2]
    assert {after - before for before, after in pairwise(chosen[2:])} == {2}


@less_often
@pytest.mark.parametrize("seed", range(5))
def test_noisy_timings_stay_within_the_budget(seed: int, tmp_path: Path) -> None:
    """Noise of 30 %, and pictures at every third measurement that take ten times as long."""
    draw = random.Random(seed)
    training = [draw.lognormvariate(0, 0.3) for _ in range(2000)]
    costs = [draw.lognormvariate(0, 0.3) * (1.0 if number % 3 == 0 else 0.1) for number in range(2000)]
    path = write_timings(tmp_path / "noisy.csv", training, costs)
    schedule = Schedule(max_overhead=0.05, timings_file=path, table_every_n=3)
    chosen = choose(schedule, 2000)
    spent = sum(costs[: len(chosen)]) + max(costs)
    assert 0.95 * 0.05 < spent / sum(training) < 1.05 * 0.05
    gaps = [after - before for before, after in pairwise(chosen[1:])]
    assert max(gaps) < 100, "it never stops for good"


@less_often
@pytest.mark.parametrize("standstill", ["training", "measurement"])
def test_a_machine_that_stood_still_changes_little(standstill: str, tmp_path: Path) -> None:
    training, costs = [SECOND] * 400, [QUARTER] * 400
    (training if standstill == "training" else costs)[20] = 3600.0
    path = write_timings(tmp_path / "still.csv", training, costs)
    chosen = choose(Schedule(max_overhead=EIGHTH, timings_file=path), 400)
    gaps = [after - before for before, after in pairwise(chosen[1:])]
    assert gaps.count(2) >= len(gaps) - 3
    assert max(gaps) == 6, "as at the start, or after what counts as three measurements"


def test_training_of_no_time_at_all(tmp_path: Path) -> None:
    path = write_timings(tmp_path / "zero.csv", [0.0] * 99, [0.0] * 99)
    schedule = Schedule(max_overhead=0.01, timings_file=path)
    assert choose(schedule, 10) == list(range(10))
    assert "farms/overhead" not in schedule.summary


@pytest.mark.parametrize("size", [1, 2, 5, 31, 32, 200])
def test_tally_of_ordinary_timings_is_their_sum(size: int) -> None:
    timings = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).add(1).tolist()
    tally = Tally()
    for seconds in timings:
        tally.add(seconds)
    assert tally.total == pytest.approx(sum(timings), rel=1e-12)


@pytest.mark.parametrize("place", [0, 1, 20, 40, 79])
def test_an_outlier_counts_three_times_the_median(place: int) -> None:
    timings = [1.0] * 80
    timings[place] = 1e6
    tally = Tally()
    for seconds in timings:
        tally.add(seconds)
    assert tally.total == 82


# The file


@less_often
def test_timings_of_the_clock_are_kept_and_choose_the_same_again(tmp_path: Path) -> None:
    """No two runs take equally long, but with the timings of the first, the second is the first to the bit."""
    first, _, rows = run(tmp_path / "first", 12, max_overhead=0.3)
    written = tmp_path / "first" / TIMINGS_FILE
    timings = read_timings(written)
    assert [row.epoch for row in timings if row.what == "training"] == list(range(1, 12))
    measured = [row.epoch for row in timings if row.what != "training"]
    assert measured == [row["epoch"] for row in rows][:-1]
    assert [row.what for row in timings if row.what != "training"] == ["first"] + ["plain"] * (len(measured) - 1)
    assert all(row.step == BATCHES * row.epoch and 0 < row.seconds < 10 for row in timings)

    again, _, same = run(tmp_path / "again", 12, max_overhead=0.3, timings_file=str(written))
    assert (tmp_path / "again" / TIMINGS_FILE).read_bytes() == written.read_bytes()
    # The share at the very end counts the last epoch of each run.
    assert same[:-1] == rows[:-1]
    assert_same_weights(again, first)


@less_often
def test_the_file_is_in_the_folder_of_the_first_logger(slow: dict[str, Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="", version="a")
    fit(Module(), [FARMSTempBalance(**slow)], logger=[logger, Recorder()], default_root_dir=tmp_path)
    assert len(read_timings(tmp_path / "logs" / "a" / TIMINGS_FILE)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "slow.csv"]


def test_without_a_budget_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "time", None)
    _, balance, _ = run(tmp_path, 2)
    assert not list(tmp_path.iterdir())
    assert balance.state_dict().keys() == {"balancer", "epoch", "step", "measurements"}


@less_often
def test_another_run_begins_a_new_file(slow: dict[str, Any], tmp_path: Path) -> None:
    balance = FARMSTempBalance(**slow)
    for epochs in (9, 7):
        fit(Module(), [balance], max_epochs=epochs, default_root_dir=tmp_path)
        assert len(read_timings(tmp_path / TIMINGS_FILE)) == epochs - 1 + (3 if epochs == 9 else 2)
    assert not list(tmp_path.glob("*.part"))


@less_often
def test_when_the_file_ends_the_clock_goes_on(tmp_path: Path) -> None:
    path = write_timings(tmp_path / "short.csv", [SECOND] * 2, [QUARTER] * 2)
    with pytest.warns(UserWarning, match=r"short.csv is used up: from here on the clock's timings") as said:
        run(tmp_path, 8, max_overhead=EIGHTH, timings_file=path)
    assert sum("is used up" in str(warning.message) for warning in said) == 1
    seconds = [row.seconds for row in read_timings(tmp_path / TIMINGS_FILE)]
    assert seconds[:4] == [QUARTER, SECOND, SECOND, QUARTER]
    assert all(0 < value != SECOND for value in seconds[4:])
    assert len(seconds) == 7 + 2


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_cut_short_is_not_taken_for_whole(cut: int, tmp_path: Path) -> None:
    path = Path(write_timings(tmp_path / "cut.csv", [0.5, 123.456], [0.25]))
    path.write_text(path.read_text()[:-cut])
    assert [row.seconds for row in read_timings(path)] == [0.5, 123.456]


BAD = ["training,1,4", "testing,1,4,1.0", "training,one,4,1.0", "plain,1,4,-1.0", "plain,1,4,nan", ""]


@pytest.mark.parametrize("row", BAD)
def test_a_bad_row_is_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"what,epoch,step,seconds\ntraining,1,4,1.0\n{row}\nplain,1,4,0.5\n")
    with pytest.raises(ValueError, match=rf"seconds, got '{row}' in .*bad.csv, line 3"):
        FARMSTempBalance(max_overhead=0.02, timings_file=path)


@pytest.mark.parametrize("value", [0, -0.1, 2, True, "2%"])
def test_bad_budgets_are_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="max_overhead must be "):
        FARMSTempBalance(max_overhead=value)


def test_the_file_to_write_cannot_be_the_one_to_read(slow: dict[str, Any], tmp_path: Path) -> None:
    Path(slow["timings_file"]).rename(tmp_path / TIMINGS_FILE)
    balance, module = FARMSTempBalance(max_overhead=0.1, timings_file=tmp_path / TIMINGS_FILE), Module()
    with pytest.raises(ValueError, match="is where this run writes its own timings: move it elsewhere"):
        fit(module, [balance], default_root_dir=tmp_path)
    assert len(read_timings(tmp_path / TIMINGS_FILE)) == 198
    assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks


# Resuming


@less_often
@file_ends
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("every", [{}, {"every_n_steps": 1}], ids=str)
def test_a_resumed_run_chooses_as_the_unbroken_one(stop: str, every: dict[str, Any], tmp_path: Path) -> None:
    saving, options, name = STOPS[stop]
    limit = EIGHTH if every else 3 * EIGHTH
    path = write_timings(tmp_path / "slow.csv", [SECOND] * 99, [QUARTER] * 99)
    clock = {"max_overhead": limit, "timings_file": path, **every}
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, **saving)
    balance, logger = FARMSTempBalance(**clock), Recorder()
    module, _ = train([balance, keep], logger=logger, **options, default_root_dir=tmp_path / "whole")
    steps = [step for step, row in logger.rows if "farms/interval" in row]
    assert steps == ([2, 8, 10, 12, 14] if every else [4, 12])
    options = {**options, "default_root_dir": tmp_path / "resumed"}
    finish_and_compare(clock, tmp_path / f"{name}.ckpt", module, balance, logger, **options)
    files = [(tmp_path / folder / TIMINGS_FILE).read_bytes() for folder in ("whole", "resumed")]
    assert files[0] == files[1]


@less_often
def test_time_of_an_epoch_broken_off_is_not_lost(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    train([FARMSTempBalance(max_overhead=0.9), keep], default_root_dir=tmp_path)
    checkpoint = tmp_path / "epoch=1-step=6.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["FARMSTempBalance"]["overhead"]
    # As if it had been a slow epoch.
    state["elapsed"] += 5.0
    whole = torch.load(checkpoint, weights_only=True)
    whole["callbacks"]["FARMSTempBalance"]["overhead"] = state
    torch.save(whole, checkpoint)
    options = {"enable_checkpointing": False, "default_root_dir": tmp_path / "resumed"}
    train([FARMSTempBalance(max_overhead=0.9)], checkpoint, **options)
    rows = [list(row) for row in read_timings(tmp_path / "resumed" / TIMINGS_FILE)]
    assert rows[: len(state["timings"])] == state["timings"]
    assert [row[3] > 5 for row in rows if row[0] == "training"] == [False, True, False]


@less_often
def test_checkpoints_with_and_without_timings_are_interchangeable(slow: dict[str, Any], tmp_path: Path) -> None:
    """What older versions wrote has none: then the budget is kept from there on."""
    options = {"default_root_dir": tmp_path}
    slow["max_overhead"] = EIGHTH / 2
    for number, (before, after) in enumerate([({}, slow), (slow, {})]):
        folder = tmp_path / str(number)
        keep = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=6)
        train([FARMSTempBalance(**before), keep], **options)
        logger, balance = Recorder(), FARMSTempBalance(**after)
        train([balance], folder / "epoch=1-step=6.ckpt", logger=logger, enable_checkpointing=False, **options)
        steps = [step for step, row in logger.rows if "farms/alpha_mean" in row]
        assert steps == ([8, 16] if after else [8, 12, 16])
        assert ("overhead" in balance.state_dict()) is bool(after)


# Several processes


def test_rank_zero_decides(tmp_path: Path) -> None:
    """The second process finds measuring cheap, and leaves it out with the first."""
    for rank, seconds in enumerate([QUARTER, 0.0]):
        write_timings(tmp_path / f"{rank}.csv", [SECOND] * 99, [seconds] * 99)
    first, second = results("lightning with a budget", tmp_path)
    assert first.pop("logged") == [0, 2, 8, 10]
    assert second.pop("logged") == []
    assert_same_state(first, second)
    assert len(first["timings"]) == 9 + 3
    assert [list(row) for row in read_timings(tmp_path / TIMINGS_FILE)] == first["timings"]
