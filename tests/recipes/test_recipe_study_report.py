"""Reports of studies: rules of scoring, rates, ratios, tasks; against closed forms and by simulation."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from scipy import optimize, stats

from recipes.config import CONFIG_DIR
from recipes.errors import RecipeError
from recipes.study.__main__ import main
from recipes.study.cells import load_study
from recipes.study.effects import POOLED, Row, summarise
from recipes.study.figure_style import arm_styles
from recipes.study.findings import Findings, find, show, write
from recipes.study.mediation import contrasts, mediation
from recipes.study.records import METRICS, RESULTS_FILE, SHARES, Job, Record, read_records, write_records
from recipes.study.rules import RuleRow, effects_by_rule
from recipes.study.sensitivity import Curve, compare_ranges, curves, rate_range
from recipes.study.settings import keep_settings, locked
from recipes.study.statistics import TaskEffect, effect_over_tasks, pooled_effect
from recipes.study.units import heading, show_percent
from recipes.study.verdict import about_contrasts, about_ranges, about_rules, about_tasks, ruled_out, verdict
from tests.recipes.study_records import final_run

RESULTS = Path(CONFIG_DIR).parent / "docs" / "results" / "study"

Records = dict[Job, Record]


def _tried(arm: str, seed: int, lr: float, error: float, **facts: Any) -> Record:
    return final_run(arm, seed, error, phase="tune", lr=lr, **facts)


def _cell(records: Iterable[Record]) -> Records:
    return {record.job: record for record in records}


def _finals(errors: Mapping[str, Sequence[float]], **facts: Any) -> Records:
    """Final runs with the errors of each arm, by seed."""
    return _cell(
        final_run(arm, seed, error, **facts)
        for arm, own in errors.items()
        for seed, error in enumerate(own, start=1)
    )


# Over tasks


def _samples(mean: float, error: float) -> dict[int, float]:
    """Two log ratios with this mean, and this standard error of it."""
    return {1: mean - error, 2: mean + error}


def test_effect_over_tasks_with_equal_errors() -> None:
    found = effect_over_tasks([_samples(mean, 0.3) for mean in (-0.4, 0.1, 0.6)])
    assert found is not None
    # The variance of the means, 0.25, is tau^2 + 0.3^2.
    half = stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(3)
    expected = [0.1, 0.1 - half, 0.1 + half, 0.4]
    assert [found.mean, found.low, found.high, found.tau] == pytest.approx(expected)
    assert found.cells == 3


def test_effect_over_tasks_solves_paule_and_mandels_equation() -> None:
    rng = np.random.default_rng(0)
    means, errors = rng.normal(0.1, 0.2, 7), rng.uniform(0.02, 0.2, 7)
    found = effect_over_tasks([_samples(*pair) for pair in zip(means, errors, strict=True)])

    def excess(variance: float) -> float:
        weights = 1 / (variance + errors**2)
        centre = np.sum(weights * means) / np.sum(weights)
        return float(np.sum(weights * (means - centre) ** 2) - 6)

    variance = optimize.brentq(excess, 0, 10)
    weights = 1 / (variance + errors**2)
    centre = np.sum(weights * means) / np.sum(weights)
    half = stats.t.ppf(0.975, 6) / math.sqrt(np.sum(weights))
    assert found is not None
    assert found.tau == pytest.approx(math.sqrt(variance))
    assert [found.mean, found.low, found.high] == pytest.approx([centre, centre - half, centre + half])


def test_effect_over_tasks_at_its_edges() -> None:
    same = effect_over_tasks([_samples(0.2, 0.1), _samples(0.2, 0.1)])
    assert same is not None
    assert same.tau == 0
    assert same.high - same.mean == pytest.approx(stats.t.ppf(0.975, 1) * 0.1 / math.sqrt(2))
    assert effect_over_tasks([{1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}]) == TaskEffect(0.0, 0.0, 0.0, 0.0, 2)
    unchanged = {1: 0.0, 2: 0.0}
    noisy = [_samples(0.05, 0.2), _samples(-0.05, 0.2)]
    found, with_noise = effect_over_tasks([unchanged, *noisy]), effect_over_tasks([_samples(0.0, 0.2), *noisy])
    assert found == with_noise, "where nothing was changed, the effect on a task like it is not known better"
    alike = {1: 0.1, 2: 0.1, 3: 0.1}  # which does not say that nothing varies
    for too_few in ([], [_samples(0.2, 0.1)], [_samples(0.2, 0.1), {1: 0.3}], [_samples(0.2, 0.1), alike]):
        assert effect_over_tasks(too_few) is None


def test_log_ratios_that_differ_by_rounding_alone_are_alike() -> None:
    ratios = [math.log(0.015) - math.log(0.005), math.log(0.045) - math.log(0.015)]
    assert ratios[0] != ratios[1]
    alike = dict(enumerate([*ratios, ratios[0]]))
    others = [_samples(mean, 0.2) for mean in (0.05, -0.05)]
    assert effect_over_tasks([alike, *others]) == effect_over_tasks(others)


def _covered(tau: float, count: int = 300) -> tuple[float, float]:
    """How often the interval over tasks, and that over seeds, has the mean of the tasks in it."""
    rng = np.random.default_rng(1)
    over_tasks = over_seeds = 0
    for _ in range(count):
        cells: list[dict[int, float]] = []
        for noise in (0.05, 0.1, 0.2, 0.1, 0.05, 0.2):
            values = 0.03 + rng.normal(0, tau) + rng.normal(0, noise, 20)
            cells.append(dict(enumerate(values, start=100 * len(cells))))
        tasks, seeds = effect_over_tasks(cells), pooled_effect(cells)
        assert tasks is not None
        over_tasks += tasks.low <= 0.03 <= tasks.high
        over_seeds += seeds.low <= 0.03 <= seeds.high
    return over_tasks / count, over_seeds / count


def test_interval_over_tasks_covers_what_that_over_seeds_does_not() -> None:
    # Three standard errors of a share of 0.95 over 300 studies are 0.038.
    over_tasks, over_seeds = _covered(tau=0.05)
    assert abs(over_tasks - 0.95) < 0.038
    assert over_seeds < 0.8
    # Where tasks don't differ it is wider than need be, never too narrow.
    assert _covered(tau=0.0)[0] > 0.92


# Rules


def _rule_cell(off: Mapping[float, Sequence[float]], x: Mapping[float, Sequence[float]]) -> Records:
    """Tuning runs with the lowest test errors of each rate, by seed; all other errors are 9."""
    records = [
        _tried(arm, seed, lr, 9.0, lowest_test=error)
        for arm, by_rate in (("off", off), ("x", x))
        for lr, errors in by_rate.items()
        for seed, error in enumerate(errors, start=1_000_001)
    ]
    return _cell(records)


def _by_rule(records: Records, own_lr: float = 0.1) -> dict[str, RuleRow]:
    return {row.arm: row for row in effects_by_rule({"c": records}, {"c": own_lr}, ["off", "x"], "off")}


def test_papers_rule_by_hand() -> None:
    off = {0.05: [0.4, 0.4], 0.1: [0.4, 0.8], 0.2: [0.2, 0.8]}
    x = {0.05: [0.2, 0.4], 0.1: [0.4, 0.2], 0.2: [0.1, 0.4]}
    rows = _by_rule(_rule_cell(off, x))
    effect = rows["x"].effects["papers"]
    assert effect is not None
    # Best by the geometric mean: x at 0.2, against off at its own rate: log ratios of 1/4 and 1/2.
    assert (rows["x"].papers_lr, rows["x"].untuned_lr) == (0.2, 0.1)
    assert effect.mean == pytest.approx(-1.5 * math.log(2))
    assert effect.high - effect.mean == pytest.approx(stats.t.ppf(0.975, 1) * math.log(2) / 2)
    assert rows["x"].effects["last"] is None
    # Off against itself: 0.4 and 0.4 at 0.05 (or 0.2) against 0.4 and 0.8.
    own = rows["off"].effects["papers"]
    assert own is not None
    assert own.mean == pytest.approx(-math.log(2) / 2)
    assert "off 29.3% less than itself untuned" in about_rules(list(rows.values()), "off")


@pytest.mark.parametrize(("own_lr", "untuned"), [(0.1, 0.1), (0.13, 0.1), (0.15, 0.2), (5.0, 0.2)])
def test_untuned_is_the_rate_nearest_to_the_baselines_own(own_lr: float, untuned: float) -> None:
    flat = {lr: [0.5, 0.5] for lr in (0.05, 0.1, 0.2)}
    assert _by_rule(_rule_cell(flat, flat), own_lr)["x"].untuned_lr == untuned


def test_papers_rule_needs_two_tuning_seeds_of_both() -> None:
    two, one = {0.1: [0.5, 0.4], 0.2: [0.4, 0.3]}, {0.1: [0.5], 0.2: [0.4]}
    assert not _by_rule(_rule_cell(one, one))
    assert set(_by_rule(_rule_cell(two, one))) == {"off"}
    assert not effects_by_rule({"c": {}}, {"c": 0.1}, ["off", "x"], "off")
    # A rate that is still being tried has fewer seeds, and is not taken yet.
    growing = _rule_cell(two, {**two, 0.4: [0.01]})
    assert _by_rule(growing)["x"].papers_lr == 0.2


def test_best_epoch_is_scored_at_the_epoch_that_validation_chose() -> None:
    records = [final_run("off", seed, 0.4, best_test=0.2) for seed in (1, 2)]
    records += [final_run("x", seed, 0.4, best_test=0.1) for seed in (1, 2)]
    effects = _by_rule(_cell(records))["x"].effects
    assert effects["last"] is not None
    assert effects["best"] is not None
    assert effects["last"].mean == 0
    assert effects["best"].mean == pytest.approx(-math.log(2))
    assert effects["papers"] is None


def _cell_without_effects(rng: np.random.Generator) -> Records:
    """Two arms that do the same at every rate, with noise; the lowest errors of a run lie below its last."""
    records = []
    for arm in ("off", "x"):
        records += [final_run(arm, seed, math.exp(rng.normal(-2, 0.1))) for seed in range(1, 21)]
        for lr in (0.025, 0.05, 0.1, 0.2, 0.4):
            for seed in range(1_000_001, 1_000_005):
                lowest = rng.normal(-2, 0.1) - abs(rng.normal(0, 0.1))
                records.append(_tried(arm, seed, lr, 0.5, lowest_test=math.exp(lowest)))
    return _cell(records)


def test_papers_rule_finds_a_gain_of_an_arm_that_does_nothing() -> None:
    rng = np.random.default_rng(2)
    cells = {str(place): _cell_without_effects(rng) for place in range(30)}
    off, x = effects_by_rule(cells, dict.fromkeys(cells, 0.1), ["off", "x"], "off")[-2:]
    assert (off.cell, x.cell) == (POOLED, POOLED)
    # The lowest of five means of four, each with standard deviation 0.1 sqrt(1 + 1 - 2 / pi) / 2 = 0.058, is
    # expected 1.16 of these below their mean, by tables of order statistics.
    for row in (off, x):
        assert row.effects["papers"] is not None
        assert row.effects["papers"].mean == pytest.approx(-0.068, abs=0.045)
    assert x.effects["last"] is not None
    assert abs(x.effects["last"].mean) < 0.02


def test_rules_are_pooled_over_cells() -> None:
    cells = {name: _finals({"off": [0.2, 0.2], "x": [0.2 * ratio] * 2}) for name, ratio in (("a", 0.5), ("b", 2))}
    rows = effects_by_rule(cells, {"a": 0.1, "b": 0.1}, ["off", "x"], "off")
    assert [row.cell for row in rows] == ["a", "b", POOLED]
    for rule in ("last", "best"):
        effect = rows[-1].effects[rule]
        assert effect is not None
        assert effect.mean == pytest.approx(0)
        assert effect.pairs == 4


def test_rules_are_compared_over_the_same_cells() -> None:
    """One cell has no tuning runs: over all cells the papers' rule would be that of the other cells alone."""
    rates = {0.1: [0.4, 0.4], 0.2: [0.2, 0.2]}
    finals = _finals({"off": [0.2, 0.2], "x": [0.1, 0.1]})
    tuned = {**_rule_cell(rates, rates), **finals}
    names = ("a", "b", "c")
    own = dict.fromkeys(names, 0.1)

    def pooled(*cells: Records) -> dict[str, RuleRow]:
        rows = effects_by_rule(dict(zip(names, cells, strict=True)), own, ["off", "x"], "off")
        return {row.arm: row for row in rows if row.cell == POOLED}

    rows = pooled(tuned, tuned, finals)
    assert rows["x"].effects["papers"] is None
    assert rows["x"].effects["last"] is not None
    assert "The rule alone" not in about_rules(list(rows.values()), "off")
    everywhere = pooled(tuned, tuned, tuned)
    assert all(everywhere["x"].effects.values())
    assert "The rule alone" in about_rules(list(everywhere.values()), "off")
    only_off = {job: run for job, run in tuned.items() if job.arm == "off"}
    assert "x" not in pooled(tuned, only_off, only_off)


