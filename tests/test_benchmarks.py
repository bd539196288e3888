"""Benchmarks run on tiny models, and what they compare does the same work; their timings are not tested here."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import accuracy, epoch, results, scaling, spectral_pass, step, timing
from benchmarks.models import settings
from benchmarks.references import plain_alphas, reference_pass, tail_fit
from farms_tb import analyze
from farms_tb.options import SpectrumOptions
from farms_tb.weights.values import NO_VALUES
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.recipe_runs import TINY_UNET
from tests.reference import spectrum

Run = Callable[..., tuple[Path, str]]


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3), nn.Linear(24, 40), nn.Linear(30, 6))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark; return the folder that it wrote and what it printed."""
    threads = torch.get_num_threads()

    def once(module: ModuleType, *options: str) -> tuple[Path, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, "--out", str(tmp_path)])
        try:
            module.main()
        finally:
            torch.set_num_threads(threads)
        return tmp_path, capsys.readouterr().out

    return once


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_page(folder: Path, printed: str, picture: str) -> None:
    """The page holds machine, versions, picture and the tables that were printed."""
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert f"]({picture})" in page
    assert (folder / picture).stat().st_size > 5000
    for text in (page, printed):
        assert "machine   " in text
        assert "farms_tb" in text
    tables = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(tables) >= 3
    assert set(tables) <= set(page.splitlines())


class TestSpectralPass:
    def test_runs(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            spectral_pass, "CASES", {"one": spectral_pass.Case(tiny), "two": spectral_pass.Case(tiny)}
        )
        folder, printed = run(spectral_pass, "--networks", "one", "two", "--times", "2")
        assert_page(folder, printed, "pass.png")
        found = rows(folder / "pass.csv")
        assert [row["network"] for row in found] == ["one", "two"]
        for row in found:
            assert (row["layers"], row["rounds"]) == ("4", "2")
            assert int(row["eigenvalues"]) == sum(r.num_eigenvalues for r in analyze(tiny()).layers.values())
            assert float(row["analyze_ratio"]) == 1
            assert float(row["update"]) > max(float(row["windows"]), float(row["whole"])) > 0

    @pytest.mark.parametrize("esd", ["farms", "full"])
    def test_both_ways_measure_the_same(self, esd: str) -> None:
        found = reference_pass(tiny(), SpectrumOptions(esd=esd, min_eigenvalues=2))  # type: ignore[arg-type]
        assert found == pytest.approx(analyze(tiny(), esd=esd, min_eigenvalues=2).alphas, rel=1e-4)  # type: ignore[arg-type]

    def test_what_is_timed_are_all_networks_of_the_page(self) -> None:
        for name, case in spectral_pass.CASES.items():
            with torch.device("meta"):
                model = case.make()
            plan = analyze(model, **case.options).layers.values()
            # All but the ViT's embeddings of positions.
            assert sum(record.status != NO_VALUES for record in plan) <= 2, name
        assert {"ResNet-18", "ResNet-34", "VGG-16", "VGG-19", "WRN-28-10", "UNet", "FNO", "ViT-B/16"} <= set(
            spectral_pass.CASES
        )


