"""The tables of the study pages: each says what its runs say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.published import published_runs
from benchmarks.tables import END_OF_TABLE, TABLES, ArmTable, Cell, PairTable, SettingTable, TriesTable
from recipes.study.effects import summarise
from recipes.study.records import Job, Record, write_records
from tests.recipes.study_records import final_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"


def publish_runs(results: Path, metric: str, scores: dict[str, list[float]]) -> Cell:
    """Write the final runs of a cell, with test scores by arm and seed."""
    runs = [
        final_run(arm, seed, score, metric=metric) for arm, own in scores.items() for seed, score in enumerate(own)
    ]
    (results / "one").mkdir()
    write_records(results / "one", runs)
    return Cell("one", runs[0].experiment)


def runs_of_cell(folder: Path, cell: str) -> dict[Job, Record]:
    """Return the final runs of a cell: the folder's own, or else those of the folder with the most."""
    own = published_runs(str(folder.relative_to(RESULTS)), cell, RESULTS)
    if own:
        return own
    others = (path.parent.relative_to(RESULTS) for path in RESULTS.glob("**/results.csv"))
    return max((published_runs(str(other), cell, RESULTS) for other in others), key=len)


def cells_of(line: str) -> list[str]:
    """Return the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestArmTable:
    def test_accuracies_differ_in_points(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "accuracy", {"off": [0.80, 0.90, 0.70], "full": [0.85, 0.93, 0.78]})
        table = ArmTable("page", cell, {"off": "plain", "full": "a map"}).markdown(tmp_path).splitlines()
        assert cells_of(table[0])[5] == "against off, points (95 %)"
        assert cells_of(table[2])[:5] == ["off", "plain", "0.1", "3", "20.0 %"]
        assert cells_of(table[2])[5:] == ["", ""]
        error, change, _ = cells_of(table[3])[4:]
        assert error == "14.7 %"
        assert change == "-5.3 (-11.6 to +0.9)"  # paired t-interval of -5, -3, -8: 5.333 -+ 4.303 x 1.453

    def test_losses_differ_in_nats(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "loss", {"off": [2.0, 2.1], "full": [1.99, 2.07]})
        table = ArmTable("page", cell, {"off": "plain", "full": "a map"}).markdown(tmp_path).splitlines()
        assert cells_of(table[0])[4:6] == ["loss", "against off, nats (95 %)"]
        assert cells_of(table[3])[4:6] == ["2.030", "-0.020 (-0.147 to +0.107)"]

    def test_other_errors_change_in_per_cent(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "nrmse", {"off": [0.2, 0.1], "full": [0.1, 0.05]})
        table = ArmTable("page", cell, {"off": "plain", "full": "a map"}).markdown(tmp_path).splitlines()
        assert cells_of(table[0])[5] == "against off, % (95 %)"
        assert cells_of(table[3])[5].startswith("-50.0 (")

    def test_names_an_arm_without_runs(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "loss", {"off": [2.0, 2.1]})
        with pytest.raises(ValueError, match=r"one .* full"):
            ArmTable("page", cell, {"off": "plain", "full": "a map"}).markdown(tmp_path)


class TestSettingTable:
    def test_a_line_a_cell_and_a_column_an_arm(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "loss", {"off": [2.0, 2.1], "full": [1.9, 2.0], "farms": [2.0, 2.1]})
        table = SettingTable("page", "Adam", {"farms": "F", "full": "W"}, {"here": cell}).markdown(tmp_path)
        header, _, line = table.splitlines()
        assert cells_of(header) == ["setting", "seeds", "Adam: rate, loss", "F", "W"]
        assert cells_of(line)[:3] == ["here", "2", "0.1, 2.050"]
        assert [cell.split()[0] for cell in cells_of(line)[3:]] == ["+0.000", "-0.100"]


class TestPairTable:
    def test_compares_two_arms_and_not_the_baseline(self, tmp_path: Path) -> None:
        cell = publish_runs(tmp_path, "loss", {"off": [9.0, 9.0], "full": [2.0, 2.1], "shrinkage": [1.9, 2.1]})
        table = PairTable("page", "shrinkage", "change", {"here": (cell, "full")}).markdown(tmp_path)
        assert cells_of(table.splitlines()[-1])[2].startswith("-0.050 nats (")


class TestTriesTable:
    def test_more_rates_may_change_the_best_one(self, tmp_path: Path) -> None:
        for folder, errors in (("first", {0.1: 0.3, 0.2: 0.4}), ("more", {0.14: 0.25})):
            (tmp_path / folder).mkdir()
            runs = [final_run("off", 1, error, phase="tune", lr=lr) for lr, error in errors.items()]
            write_records(tmp_path / folder, runs)
        table = TriesTable("page", "more", {"here": Cell("first", "cell")}).markdown(tmp_path)
        assert cells_of(table.splitlines()[-1]) == ["here", "2", "0.1, 0.300", "3", "0.14, 0.250", "1"]


class TestPublished:
    @pytest.mark.parametrize("name", TABLES)
    def test_page_has_the_table_of_its_runs(self, name: str) -> None:
        table = TABLES[name]
        page = (RESULTS / table.page / "README.md").read_text(encoding="utf-8")
        assert f"<!-- table {name} -->\n\n{table.markdown(RESULTS)}\n\n{END_OF_TABLE}" in page

    def test_every_place_for_a_table_has_one(self) -> None:
        found = {
            (page.parent.relative_to(RESULTS).as_posix(), name)
            for page in RESULTS.glob("**/README.md")
            for name in re.findall(r"<!-- table (.*) -->", page.read_text(encoding="utf-8"))
        }
        assert found == {(table.page, name) for name, table in TABLES.items()}

    @pytest.mark.parametrize(
        "table",
        sorted(RESULTS.glob("**/effects.csv")),
        ids=lambda path: path.parent.relative_to(RESULTS).as_posix(),
    )
    def test_effects_are_those_of_the_runs(self, table: Path) -> None:
        with table.open(newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["cell"] != "all cells"]
        assert rows
        for cell in dict.fromkeys(row["cell"] for row in rows):
            published = {row["arm"]: row for row in rows if row["cell"] == cell}
            found = {row.arm: row for row in summarise({cell: runs_of_cell(table.parent, cell)}, published, "off")}
            for arm, row in published.items():
                assert int(row["runs"]) == found[arm].runs, (cell, arm)
                assert float(row["error_mean"]) == pytest.approx(found[arm].error_mean), (cell, arm)
                if effect := found[arm].effect:
                    told = [float(row[f"effect_{name}"]) for name in ("mean", "low", "high", "p")]
                    assert told == pytest.approx([effect.mean, effect.low, effect.high, effect.p]), (cell, arm)

    def test_command_writes_every_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        cell = publish_runs(tmp_path, "loss", {"off": [2.0, 2.1], "full": [1.9, 2.0]})
        page = tmp_path / "study" / "README.md"
        page.parent.mkdir()
        page.write_text(f"# Title\n\n<!-- table a -->\nold\n{END_OF_TABLE}\n\nafter\n", encoding="utf-8")
        table = ArmTable("study", cell, {"off": "plain", "full": "a map"})
        monkeypatch.setattr(tables, "TABLES", {"a": table})
        tables.main()
        text = page.read_text(encoding="utf-8")
        assert table.markdown(tmp_path) in text
        assert "old" not in text
        assert text.endswith("after\n")