def test_the_gain_of_the_papers_rule_is_told_cell_by_cell_where_nothing_is_pooled() -> None:
    rates = {0.1: [0.4, 0.4], 0.2: [0.2, 0.2]}
    tuned = _rule_cell(rates, rates)
    rename = {job._replace(arm="y"): replace(run, arm="y") for job, run in tuned.items() if job.arm == "x"}
    other = {**{job: run for job, run in tuned.items() if job.arm == "off"}, **rename}
    rows = effects_by_rule({"a": tuned, "b": other}, {"a": 0.1, "b": 0.1}, ["off", "x", "y"], "off")
    assert re.search(r"a: .*rule x has 50.*b: .*rule y has 50", about_rules(rows, "off"))


def test_epochs_before_a_run_diverged_count_by_the_rules_of_epochs() -> None:
    gone = {"status": "diverged", "val": math.nan, "test": math.nan}
    early = {"best_val": 0.1, "best_test": 0.1, "lowest_test": 0.05}
    run = final_run("x", 1, 0.2, **{**gone, **early})
    assert [run.error(score) for score in ("val", "test", "best_test", "lowest_test")] == [1.0, 1.0, 0.1, 0.05]
    never = final_run("x", 1, math.nan, **gone)
    assert never.error("best_test") == 1.0