class TestEpoch:
    pytestmark = LIGHTNING_NOISE

    @pytest.mark.filterwarnings("ignore")
    def test_runs(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def whole(device: str) -> epoch.Task:
            cfg = settings(*TINY_UNET, f"paths.data_dir={tmp_path / 'data'}")
            return epoch.Task(cfg, lambda: epoch.build(cfg, "data"), epochs=3)

        def part(device: str) -> epoch.Task:
            cfg = settings("experiment=farms/cifar100_resnet18", "model.net.width=2")
            data = lambda: epoch.RandomImages(".", "cifar100", val_size=16, batch_size=4)  # noqa: E731
            return epoch.Task(cfg, data, epochs=2, batches=1)

        monkeypatch.setattr(epoch.RandomImages, "size", 56)
        monkeypatch.setattr(epoch, "TASKS", {"whole": whole, "part": part})
        monkeypatch.setattr(epoch, "STEPS", 2)
        folder, printed = run(epoch, "--tasks", "whole", "part", "--rounds", "2")
        assert_page(folder, printed, "epoch.png")
        first, second = rows(folder / "epoch.csv")
        assert (first["batches"], first["batches_run"]) == ("3", "3")
        assert (second["batches"], second["batches_run"], second["overhead"]) == ("10", "1", "")
        measured = [row for row in rows(folder / "rounds.csv") if row["task"] == "whole"]
        overheads = [float(row["callback"]) / float(row["plain"]) - 1 for row in measured]
        assert float(first["overhead"]) == pytest.approx(np.median(overheads), abs=1e-4)
        for row in (first, second):
            assert float(row["pass_share"]) == pytest.approx(float(row["pass"]) / float(row["epoch"]), rel=1e-4)

    @pytest.mark.filterwarnings("ignore")
    def test_each_epoch_but_the_first_is_timed_with_its_pass(self, tmp_path: Path) -> None:
        cfg = settings(*TINY_UNET, f"paths.data_dir={tmp_path}")
        task = epoch.Task(cfg, lambda: epoch.build(cfg, "data"), epochs=3)
        plain, balanced = (epoch.train(task, arm, "cpu") for arm in (False, True))
        for training in (plain, balanced):
            assert len(training.epochs) == len(training.passes) == 2
            assert all(0 <= own < whole for own, whole in zip(training.passes, training.epochs, strict=True))
        assert min(balanced.passes) > max(plain.passes)


class TestScaling:
    @pytest.mark.slow
    def test_runs(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scaling, "GRIDS", (2, 3))
        monkeypatch.setattr(scaling, "STACKS", (4, 16))
        small = ("--width", "32", "--times", "1")
        folder, printed = run(scaling, "--threads", "2", "--processes", "1", "2", *small)
        assert_page(folder, printed, "scaling.png")
        assert [row["windows"] for row in rows(folder / "windows.csv")] == ["4", "9", "4", "16"]
        assert [row["threads"] for row in rows(folder / "threads.csv")] == ["1", "2"]
        one, *two = (float(row["seconds"]) for row in rows(folder / "processes.csv"))
        assert max(two) < 0.9 * one

    @pytest.mark.parametrize("make", [scaling.grid, scaling.stack])
    def test_windows_are_as_many_as_are_said(self, make: Callable[..., tuple[int, Callable[[], object]]]) -> None:
        for number in (2, 5):
            count, work = make(number, "cpu")
            (record,) = work().layers.values()  # type: ignore[attr-defined]
            assert record.num_eigenvalues == count * (100 if make is scaling.grid else 64)

    def test_slope(self) -> None:
        found = [{"series": "a", "windows": n, "seconds": 3e-3 * n**1.5} for n in (10, 100, 700)]
        assert scaling.slope([*found, {"series": "b", "windows": 5, "seconds": 1.0}], "a") == pytest.approx(1.5)


class TestAccuracy:
    def test_runs(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accuracy, "NETWORKS", {"tiny": lambda epochs: iter([tiny()])})
        folder, printed = run(accuracy, "--networks", "tiny")
        assert_page(folder, printed, "accuracy.png")
        found = rows(folder / "accuracy.csv")
        assert {row["weights"] for row in found} == {"initial", *accuracy.CHANGES}
        # Three layers of at least five eigenvalues; three fits; windows and whole matrices.
        assert len([row for row in found if row["weights"] == "initial"]) == 4 * 3 * 2
        assert max(float(row["error"]) for row in found) <= accuracy.AIM

    @pytest.mark.parametrize("shift", [3e-4, None])
    def test_an_error_is_seen(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shift: float | None
    ) -> None:
        class Wrong:
            def __init__(self, alphas: dict[str, float | None]) -> None:
                self.layers: dict[str, object] = {}
                first = next(iter(alphas))
                self.alphas = alphas | {first: None if shift is None else (alphas[first] or 0) * (1 + shift)}

        monkeypatch.setattr(accuracy, "NETWORKS", {"tiny": lambda epochs: iter([tiny()])})
        monkeypatch.setattr(accuracy, "CHANGES", {})
        monkeypatch.setattr(accuracy, "analyze", lambda *args, **options: Wrong(analyze(*args, **options).alphas))
        with pytest.raises(SystemExit, match="above 1e-04"):
            run(accuracy, "--networks", "tiny")
        assert max(float(row["error"]) for row in rows(tmp_path / "accuracy.csv")) == pytest.approx(
            shift or math.inf, rel=1e-3
        )

    def test_weights_are_what_they_are_called(self) -> None:
        weight = torch.randn(9, 40, 24)
        assert accuracy.rounded(weight).dtype == torch.bfloat16
        assert (accuracy.pruned(0.9)(weight) == 0).float().mean() == pytest.approx(0.9, abs=1e-3)
        assert torch.linalg.matrix_rank(accuracy.low_rank(weight.double())).tolist() == [6] * 9
        singular = torch.linalg.svdvals(accuracy.ill_conditioned(8)(weight))
        assert (singular[:, 0] / singular[:, -1]).tolist() == pytest.approx([1e8] * 9, rel=1e-3)

    def test_each_matrix_is_changed_in_its_place(self) -> None:
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5))
        seen: list[tuple[int, ...]] = []

        def change(matrices: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(matrices.shape))
            return matrices * torch.arange(1, len(matrices) + 1).view(-1, 1, 1)

        after = accuracy.changed(net, change)
        assert seen == [(9, 3, 2), (1, 5, 4)]
        torch.testing.assert_close(after[0].weight, net[0].weight * torch.arange(1, 10).view(3, 3))  # type: ignore[index]
        torch.testing.assert_close(after[1].weight, net[1].weight)  # type: ignore[index]

    @pytest.mark.parametrize("fit", ["median", "goodness-of-fit", "xmin_peak"])
    def test_reference_is_that_of_the_test_suite(self, fit: str) -> None:
        values = sorted(np.random.default_rng(0).pareto(2, 60) + 0.1)
        assert plain_alphas(values, fit) == pytest.approx([spectrum.fit(values, fit)[0]])  # type: ignore[arg-type]

    def test_reference_of_samples_without_a_fit(self) -> None:
        for fit in ("median", "goodness-of-fit", "xmin_peak"):
            assert plain_alphas([0.0] * 6, fit) == plain_alphas([2.0] * 6, fit) == []  # type: ignore[arg-type]

    def test_tail_fit_of_a_law(self) -> None:
        tail = (1 - (np.arange(20_000) + 0.5) / 20_000) ** (-1 / 1.7)
        alpha, distance = tail_fit(tail)
        assert alpha == pytest.approx(2.7, rel=1e-3)
        assert distance < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_step_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CASES", {"tiny": (tiny, (3,))})
    folder, printed = run(step, "--networks", "tiny", "--ratios", "2", "--times", "2", "--limit", "0.5")
    assert_page(folder, printed, "step.png")
    assert {row["optimizer"] for row in rows(folder / "step.csv")} == {"SGD", "Adam", "AdamW"}


