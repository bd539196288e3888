"""Studies: statistics against scipy and by simulation, the plan, the placebo, whole ones in real processes."""

from __future__ import annotations

import errno
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from scipy import stats

from recipes.config import CONFIG_DIR, build_balancer
from recipes.engine import Outcome
from recipes.errors import RecipeError
from recipes.generate.darcy import DarcySpec
from recipes.generate.run import Job as MakeData
from recipes.generate.run import generate
from recipes.study.__main__ import main
from recipes.study.cells import Cell, load_study
from recipes.study.effects import POOLED, Row, summarise
from recipes.study.one_run import run_once
from recipes.study.plan import Search, Tuning, plan_arm, tune
from recipes.study.records import Job, Record, read_records, write_records
from recipes.study.runner import run_study, show_plan
from recipes.study.settings import SETTINGS_FILE, keep_settings, locked
from recipes.study.statistics import Effect, holm, pooled_effect
from tests.recipes.recipe_runs import TINY_STUDY
from tests.recipes.study_records import final_run

ROOT = Path(CONFIG_DIR).parent


def _effect(cells: Sequence[Sequence[float]]) -> Effect:
    return pooled_effect([dict(enumerate(cell)) for cell in cells])


# Statistics


def test_one_cell_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.1, 1, 12), rng.normal(0, 1, 12)
    effect = _effect([list(ours - theirs)])
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose([effect.low, effect.high, effect.p], [interval.low, interval.high, test.pvalue])
    assert effect.mean == pytest.approx((ours - theirs).mean())
    assert effect.pairs == 12


def test_cells_with_the_same_seeds_are_averaged_seed_by_seed() -> None:
    table = np.random.default_rng(1).normal(size=(3, 9)) + np.random.default_rng(2).normal(size=9)
    effect = _effect(table.tolist())
    test = stats.ttest_1samp(table.mean(axis=0), 0.0)
    np.testing.assert_allclose([effect.low, effect.high], test.confidence_interval(0.95))
    assert effect.p == pytest.approx(test.pvalue)


def test_cells_without_a_common_seed_add_their_variances() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=8), rng.normal(size=20)
    effect = pooled_effect([dict(enumerate(first)), dict(enumerate(second, start=100))])
    error = math.sqrt(first.var(ddof=1) / 8 + second.var(ddof=1) / 20) / 2
    assert effect.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert effect.high - effect.mean == pytest.approx(error * stats.t.ppf(0.975, 7))


def test_pooled_effect_at_its_edges() -> None:
    assert _effect([[0.0, 0.0]]) == Effect(0.0, 0.0, 0.0, 1.0, 2)
    # One pair has no spread, and pairs that agree, as few test samples let them, do not say that there is none.
    for values in ([0.5], [0.5, 0.5], [0.1, 0.1, 0.1]):
        alike = _effect([values])
        assert alike.mean == pytest.approx(values[0])
        assert all(map(math.isnan, (alike.low, alike.high, alike.p)))
    for cells in ([], [[0.1], []]):
        with pytest.raises(ValueError, match="at least one log ratio in every cell"):
            _effect(cells)


def _holm_by_definition(p: Sequence[float]) -> list[float]:
    """The adjusted value of each is the smallest level at which the step-down procedure rejects it."""
    adjusted = []
    for own in p:
        below = [q for q in p if q <= own]
        steps = [(len(p) - sum(r < q for r in p)) * q for q in below]
        adjusted.append(min(1.0, max(steps)))
    return adjusted


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    rng = np.random.default_rng(4)
    for size in range(1, 7):
        p = list(rng.uniform(size=size) ** 3)
        assert holm(p) == pytest.approx(_holm_by_definition(p))
    with_gap = holm([0.01, math.nan, 0.03])
    assert with_gap[::2] == pytest.approx(holm([0.01, 0.03]))
    assert math.isnan(with_gap[1])


def test_no_error_at_all_has_a_log() -> None:
    right = final_run("x", 1, 1.0, metric="accuracy", val_samples=50, test_samples=500)
    assert right.log_error("test") == pytest.approx(math.log(0.001))
    assert right.log_error("val") == pytest.approx(math.log(0.01))
    assert final_run("x", 1, 0.1).log_error("test") == pytest.approx(math.log(0.1))