# Sensitivity


def _curve(error: Callable[[float], float], lrs: Sequence[float], arm: str = "x", **facts: Any) -> Curve:
    records = [_tried(arm, seed, lr, error(lr), **facts) for lr in lrs for seed in (1, 2)]
    (curve,) = curves({"cell": _cell(records)}, [arm])
    return curve


def _valley(slope: float, at: float = 0.1) -> Callable[[float], float]:
    """An error that rises by `slope` in its log for each doubling of the rate, either way."""
    return lambda lr: 0.5 * math.exp(slope * abs(math.log2(lr / at)))


def test_range_of_rates_by_hand() -> None:
    span = rate_range(_curve(_valley(0.1), (0.025, 0.05, 0.1, 0.2, 0.4)))
    doublings = math.log(1.05) / 0.1
    assert (span.low, span.high) == pytest.approx((0.1 / 2**doublings, 0.1 * 2**doublings))
    assert span.factor == pytest.approx(4**doublings)
    assert not span.at_least


def test_range_that_reaches_the_end_of_the_grid() -> None:
    span = rate_range(_curve(_valley(0.1), (0.1, 0.2, 0.4)))
    assert (span.low, span.open_below, span.open_above) == (0.1, True, False)
    flat = rate_range(_curve(lambda lr: 0.5, (0.1, 0.2, 0.4)))
    assert (flat.low, flat.high) == (0.1, 0.4)
    assert flat.factor == pytest.approx(4)
    assert flat.open_below
    assert flat.open_above