@pytest.mark.filterwarnings("ignore")
def test_step_with_options_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([tiny() for _ in range(3)])})

    monkeypatch.setattr(step, "CASES", {"ResNet-18": (blocks, (20,))})
    folder, _ = run(step, "--networks", "ResNet-18", "--ratios", "2", "--times", "2", "--limit", "0.5")
    assert {row["option"] for row in rows(folder / "options.csv")} == set(step.OPTIONS)


class TestTiming:
    def test_ways_take_turns_and_the_first_round_warms_up(self) -> None:
        called: list[str] = []
        clock = iter(range(100))

        def seconds(way: Callable[[], object]) -> float:
            way()
            return float(next(clock))

        ways = [lambda: called.append("a"), lambda: called.append("b")]
        assert timing.rounds(ways, 2, seconds) == [[2.0, 4.0], [3.0, 5.0]]
        assert called == ["a", "b"] * 3

    def test_beyond_the_limit_no_round_begins(self) -> None:
        assert timing.rounds([lambda: None], 5, lambda way: 7.0, limit=0.0) == [[7.0]]

    def test_clocks(self) -> None:
        busy = lambda: sum(range(300_000))  # noqa: E731
        assert 0 < timing.processor_seconds(busy) < 5
        assert 0 < timing.wall_seconds(busy) < 5


class TestResults:
    def test_page_keeps_its_words(self, tmp_path: Path) -> None:
        page = tmp_path / "README.md"
        page.write_text(f"# Title\n\nbefore\n\n{results.BEGIN}\nold\n{results.END}\n\nafter\n", encoding="utf-8")
        results.publish(tmp_path, "new\n")
        results.publish(tmp_path, "newest\n")
        text = page.read_text(encoding="utf-8")
        assert text == f"# Title\n\nbefore\n\n{results.BEGIN}\n\nnewest\n\n{results.END}\n\nafter\n"
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]

    def test_page_without_a_place_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("# Title\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"README\.md has no place for the tables"):
            results.publish(tmp_path, "new")
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Title\n"

    def test_table(self) -> None:
        table = results.markdown_table([{"name": "a", "ms": "1.5"}, {"name": "b", "ms": ""}])
        assert table.splitlines() == ["| name | ms |", "| --- | --: |", "| a | 1.5 |", "| b |  |"]
        assert results.markdown_table([]) == ""

    def test_csv_of_rows_that_differ(self, tmp_path: Path) -> None:
        results.write_csv(tmp_path / "a.csv", [{"x": 1, "y": 1 / 3}, {"x": 2, "z": "w"}])
        assert rows(tmp_path / "a.csv") == [{"x": "1", "y": "0.333333", "z": ""}, {"x": "2", "y": "", "z": "w"}]


@pytest.mark.parametrize(("python", "code"), [("true", 0), ("false", 1)])
def test_the_script_for_a_gpu_notes_how_each_part_ended(python: str, code: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
    environment = {**os.environ, "PYTHON": python}
    done = subprocess.run(["bash", str(script), str(tmp_path)], env=environment, check=False, capture_output=True)
    assert done.returncode == code
    parts = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in parts][:6] == ["machine", "tests", "pass", "epoch", "step", "accuracy"]
    assert all(f"exit {code}" in line for line in parts)