def _studies(effects: Mapping[str, float], count: int) -> list[list[Row]]:
    """Synthetic studies of three cells with unequal seeds, noise and correlation between cells of a seed."""
    rng = np.random.default_rng(5)
    results = []
    for _ in range(count):
        shared = {arm: rng.normal(0, 0.04, 20) for arm in effects}
        cells = {}
        for name, seeds, noise in (("a", 20, 0.05), ("b", 20, 0.10), ("c", 12, 0.08)):
            difficulty = rng.normal(-1.5, 0.3, seeds)
            records = {}
            for arm, effect in {"off": 0.0, **effects}.items():
                own = effect + rng.normal(0, noise, seeds) + (shared[arm][:seeds] if arm != "off" else 0.0)
                for seed in range(seeds):
                    record = _record(arm, "final", seed, 0.1, test=math.exp(difficulty[seed] + own[seed]))
                    records[record.job] = replace(record, experiment=name)
            cells[name] = records
        results.append(summarise(cells, ["off", *effects], "off"))
    return results


def test_intervals_cover_and_a_null_is_rarely_called_an_effect() -> None:
    studies = _studies({"x": 0.03, "y": 0.0, "z": 0.0}, 300)
    pooled = [{row.arm: row for row in rows if row.cell == POOLED} for rows in studies]
    single = [row for rows in studies for row in rows if row.cell == "c" and row.arm == "x"]
    covered = np.mean([rows["x"].effect.low <= 0.03 <= rows["x"].effect.high for rows in pooled])  # type: ignore[union-attr]
    covered_single = np.mean([row.effect.low <= 0.03 <= row.effect.high for row in single])  # type: ignore[union-attr]
    false_alarms = np.mean([min(rows["y"].p_holm, rows["z"].p_holm) < 0.05 for rows in pooled])
    # Three standard errors of a share of 0.95 (0.05) over 300 studies are 0.038.
    assert abs(covered - 0.95) < 0.038
    assert abs(covered_single - 0.95) < 0.038
    assert false_alarms < 0.088


def test_an_effect_of_ten_per_cent_is_found() -> None:
    studies = _studies({"x": math.log(0.9), "y": 0.0}, 40)
    rows = [row for rows in studies for row in rows if row.cell == POOLED and row.arm == "x"]
    assert np.mean([row.p_holm < 0.05 for row in rows]) > 0.95
    assert np.mean([row.effect.mean for row in rows]) == pytest.approx(math.log(0.9), abs=0.01)  # type: ignore[union-attr]


# The plan


def _record(arm: str, phase: Any, seed: int, lr: float, **facts: Any) -> Record:
    return final_run(arm, seed, 0.5, **{"phase": phase, "lr": lr, **facts})


def _tuned(error: Callable[[float], float], grid: tuple[float, ...] = (0.5, 1, 2), extend: int = 2) -> Tuning:
    """Search to the end; an infinite error diverges."""
    finished: dict[Job, Record] = {}
    while True:
        tuning = tune(Search("x", 0.1, grid, 2, extend), finished)
        if tuning.best is not None:
            assert len(finished) == (2 * len(tuning.lrs) if len(grid) > 1 else 0)
            return tuning
        job, value = tuning.missing[0], error(tuning.missing[0].lr)
        bad = {"status": "diverged", "val": math.nan}
        finished[job] = _record(*job, **({"val": value} if math.isfinite(value) else bad))


@pytest.mark.parametrize(
    ("error", "lrs", "best"),
    [
        (lambda lr: abs(math.log(lr / 0.11)) + 1, (0.05, 0.1, 0.2), 0.1),
        (lambda lr: abs(math.log(lr / 0.02)) + 1, (0.0125, 0.025, 0.05, 0.1, 0.2), 0.025),
        (lambda lr: 1 + lr, (0.0125, 0.025, 0.05, 0.1, 0.2), 0.0125),
        (lambda lr: 1 / lr, (0.05, 0.1, 0.2, 0.4, 0.8), 0.8),
        (lambda lr: 1 / lr if lr < 0.15 else math.inf, (0.05, 0.1, 0.2), 0.1),
        (lambda lr: math.inf, (0.0125, 0.025, 0.05, 0.1, 0.2), 0.0125),
        (lambda lr: 1.0, (0.0125, 0.025, 0.05, 0.1, 0.2), 0.0125),
    ],
    ids=["inside", "below", "far below", "far above", "diverges above", "always diverges", "no difference"],
)
def test_grid_grows_where_the_best_is_at_its_end(error: Any, lrs: tuple[float, ...], best: float) -> None:
    tuning = _tuned(error)
    assert (tuning.lrs, tuning.best) == (lrs, best)


def test_grid_that_must_not_grow_and_grid_of_one() -> None:
    assert _tuned(lambda lr: lr, extend=0).best == 0.05
    assert _tuned(lambda lr: lr, grid=(3,)) == Tuning((0.3,), (), 0.3, ())