def test_range_ends_where_the_error_first_leaves_it() -> None:
    errors = {0.1: 0.5, 0.2: 1.0, 0.4: 0.51}
    span = rate_range(_curve(errors.__getitem__, tuple(errors)))
    assert span.high == pytest.approx(0.1 * 2 ** (math.log(1.05) / math.log(2)))


def test_points_are_geometric_means_with_standard_errors() -> None:
    records = [_tried("x", seed, lr, 0.2 * seed * lr) for lr in (1.0, 2.0) for seed in (1, 2, 4)]
    (curve,) = curves({"cell": _cell(records)}, ["off", "x"])
    logs = np.log([0.2, 0.4, 0.8])
    assert [point.error for point in curve.points] == pytest.approx([0.4, 0.8])
    assert curve.points[0].log_standard_error == pytest.approx(logs.std(ddof=1) / math.sqrt(3))
    assert (curve.best.lr, curve.step) == (1.0, 2.0)


def test_diverged_runs_count_as_having_learnt_nothing() -> None:
    records = [_tried("x", seed, lr, 0.25) for lr in (0.1, 0.2) for seed in (1, 2)]
    records += [_tried("x", 1, 0.4, math.nan, status="diverged"), _tried("x", 2, 0.4, 0.25)]
    (curve,) = curves({"cell": _cell(records)}, ["x"])
    assert curve.points[-1].error == pytest.approx(0.5)
    assert [point.diverged for point in curve.points] == [0, 0, 1]
    assert rate_range(curve).high < 0.4


def test_the_best_rate_is_none_at_which_a_run_diverged() -> None:
    records = [_tried("x", seed, lr, 0.25) for lr in (0.1, 0.2) for seed in (1, 2)]
    diverged = _tried("x", 1, 0.4, math.nan, status="diverged", blind_error=0.3)
    (curve,) = curves({"cell": _cell([*records, diverged, _tried("x", 2, 0.4, 0.01)])}, ["x"])
    assert curve.points[-1].error < 0.25
    assert curve.best.lr == 0.1


def test_a_single_rate_has_no_curve() -> None:
    assert curves({"cell": _cell([_tried("x", 1, 0.1, 0.5), final_run("x", 1, 0.5)])}, ["x"]) == []


RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        (_curve(_valley(0.02), RATES), _curve(_valley(0.2), RATES), 1),
        (_curve(_valley(0.2), RATES), _curve(_valley(0.02), RATES), -1),
        (_curve(_valley(0.2), RATES), _curve(_valley(0.15), RATES), 0),
        # The baseline's may be as wide, beyond its grid.
        (_curve(_valley(0.02), RATES), _curve(_valley(0.1), RATES[3:]), 0),
    ],
    ids=["wider", "narrower", "less than a step", "baseline open"],
)
def test_ranges_differ_where_they_do_by_more_than_a_step(own: Curve, other: Curve, expected: int) -> None:
    assert compare_ranges(own, other) == expected


def test_the_report_answers_whether_a_bad_rate_is_forgiven() -> None:
    baseline = _curve(_valley(0.2), RATES, "off")
    text = about_ranges([baseline, _curve(_valley(0.2), RATES), _curve(_valley(0.02), RATES, "y")], "off")
    assert re.search(r"1\.4 for off, 1\.4 for x, 29\.4 for y", text)
    assert re.search(r"Wider .* tried: y; narrower: none", text)
    assert "2 seeds" in text
    assert about_ranges([baseline], "off") == ""


def test_widths_are_compared_over_cells_that_both_have() -> None:
    """The baseline alone was tried in a cell where rates matter more."""
    flat, steep = _valley(0.1), _valley(0.4)
    off, x = (_curve(flat, RATES, arm) for arm in ("off", "x"))
    alone = replace(_curve(steep, RATES, "off"), cell="steep")
    said = about_ranges([off, x, alone], "off")
    width = f"{rate_range(x).factor:.1f}"
    assert f"{width} for off, {width} for x (in cell)" in said
    y = [replace(_curve(flat, RATES, "y"), cell=name) for name in ("cell", "steep")]
    assert re.search(r"for y \(geometric means over 2 cells\)", about_ranges([off, x, alone, *y], "off"))


# Ratios


def _mediated(arms: Mapping[str, tuple[float, float, float]], seeds: int = 6) -> Records:
    """Final runs of arms with a log ratio to the others, a mean ratio and a spread, and a little noise."""
    rng = np.random.default_rng(3)
    records = []
    for seed in range(1, seeds + 1):
        shared = rng.normal(0, 0.3)
        for arm, (effect, ratio, spread) in arms.items():
            error = math.exp(-2 + shared + effect + rng.normal(0, 0.01))
            records.append(final_run(arm, seed, error, mean_ratio=ratio, ratio_sd=spread))
    return _cell(records)


ARMS = {"off": (0.0, 1.0, 0.0), "farms": (0.1, 1.04, 0.3), "placebo": (0.1, 1.05, 0.29), "fast": (0.1, 2.0, 0.3)}


def test_mediation_has_ratios_and_effects() -> None:
    rows = {row.arm: row for row in mediation({"c": _mediated(ARMS)}, list(ARMS), "off")}
    for arm, (effect, ratio, spread) in ARMS.items():
        row = rows[arm]
        assert (row.mean_ratio, row.ratio_sd, row.mean_lr) == pytest.approx((ratio, spread, 0.1 * ratio))
        if arm != "off":
            assert row.effect is not None
            assert row.effect.low < effect < row.effect.high
    assert rows["off"].effect is None


