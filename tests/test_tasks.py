"""The summary of all studies: it compares the runs that it names, and its page says what they say."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tasks
from benchmarks.tasks import (
    METHODS,
    SEARCHED,
    TASKS,
    Task,
    compare,
    direction,
    placement,
    runs_of,
    summary,
    where_it_acts,
)
from recipes.study.records import write_records
from tests.recipes.study_records import final_run

ROOT = Path(__file__).parents[1]


def publish_runs(
    results: Path,
    folder: str,
    cell: str,
    errors: dict[str, list[float]],
    facts: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write final runs of a cell, with errors by arm and seed, next to others that are not to count."""
    (results / folder).mkdir(parents=True, exist_ok=True)
    runs = [
        final_run(arm, seed, error, experiment=cell, **(facts or {}).get(arm, {}))
        for arm, own in errors.items()
        for seed, error in enumerate(own)
    ]
    tried = [replace(run, phase="tune", test=9.0) for run in runs]
    elsewhere = [replace(run, experiment="another", test=9.0) for run in runs]
    write_records(results / folder, [*runs, *tried, *elsewhere])


class TestCompare:
    def test_is_the_mean_log_ratio_of_the_final_runs(self, tmp_path: Path) -> None:
        publish_runs(tmp_path, "one", "cell", {"off": [0.5, 0.4], "full": [0.25, 0.3]})
        rows = compare([Task("a task", "one", "cell", {"whole": "full"})], tmp_path)
        (row,) = rows
        assert (row.cell, row.arm) == ("a task", "whole")
        assert row.effect is not None
        assert row.effect.mean == pytest.approx((math.log(0.5) + math.log(0.75)) / 2)

    def test_takes_arms_of_other_names_as_one_method(self, tmp_path: Path) -> None:
        publish_runs(tmp_path, "one", "cell", {"off": [0.5, 0.4], "full": [0.25, 0.3]})
        publish_runs(tmp_path, "two", "cell", {"off": [0.5, 0.4], "full_s1": [0.5, 0.5]})
        found = compare(
            [Task("a", "one", "cell", {"whole": "full"}), Task("b", "two", "cell", {"whole": "full_s1"})], tmp_path
        )
        assert [row.arm for row in found] == ["whole"] * 3
        assert found[-1].over_tasks is not None
        assert found[-1].over_tasks.cells == 2

    def test_names_an_arm_without_runs(self, tmp_path: Path) -> None:
        publish_runs(tmp_path, "one", "cell", {"off": [0.5]})
        with pytest.raises(ValueError, match=r"one .* cell .* full"):
            runs_of(Task("a task", "one", "cell", {"whole": "full"}), tmp_path)


class TestPlacement:
    def test_compares_right_and_wrong_layers_seed_by_seed(self, tmp_path: Path) -> None:
        errors = {"off": [0.9, 0.9], "farms": [0.2, 0.3], "placebo": [0.4, 0.4]}
        publish_runs(tmp_path, "one", "cell", errors)
        publish_runs(tmp_path, "two", "cell", errors)
        arms = {"farms": "farms", "shuffled": "placebo"}
        found = placement([Task(name, name, "cell", arms, "farms") for name in ("one", "two")], tmp_path)
        assert found is not None
        assert found.mean == pytest.approx((math.log(0.5) + math.log(0.75)) / 2)
        assert found.cells == 2

    def test_leaves_out_tasks_without_shuffled_ratios(self, tmp_path: Path) -> None:
        publish_runs(tmp_path, "one", "cell", {"off": [0.5, 0.4], "full": [0.25, 0.3]})
        assert placement([Task("a task", "one", "cell", {"whole": "full"})], tmp_path) is None

    def test_leaves_out_tasks_with_two_base_rates_on_request(self, tmp_path: Path) -> None:
        errors = {"off": [0.9, 0.9], "farms": [0.2, 0.3], "placebo": [0.4, 0.4]}
        for name in ("one", "two"):
            publish_runs(tmp_path, name, "cell", errors)
        publish_runs(tmp_path, "other rate", "cell", errors, {"placebo": {"lr": 0.2}})
        arms = {"farms": "farms", "shuffled": "placebo"}
        cells = [Task(name, name, "cell", arms, "farms") for name in ("one", "two", "other rate")]
        counts = [placement(cells, tmp_path, same_rate=same_rate) for same_rate in (False, True)]
        assert [found.cells for found in counts if found] == [3, 2]


