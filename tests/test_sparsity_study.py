"""The study of sparsity: its arms are comparable, its comparisons paired, and it goes on where it stopped."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.rows import Row, Rows
from benchmarks.sparsity import __main__ as main
from benchmarks.sparsity import report
from benchmarks.sparsity.arms import ARMS, MEASUREMENTS, SEARCHES, SHUFFLES, TUNED, UNEVEN, alpha_rows, plan_of
from benchmarks.sparsity.reference import wanda
from benchmarks.sparsity.speed import save_blocks, speed_table
from benchmarks.sparsity.study import EPSILON_KEYS, EPSILONS, KEYS, Study, best_epsilon, runs
from benchmarks.sparsity.subjects import Embedding, Subject
from farms_tb import analyze, analyze_checkpoint
from farms_tb.sparsity import plan_from_report, prune
from farms_tb.sparsity.search import model_loss
from tests.sparsity.models import VOCABULARY, bert, llama, token_batches, uniform_plan

# Plans of a model that was not trained come with advice.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def subject() -> Subject:
    """A small language model that was not trained, and random tokens."""
    model = llama()
    tokens = torch.randint(VOCABULARY, (16 * 50,), generator=torch.Generator().manual_seed(0))
    segments = [{"input_ids": ids[None]} for ids in tokens[-5 * 16 :].view(5, 16)]
    return Subject(
        model, tokens[: -5 * 16], 16, lambda pruned: np.array([model_loss(pruned, s) for s in segments])
    )


def study(folder: Path) -> Study:
    layers, epsilons = Rows(folder / "alphas.csv", ("layer",)), Rows(folder / "epsilon.csv", EPSILON_KEYS)
    return Study(subject(), layers, epsilons, Rows(folder / "runs.csv", KEYS))


@pytest.fixture
def layers() -> list[Row]:
    model = llama()
    return alpha_rows({key: analyze(model, **options) for key, options in MEASUREMENTS.items()})


def test_every_arm_has_the_target_and_its_own_plan(layers: list[Row]) -> None:
    plans = {arm: plan_of(arm, layers, 0.6, 0.2) for arm in ARMS if arm not in SEARCHES}
    assert [plan.total for plan in plans.values()] == pytest.approx([0.6] * len(plans), abs=1e-12)
    different = [plans[arm].sparsity for arm in ("uniform", "line", "whole", "FARMS")]
    assert all(a != b for a, b in combinations(different, 2))
    assert all(len(set(plans[arm].sparsity.values())) == 3 for arm in ("FARMS", *SHUFFLES)), "one a block"
    assert all("embed" not in name and "head" not in name for name in plans["FARMS"].layers)


def test_a_model_is_dense_again_after_each_arm_and_no_run_is_repeated(tmp_path: Path) -> None:
    first = study(tmp_path)
    dense = {name: value.clone() for name, value in first.subject.model.state_dict().items()}
    first.measure_alphas()
    first.measure_dense()
    wanted: list[Row] = [
        {"method": "magnitude", "target": 0.4, "arm": "uniform", "seed": 0},
        {"method": "wanda", "target": 0.6, "arm": "FARMS", "seed": 1},
    ]
    for run in wanted:
        first.measure(run)
    assert all(torch.equal(value, dense[name]) for name, value in first.subject.model.state_dict().items())
    assert [row["sparsity"] for row in first.runs] == pytest.approx([0, 0.4, 0.6], abs=1e-3)
    assert first.runs[0]["loss"] != first.runs[1]["loss"] != first.runs[2]["loss"]
    again = study(tmp_path)
    assert list(again.runs.missing(wanted)) == []
    assert again.layers[0]["FARMS"] == pytest.approx(first.layers[0]["FARMS"], rel=1e-5)
    assert len(again.epsilons) == len(EPSILONS) * len(UNEVEN)
    assert again.runs[1]["epsilon"] == again.runs[2]["epsilon"] == best_epsilon(again.epsilons)


def test_an_arm_may_have_the_epsilon_that_is_best_for_it_alone(tmp_path: Path) -> None:
    rows: list[Row] = [
        {
            "target": 0.7,
            "epsilon": epsilon,
            "arm": arm,
            "loss": 1.0 + abs(epsilon - (0.3 if arm == "line" else 0.1)),
        }
        for epsilon in EPSILONS
        for arm in UNEVEN
    ]
    found = study(tmp_path)
    found.measure_alphas()
    found.epsilons.add(rows)
    for arm in ("line", *TUNED):
        found.measure({"method": "wanda", "target": 0.6, "arm": arm, "seed": 0})
    assert [row["epsilon"] for row in found.runs] == [0.1, 0.3, 0.1]
    common, own, _ = found.runs
    assert own["from uniform"] == pytest.approx(3 * float(common["from uniform"]), rel=0.01)


def test_a_search_is_a_run_like_others(tmp_path: Path) -> None:
    found = study(tmp_path)
    found.measure_alphas()
    for arm in ("uniform", "search"):
        found.measure({"method": "magnitude", "target": 0.7, "arm": arm, "seed": 0})
    uniform, searched = found.runs
    assert searched["evaluations"] > 1
    assert searched["sparsity"] == pytest.approx(uniform["sparsity"], abs=1e-3)
    is_uniform = all(searched[f"c {name}"] == 0 for name in ("line", "alpha", "shrinkage"))
    assert is_uniform == (searched["loss"] == uniform["loss"])


def test_texts_to_prune_choose_and_confirm_do_not_overlap() -> None:
    calibration = subject().calibration(0)
    parts = [calibration.prune, calibration.choose, calibration.confirm]
    seen = {tuple(batch["input_ids"].flatten().tolist()) for part in parts for batch in part}
    assert len(seen) == sum(map(len, parts)) == 24
    dealt = calibration.for_search
    assert dealt[1::4] == list(calibration.choose)
    assert dealt[3::4] == list(calibration.confirm)
    pruning = torch.cat([batch["input_ids"] for batch in dealt[0::2]], dim=1)
    assert torch.equal(pruning, torch.cat([batch["input_ids"] for batch in calibration.prune], dim=1))
    long = subject().calibration(0, sequences=2)
    assert long.confirm[-1]["input_ids"].shape == (2, 16)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(long.prune, calibration.prune, strict=True)
    )


def test_an_encoder_is_compared_with_itself_before() -> None:
    model = Embedding(bert()).eval()
    inputs = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    assert model_loss(model, {"input_ids": inputs}) == pytest.approx(0, abs=1e-6)
    plan = plan_from_report(analyze(model), 0.9, method="uniform")
    assert all(name.startswith("encoder.encoder.layer.") for name in plan.layers)
    prune(model, plan, "magnitude")
    assert model_loss(model, {"input_ids": inputs}) > 1e-4


def test_the_research_codes_way_prunes_the_same_entries() -> None:
    ours, theirs = llama(), llama()
    prune(ours, uniform_plan(ours, 0.5), "wanda", calibration=token_batches(3, sequences=1))
    wanda(theirs, list(theirs.model.layers), token_batches(3, sequences=1), 0.5)
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, ours.get_submodule(name).weight), name


def simulated(name: str) -> list[Row]:
    """Rows of all runs on eight articles, "FARMS" better than uniform by log 2 on average and not on each."""
    articles = np.linspace(2, 5, 8)
    rows: list[Row] = []
    for run in runs(name):
        gain = np.log(2) + 0.05 * np.cos(np.arange(8.0)) if run["arm"] == "FARMS" else 0.0
        losses = articles - gain
        of_segments = {f"segment {place}": loss for place, loss in enumerate(losses)}
        row: Row = {**run, "loss": float(losses.mean()), **of_segments}
        if run["arm"] in SEARCHES:
            row |= {"c line": 0.25, "c alpha": 0.0, "evaluations": 16}
        rows.append(row)
    return rows


def test_arms_are_compared_article_by_article() -> None:
    rows, score = simulated("language"), report.SCORES["language"]
    found = report.compared(rows, ("wanda", 0.7), score, ("FARMS alpha", "uniform"))
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(0.5, rel=0.02)
    assert 0.45 < low < value < high < 0.55, "the articles' own differences of 20 times do not count"
    assert report.compared(rows, ("wanda", 0.7), score, ("search", "uniform")) == (1.0, 1.0, 1.0)
    assert report.compared(rows[:5], ("wanda", 0.7), score, ("search", "uniform")) is None
    table = report.paired_table(rows, "wanda", score, "uniform")
    assert table.count("**") == 10, "FARMS alone is better, at five targets"


def test_the_page_is_made_from_the_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.SCORES:
        Rows(tmp_path / f"{name}.csv", KEYS).add(simulated(name))
        tried = [{"target": 0.7, "epsilon": epsilon, "arm": "line", "loss": epsilon} for epsilon in EPSILONS]
        Rows(tmp_path / f"{name}_epsilon.csv", EPSILON_KEYS).add(tried)
    monkeypatch.setattr(sys, "argv", ["sparsity", "--report", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    main.main()
    torch.set_num_threads(threads)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| search | Wanda | 0.7 | 1 | +0.250 | 0 |  | 16 |" in page
    assert "| 0.05 (chosen) |" in page
    for name in report.SCORES:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(("method", "searched"), [("magnitude", True), ("sparsegpt", False)])
def test_the_page_of_one_method_has_no_empty_sections(
    method: str, searched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = {"method": "none", "target": 0.0, "arm": "dense", "seed": 0, "loss": 2.0}
    rows = [row for row in simulated("language") if row["method"] == method]
    Rows(tmp_path / "language.csv", KEYS).add([dense, *rows])
    Rows(tmp_path / "encoder.csv", KEYS).add([dense])
    tried = [{"target": 0.7, "epsilon": epsilon, "arm": "line", "loss": epsilon} for epsilon in EPSILONS]
    Rows(tmp_path / "language_epsilon.csv", EPSILON_KEYS).add(tried)
    monkeypatch.setattr(sys, "argv", ["sparsity", "--report", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    main.main()
    torch.set_num_threads(threads)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"### {report.METHODS[method][0]}\n\nThe perplexity, by target:\n\n| arm |" in page
    assert "each calibration seed by itself" not in page
    assert ("### What the searches found" in page) == searched
    assert "MiniLM" not in page, "of the encoder there is the dense model alone"
    assert "\n\n\n" not in page


def test_a_folder_of_blocks_is_planned(tmp_path: Path) -> None:
    save_blocks(tmp_path, 3, {"self_attn.q_proj": (64, 64), "mlp.up_proj": (96, 64)})
    plan = plan_from_report(analyze_checkpoint(tmp_path), 0.5)
    assert list(plan.blocks) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    rows: list[Row] = [
        {"what": "a", "way": "one", "seconds": 3.0, "memory": float("nan")},
        {"what": "a", "way": "two", "seconds": 2.0, "memory": 100.0},
    ]
    assert "| a | one | 3.0 | 1.50 |  |" in speed_table(rows)