@pytest.mark.parametrize(("own", "matters"), [(0.1, False), (-0.1, True)])
def test_arms_alike_in_mean_and_spread_tell_the_alphas_part(own: float, matters: bool) -> None:
    cells = {"c": _mediated({**ARMS, "farms": (own, 1.04, 0.3)})}
    (contrast,) = contrasts(mediation(cells, list(ARMS), "off"), cells)
    assert (contrast.first, contrast.second) == ("farms", "placebo")
    assert contrast.effect.mean == pytest.approx(own - 0.1, abs=0.02)
    assert (contrast.p_holm < 0.05) == matters
    assert ("it matters which layer" in about_contrasts([contrast])) == matters


def test_few_seeds_and_other_rates_tell_nothing_of_the_alphas() -> None:
    few = {"c": _mediated(ARMS, seeds=4)}
    found = contrasts(mediation(few, list(ARMS), "off"), few)
    assert len(found) == 1
    assert "can't be told" in about_contrasts(found)
    other_rate = {"c": _cell(final_run("farms", 1, 0.1, lr=0.2, ratio_sd=0.3) for _ in range(1))}
    other_rate["c"].update(_cell([final_run("placebo", 1, 0.1, ratio_sd=0.3)]))
    assert contrasts(mediation(other_rate, ["farms", "placebo"], "off"), other_rate) == []


# What is said


def _rows(errors: Mapping[str, Sequence[float]], **facts: Any) -> list[Row]:
    return summarise({"cell": _finals(errors, **facts)}, list(errors), "off")