def test_final_runs_have_other_seeds_than_tuning() -> None:
    search = Search("x", 0.1, (1, 2), seeds=3, extend=0)
    tuning = tune(search, {})
    tuning_seeds = {job.seed for job in tuning.missing}
    finished = {job: _record(*job, val=job.lr) for job in tuning.missing}
    plan = plan_arm(search, 50, finished)
    assert {job.lr for job in plan.missing} == {0.1}
    assert [job.seed for job in plan.missing] == list(range(1, 51))
    assert tuning_seeds.isdisjoint(range(1, 10_000))
    assert (plan.done, plan.total) == (6, 56)
    partly = {**finished, plan.missing[0]: _record(*plan.missing[0])}
    assert plan_arm(search, 50, partly).missing == plan.missing[1:]


# Records and what is made of them


def test_records_come_back_exactly(tmp_path: Path) -> None:
    records = [
        _record("x", "final", 2, 0.1, val=1 / 3, test=0.1 + 0.2),
        _record("off", "tune", 1, 1e-7, status="diverged", val=math.nan, test=math.nan),
    ]
    write_records(tmp_path, records)
    back = read_records(tmp_path)
    assert str(list(back.values())) == str(records[::-1])  # as text: NaN is not equal to itself
    text = (tmp_path / "results.csv").read_text()
    write_records(tmp_path, reversed(records))
    assert (tmp_path / "results.csv").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_foreign_results_file(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecipeError, match=r"is not a study's results file .*study\.folder"):
        read_records(tmp_path)


def test_diverged_final_runs_count_as_having_learnt_nothing() -> None:
    def cell(worst: Record) -> dict[Job, Record]:
        records = [_record(arm, "final", seed, 0.1, test=0.2) for arm in ("off", "x") for seed in (1, 2)]
        return {record.job: record for record in [*records, worst]}

    diverged = _record("x", "final", 2, 0.1, status="diverged", test=math.nan)
    row = summarise({"c": cell(diverged)}, ["off", "x"], "off")[1]
    assert (row.runs, row.diverged) == (2, 1)
    assert row.effect is not None
    assert row.effect.mean == pytest.approx(math.log(1.0 / 0.2) / 2)
    # Accuracy: an error is 1 - accuracy plus half a sample of twenty.
    right = _record("x", "final", 1, 0.1, metric="accuracy", test=1.0)
    assert right.error("test") == 0.0
    assert right.log_error("test") == pytest.approx(math.log(0.025))


def test_final_runs_at_several_rates_are_those_of_the_rate_that_the_search_chose() -> None:
    tried = [_record("off", "tune", seed, lr, val=val) for lr, val in ((0.1, 0.3), (0.2, 0.2)) for seed in (1, 2)]
    finals = [_record("off", "final", seed, lr, test=lr) for lr in (0.2, 0.1) for seed in (1, 2, 3)]
    finals += [_record("x", "final", seed, 0.1, test=0.1) for seed in (1, 2)]

    def lrs(records: list[Record]) -> dict[str, float]:
        return {
            row.arm: row.lr for row in summarise({"c": {run.job: run for run in records}}, ["off", "x"], "off")
        }

    assert lrs([*tried, *finals]) == lrs([*tried, *reversed(finals)]) == {"off": 0.2, "x": 0.1}
    diverged = _record("off", "tune", 3, 0.2, status="diverged", val=math.nan)
    third = _record("off", "tune", 3, 0.1, val=0.3)
    assert lrs([*tried, diverged, third, *finals])["off"] == 0.1
    more = _record("off", "final", 4, 0.2, test=0.2)
    assert lrs(finals)["off"] == 0.1
    assert lrs([*finals, more])["off"] == 0.2


def test_only_pairs_count_and_overhead_is_of_the_baselines_training() -> None:
    records = [_record("off", "final", seed, 0.1, test=0.1 * seed, train_seconds=4.0) for seed in (1, 2, 3)]
    records += [_record("x", "final", seed, 0.1, test=0.2 * seed, callback_seconds=1.0) for seed in (2, 3, 4)]
    off, x = summarise({"c": {record.job: record for record in records}}, ["off", "x", "y"], "off")
    assert off.effect is None
    assert x.effect is not None
    assert (x.effect.mean, x.effect.pairs) == (pytest.approx(math.log(2)), 2)
    assert x.overhead == pytest.approx(0.25)


# Settings

NAMED_BY_ARM = (
    "balancing",
    "arm",
    "logger",
    "callbacks",
)  # a study builds neither loggers nor callbacks of recipes.train