class TestDirection:
    def test_compares_each_tasks_map_with_the_same_reversed(self, tmp_path: Path) -> None:
        publish_runs(tmp_path, "one", "cell", {"off": [0.9, 0.9], "full": [0.2, 0.3], "full_reversed": [0.4, 0.4]})
        publish_runs(
            tmp_path, "two", "cell", {"off": [0.9, 0.9], "farms": [0.2, 0.3], "farms_reversed": [0.4, 0.4]}
        )
        tasks = [
            Task("whole matrices", "one", "cell", {"whole": "full", "reversed": "full_reversed"}),
            Task("FARMS alone", "two", "cell", {"farms": "farms", "reversed": "farms_reversed"}),
        ]
        found = direction(tasks, tmp_path)
        assert found is not None
        assert found.mean == pytest.approx((math.log(0.5) + math.log(0.75)) / 2)


class TestWhereItActs:
    def test_leaves_out_tasks_whose_ratios_stay_at_1(self, tmp_path: Path) -> None:
        acts = {"shrinkage": {"ratio_sd": 0.1}}
        errors = {"off": [0.5, 0.4], "shrinkage": [0.25, 0.3]}
        for name, facts in (("one", acts), ("two", acts), ("idle", {})):
            publish_runs(tmp_path, name, "cell", errors, facts)
        cells = [Task(name, name, "cell", {"shrinkage": "shrinkage"}) for name in ("one", "two", "idle")]
        found = where_it_acts("shrinkage", cells, tmp_path)
        assert found is not None
        assert found.cells == 2
        assert found.mean == pytest.approx((math.log(0.5) + math.log(0.75)) / 2)


class TestPublished:
    @pytest.fixture(autouse=True)
    def at_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)

    def test_tasks_use_known_methods_and_their_own_cell(self) -> None:
        assert {method for task in TASKS for method in task.arms} == set(METHODS)
        cells = [(task.folder, task.cell) for task in TASKS]
        assert len(set(cells)) == len({task.name for task in TASKS}) == len(TASKS)

    def test_at_least_ten_seeds_of_every_arm(self) -> None:
        assert min(row.effect.pairs for row in (*compare(TASKS), *compare(SEARCHED)) if row.effect) >= 10

    def test_one_rate_in_place_of_those_of_the_searches_is_one(self) -> None:
        for task, searched in zip(TASKS, SEARCHED, strict=True):
            rates = {run.lr for run in runs_of(task).values()}
            assert searched.folder == task.folder or len(rates) == 1

    def test_shuffled_ratios_are_of_a_method_that_the_task_has(self) -> None:
        assert all(task.shuffles in task.arms for task in TASKS if "shuffled" in task.arms)

    def test_page_and_file_are_those_of_the_runs(self) -> None:
        rows = compare(TASKS)
        page = (ROOT / "docs/results/tasks/README.md").read_text(encoding="utf-8")
        assert summary(rows) in page
        with (ROOT / "docs/results/tasks/tasks.csv").open(newline="") as file:
            published = {(row["method"], row["task"]): float(row["effect"]) for row in csv.DictReader(file)}
        found = {(row.arm, row.cell): row.effect.mean for row in rows if row.effect and row.over_tasks is None}
        assert published == pytest.approx(found, rel=1e-4)

    def test_command_writes_table_file_and_picture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["tasks", "--out", str(tmp_path / "out")])
        tasks.main()
        printed = capsys.readouterr().out
        assert re.search(r"shrunk effects \(the default\)", printed)
        assert printed.strip() in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert (tmp_path / "out" / "tasks.png").stat().st_size > 10_000