def test_differences_are_in_the_errors_own_unit() -> None:
    rows = _rows({"off": [2.0, 2.1, 1.9, 2.0, 2.2], "x": [1.9, 2.02, 1.8, 1.88, 2.1]}, metric="loss")
    difference = rows[1].difference
    test = stats.ttest_1samp([-0.1, -0.08, -0.1, -0.12, -0.1], 0).confidence_interval(0.95)
    assert difference is not None
    assert [difference.mean, difference.low, difference.high] == pytest.approx([-0.1, *test])
    assert "x has 4.9% less (-0.1000 nats) error" in verdict(rows, "off")
    assert f"{-100 * math.expm1(rows[1].effect.low):.1f}% or {-test[0]:.4f} nats (x)" in ruled_out(rows, "off")[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", METRICS)
def test_tables_name_the_unit_of_every_metric(metric: str) -> None:
    records = _finals({"off": [0.25, 0.26], "x": [0.2, 0.21]}, metric=metric)
    printed = _printed(find({"cell": records}, {"cell": 0.1}, ["off", "x"], "off"))
    assert METRICS[metric] in heading(metric)
    assert heading(metric) in printed
    assert ("test error %" in printed) is False
    assert ("74.50" in printed) == (metric in SHARES)
    assert ("0.2550" in printed) == (metric not in SHARES)


@pytest.mark.parametrize("seeds", [4, 5])
def test_below_five_seeds_nothing_is_an_effect(seeds: int) -> None:
    rows = _rows({"off": [0.4, 0.41, 0.39, 0.4, 0.42][:seeds], "x": [0.2, 0.21, 0.19, 0.205, 0.2][:seeds]})
    assert rows[1].p_holm < 0.001
    enough = seeds == 5
    assert ("x has" in verdict(rows, "off")) == enough
    assert ("proves nothing" in verdict(rows, "off")) != enough
    (said,) = ruled_out(rows, "off")
    assert ("rule nothing out" in said) != enough
    assert ("any loss is ruled out" in said) == enough


def test_a_cell_whose_few_seeds_agree_rules_nothing_out_over_all_cells() -> None:
    rng = np.random.default_rng(6)
    off = rng.uniform(0.2, 0.3, 8)
    cells = {
        "many": _finals({"off": list(off), "x": list(off * np.exp(rng.normal(0, 0.02, 8)))}),
        "few": _finals({"off": [0.25, 0.25], "x": [0.2, 0.2]}),
    }
    rows = summarise(cells, ["off", "x"], "off")
    assert "with 2 seeds" in verdict(rows, "off")
    many, pooled = ruled_out(rows, "off")
    assert "gains of more than" in many
    assert pooled.startswith(POOLED)
    assert "rule nothing out" in pooled


def test_ruled_out_names_the_ends_of_the_widest_intervals() -> None:
    rng = np.random.default_rng(4)
    off = rng.uniform(0.2, 0.3, 12)
    errors = {"off": off, "x": off * np.exp(rng.normal(0, 0.02, 12)), "y": off * np.exp(rng.normal(0, 0.1, 12))}
    rows = _rows({arm: list(own) for arm, own in errors.items()})
    interval = stats.ttest_1samp(np.log(errors["y"] / off), 0).confidence_interval(0.95)
    (said,) = ruled_out(rows, "off")
    low, high = -100 * math.expm1(interval.low), 100 * math.expm1(interval.high)
    assert f"gains of more than {low:.1f}% (y)" in said
    assert f"losses of more than {high:.1f}% (y)" in said


@pytest.mark.parametrize(("in_b", "holds"), [(0.5, True), (1.0, False)])
def test_an_effect_is_said_to_hold_for_other_tasks_where_it_does(in_b: float, holds: bool) -> None:
    rng = np.random.default_rng(5)
    cells = {}
    for name, ratio in (("a", 0.5), ("b", in_b), ("c", 0.5)):
        off = rng.uniform(0.2, 0.3, 10)
        cells[name] = _finals({"off": list(off), "x": list(off * ratio * np.exp(rng.normal(0, 0.02, 10)))})
    rows = summarise(cells, ["off", "x"], "off")
    assert rows[-1].p_holm < 0.001
    said = about_tasks(rows)
    assert ("holds for tasks like these" in said) == holds
    assert ("may not hold" in said) != holds
    assert about_tasks(summarise({"a": cells["a"]}, ["off", "x"], "off")) == ""


def test_cells_with_different_arms_are_told_one_by_one() -> None:
    rng = np.random.default_rng(7)
    cells = {}
    for name, arm in (("a", "x"), ("b", "y")):
        off = rng.uniform(0.2, 0.3, 8)
        cells[name] = _finals({"off": list(off), arm: list(off * np.exp(rng.normal(-0.5, 0.02, 8)))})
    rows = summarise(cells, ["off", "x", "y"], "off")
    assert not [row for row in rows if row.cell == POOLED], "a baseline alone has nothing to be compared with"
    assert re.search(r"In a, .*x has .* less.*In b, .*y has .* less", verdict(rows, "off"))
    with_z = {name: {**runs, **_finals({"z": [0.25] * 8})} for name, runs in cells.items()}
    said = verdict(summarise(with_z, ["off", "x", "y", "z"], "off"), "off")
    assert re.search(r"Over all cells, no arm.*In a, .*x has.*In b, .*y has", said)


def test_below_five_seeds_nothing_is_ruled_out_over_tasks() -> None:
    def said(seeds: int) -> str:
        rng = np.random.default_rng(8)
        cells = {}
        for name in "abcd":
            off = rng.uniform(0.2, 0.3, seeds)
            cells[name] = _finals({"off": list(off), "x": list(off * np.exp(rng.normal(0, 0.02, seeds)))})
        return about_tasks(summarise(cells, ["off", "x"], "off"))

    assert "rule nothing out" in said(2)
    assert "possible" not in said(2)
    assert "possible" in said(5)


# Files


def _printed(findings: Findings) -> str:
    stream = io.StringIO()
    show(findings, Console(file=stream, width=120))
    return stream.getvalue()


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def _whole_study(arms: Sequence[str]) -> dict[str, Records]:
    """Two cells with tuning runs of three seeds and final ones of six."""
    cells = {}
    rng = np.random.default_rng(6)
    for cell, metric in (("a", "nrmse"), ("b", "loss")):
        facts: dict[str, Any] = {"experiment": cell, "metric": metric}
        records = []
        for place, arm in enumerate(arms):
            ratios = {"mean_ratio": 1 + 0.1 * (place // 2), "ratio_sd": 0.1 * (place // 2)}
            for lr in (0.0125, 0.05, 0.2):
                for seed in (1_000_001, 1_000_002, 1_000_003):
                    error = _valley(0.03)(lr) * math.exp(rng.normal(0, 0.01))
                    records.append(_tried(arm, seed, lr, error, **facts, **ratios))
            errors = 0.5 * np.exp(rng.normal(0, 0.02, 6))
            records += [final_run(arm, seed, float(error), **facts, **ratios) for seed, error in enumerate(errors)]
        cells[cell] = _cell(records)
    return cells


CSVS = ("effects.csv", "rules.csv", "sensitivity.csv", "rate_ranges.csv", "mediation.csv", "contrasts.csv")
PICTURES = ("effects.png", "rules.png", "sensitivity.png", "mediation.png")


def test_everything_is_written_and_can_be_read_back(tmp_path: Path) -> None:
    arms = ["off", "full", "farms", "placebo"]
    findings = find(_whole_study(arms), {"a": 0.1, "b": 0.1}, arms, "off")
    assert set(write(findings, tmp_path)) == {*CSVS, *PICTURES} == {path.name for path in tmp_path.iterdir()}

    effects = _table(tmp_path / "effects.csv")
    for row, read in zip(findings.rows, effects, strict=True):
        assert (read["cell"], read["arm"]) == (row.cell, row.arm)
        assert read["effect_mean"] == ("" if row.effect is None else str(row.effect.mean))
        assert read["difference_low"] == ("" if row.difference is None else str(row.difference.low))
        assert read["tasks_tau"] == ("" if row.over_tasks is None else str(row.over_tasks.tau))
    for rules, read in zip(findings.rules, _table(tmp_path / "rules.csv"), strict=True):
        papers = rules.effects["papers"]
        assert read["papers_mean"] == ("" if papers is None else str(papers.mean))
    points = [point for curve in findings.curves for point in curve.points]
    for point, read in zip(points, _table(tmp_path / "sensitivity.csv"), strict=True):
        assert float(read["low"]) < float(read["val_error"]) == point.error < float(read["high"])
    for curve, read in zip(findings.curves, _table(tmp_path / "rate_ranges.csv"), strict=True):
        assert float(read["factor"]) == rate_range(curve).factor
    for ratios, read in zip(findings.mediation, _table(tmp_path / "mediation.csv"), strict=True):
        assert (read["arm"], float(read["mean_ratio"])) == (ratios.arm, ratios.mean_ratio)
    for contrast, read in zip(findings.contrasts, _table(tmp_path / "contrasts.csv"), strict=True):
        assert (read["first"], read["second"]) == (contrast.first, contrast.second)

    text = _printed(findings)
    for title in ("Test error by arm", "over tasks", "three rules", "Learning rates within 5%", "mean ratio"):
        assert title in text
    assert "…" not in text


def test_names_with_brackets_are_shown_as_they_are() -> None:
    arms = ["off", "farms[small]", "x[/b]"]
    text = _printed(find({"a": _whole_study(arms)["a"]}, {"a": 0.1}, arms, "off"))
    assert all(text.count(arm) > 2 for arm in arms)


def test_pictures_show_names_that_matplotlib_takes_for_something_else(tmp_path: Path) -> None:
    arms = ["off", "a$_$", "_hidden"]
    cells = _whole_study(arms)
    assert set(PICTURES) <= set(write(find(cells, dict.fromkeys(cells, 0.1), arms, "off"), tmp_path))


def test_files_of_what_is_no_longer_found_are_removed(tmp_path: Path) -> None:
    arms = ["off", "full", "farms", "placebo"]
    study = {"a": _whole_study(arms)["a"]}
    assert "contrasts.csv" in write(find(study, {"a": 0.1}, arms, "off"), tmp_path)
    (tmp_path / "results.csv").write_text("not the report's")
    write(
        find(
            {"a": {job: run for job, run in study["a"].items() if job.arm != "placebo"}}, {"a": 0.1}, arms, "off"
        ),
        tmp_path,
    )
    assert {path.name for path in tmp_path.iterdir()} == {*CSVS, *PICTURES, "results.csv"} - {"contrasts.csv"}


def test_pictures_show_each_arm_in_its_colour(tmp_path: Path) -> None:
    arms = ["off", *(f"arm{place}" for place in range(1, 12))]
    write(find({"a": _whole_study(arms)["a"]}, {"a": 0.1}, arms, "off"), tmp_path)
    styles = arm_styles(arms, "off")
    assert len(set(styles.values())) == len(arms)
    for name in PICTURES:
        pixels = (imread(tmp_path / name)[..., :3] * 255).round().astype(int)
        for arm, style in styles.items():
            if (name, arm) == ("effects.png", "off"):  # no effect on itself
                continue
            colour = np.round(np.array(to_rgb(style.colour)) * 255).astype(int)
            assert (np.abs(pixels - colour).max(axis=-1) <= 1).sum() > 30, (name, arm)


@pytest.mark.parametrize("count", [9, 19])
def test_the_figures_name_every_arm_of_one_cell(tmp_path: Path, count: int) -> None:
    """The effects next to their rows; the curves of many arms in panels of their own, each with the baseline."""
    arms = ["off", *(f"arm{place}" for place in range(1, count + 1))]
    findings = find({"a": _whole_study(arms)["a"]}, {"a": 0.1}, arms, "off")
    write(findings, tmp_path)
    heights = {name: imread(tmp_path / name).shape[0] for name in ("effects.png", "sensitivity.png")}
    assert heights["effects.png"] > 35 * count
    panel_rows = -(-count // 3) if count >= 10 else 1
    assert heights["sensitivity.png"] > 300 * panel_rows


# Results of version 0.1, which have no best epochs and no ratios


def _published(folder: Path) -> dict[str, Records]:
    """Give each cell of docs/results/study a folder with its results, as a study does, and read them."""
    header, *rows = (RESULTS / "results.csv").read_text().splitlines(keepends=True)
    cells: dict[str, Records] = {}
    for name in dict.fromkeys(row["cell"] for row in _table(RESULTS / "effects.csv")):
        own = [row for row in rows if row.startswith(f"{name},")]
        if own:
            (folder / name).mkdir(parents=True)
            (folder / name / "results.csv").write_text("".join([header, *own]))
            cells[name] = read_records(folder / name)
    assert sum(map(len, cells.values())) == len(rows)
    return cells


def test_published_results_are_still_reported_the_same(tmp_path: Path) -> None:
    published = _table(RESULTS / "effects.csv")
    arms = list(dict.fromkeys(row["arm"] for row in published))
    cells = _published(tmp_path)
    write(find(cells, dict.fromkeys(cells, 0.1), arms, "off"), tmp_path)
    for now, before in zip(_table(tmp_path / "effects.csv"), published, strict=True):
        _assert_same(now, before)


def _assert_same(now: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Compare the columns that there were; sums differ by rounding between versions of Python."""
    for name, text in before.items():
        try:
            assert float(now[name]) == pytest.approx(float(text), rel=1e-9)
        except ValueError:
            assert now[name] == text


def test_old_results_have_the_tables_that_can_be_made_of_them(tmp_path: Path) -> None:
    cells = _whole_study(["off", "x"])
    for name, records in cells.items():
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, records.values())
        path = tmp_path / name / "results.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line.rsplit(",", 6)[0] for line in lines))
        assert path.read_text().splitlines()[0].endswith(",config")
    old = {name: read_records(tmp_path / name) for name in cells}
    findings = find(old, {"a": 0.1, "b": 0.1}, ["off", "x"], "off")
    assert str(findings.rows) == str(summarise(cells, ["off", "x"], "off"))  # NaN is not equal to itself
    written = write(findings, tmp_path)
    assert written == ["effects.csv", "effects.png", "sensitivity.csv", "rate_ranges.csv", "sensitivity.png"]
    assert "mean ratio" not in _printed(findings)


def test_a_study_that_is_still_tuning_shows_its_curves(tmp_path: Path) -> None:
    tuning = {job: run for job, run in _whole_study(["off", "x"])["a"].items() if job.phase == "tune"}
    findings = find({"a": tuning}, {"a": 0.1}, ["off", "x"], "off")
    assert "Nothing to compare with off yet" in _printed(findings)
    assert {"sensitivity.png", "rules.csv"} <= set(write(findings, tmp_path))
    assert find({"a": {}}, {"a": 0.1}, ["off", "x"], "off").curves == []


def test_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["off", "full", "farms"]
    for name, records in zip(("digits_vgg16_300", "darcy_fno_50"), _whole_study(arms).values(), strict=True):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, records.values())
    GlobalHydra.instance().clear()
    cells = "experiment=study/digits_vgg16_300,study/darcy_fno"
    main(["--report", cells, f"study.folder={tmp_path}", f"study.arms={arms}"])
    printed = capsys.readouterr().out
    for words in ("nRMSE", "darcy_fno_50: against off", "three rules", "forgive", "mean ratio", "rate_ranges.csv"):
        assert words in printed
    assert {*CSVS, *PICTURES} - {"contrasts.csv"} <= {path.name for path in tmp_path.iterdir()}
    # The baseline's own rate, which counts as untuned, comes from the settings of each experiment.
    by_cell = {row["cell"]: row["untuned_lr"] for row in _table(tmp_path / "rules.csv") if row["untuned_lr"]}
    assert by_cell == {"digits_vgg16_300": "0.05", "darcy_fno_50": "0.0125"}


def test_a_report_says_where_the_settings_are_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GlobalHydra.instance().clear()
    settings = ["experiment=study/darcy_fno", f"study.folder={tmp_path}", 'study.arms=["off",full]']
    (cell,) = load_study(settings).cells
    with locked(cell):
        keep_settings(cell)
    records = _whole_study(["off", "full"])["b"].values()
    write_records(cell.folder, [replace(record, experiment=cell.name) for record in records])
    for more, differs in (([], False), (["trainer.max_epochs=7"], True)):
        GlobalHydra.instance().clear()
        main(["--report", *settings, *more])
        printed = " ".join("".join(capsys.readouterr()).split())
        assert "Test error by arm" in printed
        assert ("max_epochs was" in printed) == differs


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",ok,", ",fine,", "status"),
        (",0.25,0.25,", ",nan,0.25,", "not finite"),
        (",nrmse,", ",speed,", "metric"),
        ("\nb,", "\nc,", "2 cells, b, c"),
    ],
)
def test_results_that_no_study_wrote_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_records(tmp_path, [final_run("x", seed, 0.25, experiment="b") for seed in (1, 2)])
    file = tmp_path / RESULTS_FILE
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        read_records(tmp_path)


def test_an_error_of_zero_is_named() -> None:
    runs = [final_run(arm, seed, error) for arm, error in (("off", 0.5), ("x", 0.0)) for seed in (1, 2)]
    with pytest.raises(RecipeError, match=r"cell.*arm='x'.*error of 0"):
        summarise({"cell": _cell(runs)}, ["off", "x"], "off")


def test_report_of_nothing_names_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        main(["--report", "experiment=study/darcy_fno", f"study.folder={tmp_path / 'misspelt'}"])
    assert ended.value.code == 2
    printed = "".join("".join(capsys.readouterr()).split())
    assert "misspelt" in printed
    assert "study.folder" in printed


def test_cells_of_one_study_have_one_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GlobalHydra.instance().clear()
    cells = "+study.cells={study/darcy_fno:{},study/darcy_unet:{baseline:full}}"
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", cells, f"study.folder={tmp_path}"])
    assert ended.value.code == 2
    assert "baseline" in "".join(capsys.readouterr())


def test_an_arm_of_one_cell_has_no_row_over_all_cells() -> None:
    cells = _whole_study(["off", "x", "y"])
    cells["b"] = {job: run for job, run in cells["b"].items() if job.arm != "y"}
    rows = summarise(cells, ["off", "x", "y"], "off")
    assert [row.arm for row in rows if row.cell == POOLED] == ["off", "x"]
    assert [row.cell for row in rows if row.arm == "y"] == ["a"]


def test_arms_that_are_ahead_of_the_baseline_are_reported_without_a_figure_of_effects(tmp_path: Path) -> None:
    ahead = {job: run for job, run in _whole_study(["off", "x"])["a"].items() if job.arm == "x"}
    findings = find({"a": ahead}, {"a": 0.1}, ["off", "x"], "off")
    assert "mediation.csv" in write(findings, tmp_path)
    assert not (tmp_path / "mediation.png").exists()


def test_results_with_ratios_and_best_epochs_are_read_back(tmp_path: Path) -> None:
    cells = _whole_study(["off", "x"])
    write_records(tmp_path, cells["a"].values())
    assert read_records(tmp_path) == cells["a"]


@pytest.mark.parametrize(("ratio", "words"), [(0.97, "-3.0"), (0.9995, "-0.05"), (1.004, "+0.40"), (1.5, "+50.0")])
def test_small_changes_have_a_digit_more(ratio: float, words: str) -> None:
    assert show_percent(math.log(ratio)) == words