def _tiny(tmp_path: Path, *more: str) -> list[str]:
    return [*TINY_STUDY, f"study.folder={tmp_path}/study", *more]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"say what to study: experiment=<name>\[,<name>...\], or study=small"),
        (("experiment=nothing",), "experiment=nothing: .*experiment/nothing"),
        (("experiment=darcy_fno", "seed=3"), "seed=3 can't be set: a study sets seed, lr, balancing"),
        (("experiment=darcy_fno", "balancing=full"), "balancing=full can't be set"),
        (("experiment=darcy_fno", "ckpt_path=x"), "ckpt_path=x can't be set: a study starts every run anew"),
        (
            ("experiment=darcy_fno", "study.arms=[farms]"),
            r"study.baseline=off is not one of study.arms \['farms'\]",
        ),
        (("experiment=darcy_fno", "study.arms=[fams]"), "no arm 'fams'; did you mean farms"),
        (("experiment=darcy_fno", "study.arms=['off',zzz]"), "no arm 'zzz'; there are .*farms, full, "),
        (("experiment=darcy_fno", "study.arms=['off',full,full]"), "study.arms must be different ones"),
        (("experiment=darcy_fno", "study.arms=full"), "study.arms must be a list"),
        (("experiment=darcy_fno", "study.arms=null"), "study.arms must be a list"),
        (("experiment=darcy_fno", "study.seeds=0"), "study.seeds must be a whole number of at least 1, got 0"),
        (
            ("experiment=darcy_fno", "study.grid=[2,1]"),
            "study.grid must be .*positive multiples in ascending order",
        ),
        (("experiment=darcy_fno", "study.grid=[0]"), "study.grid must be .*positive multiples"),
        (("experiment=darcy_fno", "study.grid=[true]"), "study.grid must be .*positive multiples"),
        (("experiment=darcy_fno", "study.grid=2"), "study.grid must be a list"),
        (("experiment=darcy_fno", "study.grid=null"), "study.grid must be a list"),
        (("experiment=darcy_fno", "study.baseline_grid=[]"), "study.baseline_grid must be .*positive multiples"),
        (("experiment=darcy_fno", "study.baseline_grid=1"), "study.baseline_grid must be a list"),
        (("experiment=darcy_fno", "study.vary_data=3"), "study.vary_data must be true, false or null"),
        (
            ("experiment=darcy_fno", "study.workers=0"),
            "study.workers must be null or a whole number of at least 1",
        ),
        (
            ("experiment=darcy_fno", "study.workers=true"),
            "study.workers must be null or a whole number of at least 1",
        ),
        (("experiment=darcy_fno", "study.minutes=true"), "study.minutes must be a number above 0"),
        (("experiment=darcy_fno", "study.folder=null"), "study.folder must be a path"),
        (("experiment=darcy_fno", "study.folder=''"), "study.folder must be a path"),
        (("study.cells=3",), "study.cells must be experiments by name"),
        (("+study.cells={darcy_fno:3}",), "study.cells.darcy_fno must be settings by name"),
        (("experiment=darcy_fno", "study.variants=3"), "study.variants must be arms by name"),
        (("experiment=darcy_fno", "name=../evil"), "name must be that of a folder, .*'../evil'"),
        (("experiment=darcy_fno", "name=''"), "name must be that of a folder, .*''"),
        (("experiment=darcy_fno", "name='..'"), r"name must be that of a folder, .*'\.\.'"),
        (("experiment=darcy_fno", "+study.colour=1"), "unknown settings under study: colour"),
        (("experiment=darcy_fno", "study.sheeds=1"), "the study's settings: .*sheeds"),
        (("experiment=darcy_fno,darcy_fno",), "two experiments have the same name: darcy_fno"),
        (
            ("experiment=darcy_fno", "task.monitor=val/loss"),
            "task.monitor must be one of val/accuracy, .*got val/loss",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_in_the_settings(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(overrides)


def test_a_section_with_nothing_below_it_is_empty() -> None:
    study = load_study(["experiment=darcy_fno", "study.variants=null", "study.cells=null"])
    assert study.cells[0].options.variants == {}


def test_a_cell_of_another_program_as_the_error_says_it() -> None:
    with pytest.raises(RecipeError, match="program:finetune") as refused:
        load_study(["experiment=study/newsgroups_minilm_1"])
    typed = str(refused.value).split("'")[1]
    (cell,) = load_study([typed]).cells
    assert cell.options.program == "finetune"


# The folder of a cell


def _begun(tmp_path: Path, *more: str) -> Cell:
    """A cell whose arm `off` has a finished run, as a study leaves it."""
    (cell,) = load_study(_tiny(tmp_path, *more)).cells
    with locked(cell):
        keep_settings(cell)
    record = final_run("off", 1, 0.5, experiment=cell.name, config=cell.fingerprint("off"))
    write_records(cell.folder, [record])
    return cell


def _plan(tmp_path: Path, *more: str) -> None:
    show_plan(load_study(_tiny(tmp_path, *more)), Console(quiet=True))


def test_an_arm_may_change_until_it_has_a_finished_run(tmp_path: Path) -> None:
    cell = _begun(tmp_path, "balancing.lr_max_ratio=1.25")
    corrected = "balancing.lr_max_ratio=1.375"
    _plan(tmp_path, corrected)
    with locked(cell):
        keep_settings(load_study(_tiny(tmp_path, corrected)).cells[0])
    assert "1.375" in (cell.folder / SETTINGS_FILE).read_text()
    write_records(cell.folder, [final_run(arm, 1, 0.5, experiment=cell.name) for arm in cell.arms])
    with pytest.raises(RecipeError, match=r"farms.*lr_max_ratio was 1\.375 and is 1\.25"):
        _plan(tmp_path, "balancing.lr_max_ratio=1.25")


def test_the_epochs_that_are_looked_at_stay(tmp_path: Path) -> None:
    cell = _begun(tmp_path)
    with pytest.raises(RecipeError, match=r"study\.evaluations was 10 and is 1"):
        _plan(tmp_path, "study.evaluations=1")
    noted = cell.folder / SETTINGS_FILE
    noted.write_text(noted.read_text().replace("  evaluations: 10\n", ""))  # as version 0.1 wrote it
    _plan(tmp_path, "study.evaluations=1")


def test_results_without_their_settings_are_taken_by_the_same_settings_alone(tmp_path: Path) -> None:
    cell = _begun(tmp_path)
    (cell.folder / SETTINGS_FILE).unlink()
    _plan(tmp_path)
    with pytest.raises(RecipeError, match=r"settings\.yaml is missing"):
        _plan(tmp_path, "trainer.max_epochs=3")
    assert not (cell.folder / SETTINGS_FILE).exists()


def test_an_arm_that_is_not_noted_is_taken_by_the_same_settings_alone(tmp_path: Path) -> None:
    """As after rows of another study were added by hand."""
    cell = _begun(tmp_path, 'study.arms=["off",farms]')
    rows = [final_run("off", 1, 0.5, config=cell.fingerprint("off"))]
    arms = 'study.arms=["off",farms,full]'
    full = load_study(_tiny(tmp_path, arms)).cells[0].fingerprint("full")
    write_records(cell.folder, [*rows, final_run("full", 1, 0.5, config=full)])
    _plan(tmp_path, arms)
    with pytest.raises(RecipeError, match=r"the results of full .*can't be told"):
        _plan(tmp_path, arms, "+arms.full.lr_max_ratio=1.9")


def test_no_folder_is_written_before_all_are_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.study.runner.check_cell", lambda cell: None)
    folder = f"study.folder={tmp_path}"
    (last,) = load_study(["experiment=darcy_fno", folder]).cells
    both = load_study(["experiment=digits_resnet18,darcy_fno", folder])
    with locked(last), pytest.raises(RecipeError, match=r"another study is at work in .*darcy_fno"):
        run_study(both, Console(quiet=True))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_lock(*_: object) -> None:
        raise OSError(code, "no locks")

    (cell,) = load_study(_tiny(tmp_path)).cells
    monkeypatch.setattr(fcntl, "flock", no_lock)
    with locked(cell):
        keep_settings(cell)
    assert (cell.folder / SETTINGS_FILE).exists()


@pytest.mark.parametrize("text", ["", "study: [", "[1, 2]", "arms: {off: 3}\nstudy: {}"])
def test_damaged_settings(tmp_path: Path, text: str) -> None:
    cell = _begun(tmp_path)
    (cell.folder / SETTINGS_FILE).write_text(text)
    with pytest.raises(RecipeError, match=r"settings\.yaml is not a file of a study"):
        _plan(tmp_path)


def test_mistakes_stop_before_time_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, message in (
        ("model.net.width=0", "width must be positive"),
        ("data.train_size=5", "at least 10"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(_tiny(tmp_path, override))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_arms_of_a_seed_share_all_but_the_callback() -> None:
    names = ["off", "noise_aware", "placebo"]
    study = load_study(["study=small", f"study.arms={names}"])
    assert len(study.cells) == 8
    for cell in study.cells:
        assert list(cell.arms) == names
        settings = [cell.settings(Job(arm, "final", 7, 0.03)) for arm in names]
        for plain in settings:
            assert (plain["seed"], plain["data"]["seed"], plain["data"]["shuffle_seed"]) == (7, 7, 7)
            assert plain["optimizer"]["lr"] == 0.03
            period = plain["balancing"].get("every_n_epochs")
            assert period is None or 20 <= plain["trainer"]["max_epochs"] / period <= 40
        rest = [{k: v for k, v in plain.items() if k not in NAMED_BY_ARM} for plain in settings]
        assert all(plain == rest[0] for plain in rest)
        assert len({cell.fingerprint(arm) for arm in names}) == 3
        assert settings[2]["balancing"]["permute"] == 7


def test_what_is_typed_for_all_cells_beats_the_studys_own_setting_of_a_cell() -> None:
    vit, resnet = "study/fashion_vit_1000", "study/fashion_resnet18_1000"

    def arms(*overrides: str) -> dict[str, tuple[str, ...]]:
        cells = load_study(["study=fashion", *overrides]).cells
        return {cell.name: cell.options.arms for cell in cells}

    plain = arms()
    assert "embedding_head_faster" in plain["fashion_vit_1000"]
    assert set(arms('study.arms=["off"]').values()) == {("off",)}
    assert arms('study.arms=["off"]', f"experiment={vit}") == {"fashion_vit_1000": ("off",)}
    typed_for_one = arms(
        'study.arms=["off"]', '+study.cells.tiny_lm.arms=["off",full]', f"experiment=tiny_lm,{vit}"
    )
    assert list(typed_for_one.values()) == [("off", "full"), ("off",)]
    assert arms("study.seeds=3", f"experiment={resnet},{vit}") == plain


CELLS = sorted((Path(CONFIG_DIR) / "experiment" / "study").glob("*.yaml"))


@pytest.mark.parametrize("file", CELLS, ids=[file.stem for file in CELLS])
def test_experiments_say_how_to_run_them(file: Path) -> None:
    """The second line of the file is a command that works."""
    command = file.read_text().splitlines()[1].removeprefix("# python -m recipes.study ")
    assert command.split()[0] == f"experiment=study/{file.stem}"
    (cell,) = load_study([*command.split(), 'study.arms=["off"]']).cells
    assert cell.name == file.stem or file.stem in ("darcy_fno", "tiny_lm", "tiny_lm_fast", "darcy_unet")


def test_results_do_not_depend_on_the_folder_of_the_data() -> None:
    study = ["experiment=study/darcy_beta100_fno_180", 'study.arms=["off"]']
    here, there = (load_study([*study, f"paths.data_dir={folder}"]).cells[0] for folder in ("data", "/elsewhere"))
    assert here.fingerprint("off") == there.fingerprint("off")
    assert here.settings(Job("off", "final", 1, 0.1))["data"]["path"] == "data/pdebench/darcy_beta100_32.hdf5"


STUDIES = sorted((Path(CONFIG_DIR) / "study").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=[file.stem for file in STUDIES])
def test_every_study_composes_with_all_its_arms(file: Path) -> None:
    assert file.read_text().splitlines()[0] == f"# python -m recipes.study study={file.stem}"
    study = load_study([f"study={file.stem}"])
    assert study.cells
    for cell in study.cells:
        assert len({cell.fingerprint(arm) for arm in cell.options.arms}) == len(cell.options.arms)
        for cfg in cell.arms.values():
            assert (build_balancer(cfg) is None) == (cfg.arm == "off")  # each option has a value that it can have


# Whole studies, in real processes


TIMES = ("seconds", "train_seconds", "callback_seconds")


def _results(folder: Path) -> dict[Job, dict[str, Any]]:
    records = read_records(folder / "study" / "digits_resnet18")
    return {job: {k: v for k, v in asdict(r).items() if k not in TIMES} for job, r in records.items()}


def _wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore")
def test_killed_study_goes_on_and_ends_as_if_each_run_had_been_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _tiny(tmp_path)
    command = [sys.executable, "-m", "recipes.study", *arguments, "study.workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _wait_for(lambda: len(_results(tmp_path)) >= 2)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
    before = (tmp_path / "study" / "digits_resnet18" / "results.csv").read_text().splitlines()
    assert 3 <= len(before) < 13

    main([*arguments, "study.workers=1"])
    folder = tmp_path / "study" / "digits_resnet18"
    after = (folder / "results.csv").read_text().splitlines()
    assert set(before) < set(after)
    assert "beyond the noise (5%, Holm)" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {
        "settings.yaml",
        "results.csv",
        "effects.csv",
        "effects.png",
    }

    # Other processes, another order, a stop in the middle: each run is the one that this process makes alone.
    GlobalHydra.instance().clear()
    cell = load_study(arguments).cells[0]
    found = _results(tmp_path)
    assert len(found) == 2 * (2 + 4)
    for job, facts in found.items():
        alone, _ = run_once(cell.settings(job), cell.options.evaluations)
        assert {name: facts[name] for name in alone if name not in TIMES} == {
            name: value for name, value in alone.items() if name not in TIMES
        }

    # The report trains nothing, and the same results give the same pictures and tables.
    effects = (folder / "effects.csv").read_text()
    (folder / "effects.csv").unlink()
    GlobalHydra.instance().clear()
    main(["--report", *arguments])
    assert (folder / "effects.csv").read_text() == effects
    assert (folder / "results.csv").read_text().splitlines() == after

    # A dry run trains nothing, and knows what runs cost; its flag may stand anywhere.
    GlobalHydra.instance().clear()
    main([arguments[0], "--dry-run", *arguments[1:], "study.seeds=6"])
    printed = capsys.readouterr().out
    assert "core-hours left" in printed
    assert "unknown" not in printed
    assert (folder / "results.csv").read_text().splitlines() == after

    # Settings that results depend on must stay; more seeds and arms may join.
    capsys.readouterr()
    for override, change in (
        ("trainer.max_epochs=3", "off.trainer.max_epochs was 2 and is 3"),
        ("study.tune_seeds=2", "study.tune_seeds was 1 and is 2"),
        ("arms.farms.lr_max_ratio=1.9", "farms.balancing.lr_max_ratio was 1.5 and is 1.9"),
    ):
        for dry_run in ((), ("--dry-run",)):
            with pytest.raises(SystemExit):
                main([*dry_run, *arguments, override])
            assert change in capsys.readouterr().err
    assert (folder / "results.csv").read_text().splitlines() == after


def test_a_dry_run_of_a_new_study_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", *_tiny(tmp_path)])
    assert "no run is finished" in capsys.readouterr().out
    assert not (tmp_path / "study").exists()


def test_a_dry_run_adds_up_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"study.folder={tmp_path}"
    settings = ("study.arms=[off]", "study.grid=[1]", "study.seeds=4", folder)
    cell = load_study(["experiment=digits_resnet18", *settings]).cells[0]
    done = {"experiment": cell.name, "lr": cell.lr("off"), "seconds": 3600.0, "config": cell.fingerprint("off")}
    cell.folder.mkdir(parents=True)
    write_records(cell.folder, [final_run("off", 1, 0.5, **done)])
    GlobalHydra.instance().clear()
    main(["--dry-run", "experiment=digits_resnet18,darcy_fno", *settings])
    assert re.search(r"3\.00 core-hours left, and .*unknown", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.engine=slurm", "local, ray"),
        ("study.gpus_per_run=0", "gpus_per_run"),
        ("study.minutes=0", "study.minutes must be a number above 0"),
        ("study.address=auto", "engine=ray"),
    ],
)
def test_resources_that_cannot_be(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(_tiny(tmp_path, override))


class _Recorder:
    """An engine with one slot that does no run: it notes the order of the jobs, and returns made-up results."""

    slots = 1

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.tasks: set[Any] = set()

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, task: Any, function: object, argument: object) -> None:
        self.begun.append(task)
        self.tasks.add(task)

    def finished(self, timeout: float) -> Iterator[Outcome]:
        for task in tuple(self.tasks):
            self.tasks.remove(task)
            yield Outcome(task, result=(MADE_UP, []))


MADE_UP = {
    "status": "ok",
    "metric": "accuracy",
    "val": 0.5,
    "test": 0.5,
    "val_samples": 40,
    "test_samples": 40,
    "blind_error": 0.9,
    "parameters": 1,
    "epochs": 2,
    "steps": 4,
    "device": "cpu",
    "seconds": 1.0,
    "train_seconds": 1.0,
    "callback_seconds": 0.0,
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    """The engine of every study of the test."""
    engine = _Recorder()
    monkeypatch.setattr("recipes.study.runner.make_engine", lambda study: engine)
    return engine


@pytest.mark.filterwarnings("ignore")
def test_searches_come_first_and_then_seed_after_seed(
    tmp_path: Path, engine: _Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study that ends early has the same seeds of all arms."""
    main(_tiny(tmp_path))
    order = [(job.phase, job.seed, job.arm) for _, job in engine.begun]
    assert [phase for phase, _, _ in order] == ["tune"] * 4 + ["final"] * 8
    assert order[4:] == [("final", seed, arm) for seed in (1, 2, 3, 4) for arm in ("off", "farms")]
    assert "are left" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_no_process_waits_for_a_search_and_the_others_catch_up(tmp_path: Path, engine: _Recorder) -> None:
    engine.slots = 4
    main(_tiny(tmp_path, "study.baseline_grid=[1]"))  # nothing is searched for the baseline
    order = [(job.phase, job.seed, job.arm) for _, job in engine.begun]
    assert order[:2] == [("tune", 1_000_001, "farms")] * 2
    assert order[2:4] == [("final", seed, "off") for seed in (1, 2)], (
        "two processes that the search has no run for"
    )
    assert order[4:6] == [("final", seed, "farms") for seed in (1, 2)], "the arm that is behind comes first"


@pytest.mark.filterwarnings("ignore")
def test_the_baseline_may_have_more_tries(tmp_path: Path, engine: _Recorder) -> None:
    main(_tiny(tmp_path, "study.baseline_grid=[0.5,1,1.5,2]"))
    tried = [(job.arm, job.lr) for _, job in engine.begun if job.phase == "tune"]
    assert sorted(tried) == [("farms", 0.1), ("farms", 0.2), *(("off", lr) for lr in (0.05, 0.1, 0.15, 0.2))]
    assert load_study(_tiny(tmp_path)).cells[0].identity()["study"].keys() == {
        *("grid", "tune_seeds", "extend", "vary_data", "evaluations")  # studies that were begun without it go on
    }


@pytest.mark.filterwarnings("ignore")
def test_no_run_is_begun_when_the_time_is_up(
    tmp_path: Path, engine: _Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    main(_tiny(tmp_path, "study.minutes=1e-9"))
    assert not engine.begun
    printed = capsys.readouterr()
    assert "study.minutes=1e-09: 12 runs left" in printed.out + printed.err
    GlobalHydra.instance().clear()
    main(_tiny(tmp_path, "study.minutes=60"))
    assert len(_results(tmp_path)) == 12


@pytest.mark.filterwarnings("ignore")
def test_a_data_file_that_was_made_anew_in_another_way_is_refused(
    tmp_path: Path, engine: _Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    path, settings = tmp_path / "darcy.hdf5", tmp_path / "study/darcy_beta100_fno_20" / SETTINGS_FILE
    study = ["experiment=study/darcy_beta100_fno_20", f"data.path={path}", f"study.folder={tmp_path}/study"]
    study += ['study.arms=["off",farms]', "study.grid=[1]", "study.tune_seeds=1", "study.extend=0"]

    def make(**options: Any) -> None:
        spec = DarcySpec(resolution=32, **options)
        generate(spec, MakeData(path, samples=40, workers=1, overwrite=True), Console(quiet=True))

    def go_on(seeds: int) -> None:
        GlobalHydra.instance().clear()
        main([*study, f"study.seeds={seeds}"])

    make()
    go_on(1)
    make()
    go_on(2)
    done = len(engine.begun)
    make(beta=10.0)
    with pytest.raises(SystemExit):
        go_on(3)
    assert re.search(r"data file.*beta was 1\.0 and is 10\.0", " ".join(capsys.readouterr().err.split()))
    with h5py.File(path, "a") as file:  # as one of PDEBench's own
        file.attrs.clear()
    with pytest.raises(SystemExit):
        go_on(3)
    assert "generator was recipes.generate darcy" in " ".join(capsys.readouterr().err.split())
    assert len(engine.begun) == done
    noted = OmegaConf.load(settings)
    assert noted.pop("made_by").off.beta == 1.0
    OmegaConf.save(noted, settings)  # as earlier releases wrote it
    go_on(3)
    assert len(engine.begun) == done + 2


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_dies_again_and_again_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deadly = ("balancing._target_=tests.recipes.deadly.Deadly", "study.grid=[1]", "study.seeds=2")
    with pytest.raises(SystemExit):
        main(_tiny(tmp_path, *deadly, "study.workers=2"))
    printed = capsys.readouterr()
    assert printed.out.count("it is tried again") == 2 * 2
    assert "arm='farms'" in printed.err
    assert "and 1 more" in printed.err
    for seed in (1, 2):  # all are named, the first in the error itself
        assert f"seed={seed}" in printed.err + printed.out.partition("the run")[2]
    assert "died" in printed.err
    assert {job.arm for job in _results(tmp_path)} == {"off"}
    assert len(_results(tmp_path)) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_fails_is_named_and_a_diverged_one_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = load_study(_tiny(tmp_path)).cells[0]
    facts, _ = run_once(cell.settings(Job("farms", "final", 1, 1e30)))
    assert facts["status"] == "diverged"
    assert math.isnan(facts["val"])
    assert math.isnan(facts["test"])
    assert facts["blind_error"] == pytest.approx(0.9)
    main_arguments = _tiny(tmp_path, "arms.farms.exclude=[nowhere]", "study.workers=1")
    with pytest.raises(SystemExit):
        main(main_arguments)
    error = capsys.readouterr().err
    assert "arm='farms', phase='tune'" in error
    assert "exclude='nowhere' matches no layer" in error
    assert all(job.arm == "off" for job in _results(tmp_path))
