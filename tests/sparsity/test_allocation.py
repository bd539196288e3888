"""Allocation: the reference implementation's results, exact totals for any input, and what is refused or said."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import farms_tb
from farms_tb.sparsity import SparsityOptions, SparsityPlan, allocate, compare_with_depth
from tests.reference import sparsity as reference

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "reference_pruning.json").read_text())
ALLOCATIONS = {case["name"]: case for case in REFERENCE["allocations"]}
MEASURED = [name for name, case in ALLOCATIONS.items() if case["alphas_from"] == "measured"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(epsilon|held at|straight line|took no part|no layer has|without an alpha)"
)


def names_of(case: dict[str, Any]) -> list[str]:
    inside = case["names_in_block"]
    return [f"model.layers.{i // len(inside)}.{inside[i % len(inside)]}" for i in range(len(case["sizes"]))]


def allocated(case: dict[str, Any], alphas: dict[str, float], compat: str | None = None) -> SparsityPlan:
    names = names_of(case)
    return allocate(
        alphas,
        dict(zip(names, case["sizes"], strict=True)),
        case["target"],
        blocks={name: ".".join(name.split(".")[:3]) for name in names},
        epsilon=case["epsilon"],
        granularity=case["granularity"],
        compat=compat,
    )


def given_alphas(case: dict[str, Any]) -> dict[str, float]:
    return dict(zip(names_of(case), case["alphas"], strict=True))


@pytest.mark.filterwarnings("ignore:.*(compat|above 1)")
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_research_code_is_reproduced(name: str) -> None:
    case = ALLOCATIONS[name]
    plan = allocated(case, given_alphas(case), compat=case["source"].lower())
    ratios = [case["target"] if ratio is None else ratio for ratio in case["ratios"]]  # None: NaN by 0 / 0.
    assert list(plan.sparsity.values()) == pytest.approx(ratios, abs=1e-6)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_without_active_bounds_the_default_is_the_reference(name: str) -> None:
    case = ALLOCATIONS[name]
    plan = allocated(case, given_alphas(case))
    assert plan.total == pytest.approx(case["target"], abs=1e-12)
    ratios = [case["target"] if ratio is None else ratio for ratio in case["ratios"]]
    bound = case["clipped"] or max(ratios) > 0.99
    if not bound:
        assert list(plan.sparsity.values()) == pytest.approx(ratios, abs=1e-6)
    else:
        assert max(plan.sparsity.values()) == 0.99


def made_weights(case: dict[str, Any]) -> nn.Module:
    """The weights of a measured case, by the recipe that the reference data describe."""
    model = nn.Module()
    per_block = len(case["names_in_block"])
    for index, name in enumerate(names_of(case)):
        sides = case["blocks"][index // per_block]
        spec = case["weights"]["blocks"][index // per_block]
        kind = name.rpartition(".")[2]
        out, into = sides["hidden"], sides["hidden"]
        out = sides["kv"] if kind in ("k_proj", "v_proj") else out
        out = sides["intermediate"] if kind in ("gate_proj", "up_proj") else out
        into = sides["intermediate"] if kind == "down_proj" else into
        decay = spec["decay"][index % per_block] if isinstance(spec["decay"], list) else spec["decay"]
        generator = np.random.default_rng(case["weights"]["seed"] + index)
        shape = (out, into)
        drawn = generator.standard_normal(shape)
        if spec["df"]:
            generator = np.random.default_rng(case["weights"]["seed"] + index)
            drawn = generator.standard_t(spec["df"], size=shape)
        weight = drawn * np.arange(1, into + 1) ** -float(decay) / math.sqrt(into)
        layer = nn.Linear(into, out, bias=False)
        layer.weight.data = torch.from_numpy(weight.astype(np.float32))
        model.add_module(name.replace(".", "/"), layer)
    return model


def spectrum_of(case: dict[str, Any]) -> dict[str, Any]:
    fit = "median" if case["metric"] == "alpha_mid" else "xmin_peak"
    if case["farms"] is None:
        return {"esd": "full", "fit": fit}
    settings = case["farms"]
    return {
        "esd": "farms",
        "fit": fit,
        "window": settings["window"],
        "aspect_ratio": settings["Q"],
        "windows_per_dim": settings["ops"],
    }


@pytest.mark.filterwarnings("ignore:.*above 1")
@pytest.mark.parametrize("name", [n for n in MEASURED if (ALLOCATIONS[n]["farms"] or {"Q": 1})["Q"] == 1])
def test_measured_alphas_give_the_reference(name: str) -> None:
    case = ALLOCATIONS[name]
    report = farms_tb.analyze(made_weights(case), **spectrum_of(case))
    alphas = {layer.replace("/", "."): alpha for layer, alpha in report.alphas.items()}
    plan = allocated(case, alphas, compat=case["source"].lower())
    assert list(plan.sparsity.values()) == pytest.approx(case["ratios"], abs=1e-4)


NAMES = st.integers(1, 12)
ALPHAS = st.one_of(st.none(), st.just(math.nan), st.floats(-1e308, 1e308), st.floats(1, 10))


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Any alphas, sizes, blocks, target and bounds that allow it."""
    number = draw(NAMES)
    names = [f"layers.{draw(st.integers(0, 3))}.{i}x" for i in range(number)]
    low, target, high = sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)))
    method = draw(st.sampled_from(["alpha", "uniform", "depth", "shuffled", "shrinkage", "owl"]))
    granularities = ["block", "matrix", "mixed"] if method == "alpha" else ["block", "matrix"]
    return {
        "alphas": {name: draw(ALPHAS) for name in names},
        "sizes": {name: draw(st.integers(1, 10**9)) for name in names},
        "target": target,
        "blocks": {name: name.rpartition(".")[0] for name in names},
        "errors": {name: draw(st.one_of(st.none(), st.floats(0, 1e300))) for name in names},
        "outliers": dict.fromkeys([*names, *(f"layers.{i}" for i in range(4))], draw(st.floats(0, 100))),
        "method": method,
        "granularity": draw(st.sampled_from(granularities)),
        "epsilon": draw(st.floats(0, 1)),
        "min_sparsity": low,
        "max_sparsity": high,
        "seed": draw(st.integers(0, 9)),
    }


@given(problem=problems())
def test_the_total_is_the_target_for_anything(problem: dict[str, Any]) -> None:
    plan = allocate(**problem)
    assert plan.total == pytest.approx(problem["target"], abs=1e-12)
    assert list(plan.layers) != []
    for layer in plan.layers.values():
        assert problem["min_sparsity"] <= layer.sparsity <= problem["max_sparsity"]
    assert plan.sparsity == allocate(**problem).sparsity


@given(
    alphas=st.lists(st.floats(2, 4), min_size=2, max_size=12),
    target=st.floats(0.05, 0.95),
    epsilon=st.floats(0, 1),
)
def test_a_larger_alpha_is_never_pruned_less(alphas: list[float], target: float, epsilon: float) -> None:
    named = {f"l{i}": alpha for i, alpha in enumerate(alphas)}
    sizes = {name: 100 + 37 * i for i, name in enumerate(named)}
    plan = allocate(named, sizes, target, granularity="matrix", epsilon=epsilon)
    shares = [plan.sparsity[name] for name in sorted(named, key=lambda name: named[name])]
    left_out = any("took no part" in note for note in plan.notes)
    assert left_out or all(b >= a - 1e-12 for a, b in pairwise(shares))


@given(
    ratios=st.lists(st.floats(1, 9), min_size=2, max_size=9),
    target=st.floats(0.1, 0.9),
    epsilon=st.floats(0.05, 0.99),
)
def test_bounds_match_the_slow_reference(ratios: list[float], target: float, epsilon: float) -> None:
    """Water-filling, against bisection on the scale factor."""
    sizes = [10 + 7 * i for i in range(len(ratios))]
    names = [f"l{i}" for i in range(len(ratios))]
    plan = allocate(
        dict(zip(names, ratios, strict=True)),
        dict(zip(names, sizes, strict=True)),
        target,
        granularity="matrix",
        epsilon=epsilon,
        min_sparsity=0.08,
        max_sparsity=0.92,
        outliers=None,
    )
    if any("took no part" in note for note in plan.notes):
        return
    wanted = reference.filled(reference.line(1 - epsilon, 1 + epsilon, ratios), sizes, target, low=0.08, high=0.92)
    # With a ratio of nearly 0, the two solve an ill-conditioned problem.
    assert list(plan.sparsity.values()) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_ratio_zero_gives_what_the_others_cannot() -> None:
    """Its ratio is 1 - epsilon = 0, and 0.75 of 27 entries are more than 0.92 of the other layer's 17."""
    plan = allocate(
        {"a": 1.0, "b": 2.0},
        {"a": 10, "b": 17},
        0.75,
        granularity="matrix",
        epsilon=1.0,
        min_sparsity=0.08,
        max_sparsity=0.92,
        outliers=None,
    )
    assert plan.sparsity == pytest.approx({"a": (0.75 * 27 - 0.92 * 17) / 10, "b": 0.92})


def test_blocks_match_the_steps_of_the_paper() -> None:
    alphas = [[2.0, 3.0], [4.0, 2.2, 3.1], [1.9]]
    sizes = [[100, 50], [70, 30, 20], [400]]
    named = {f"h.{b}.w{i}": a for b, block in enumerate(alphas) for i, a in enumerate(block)}
    entries = {f"h.{b}.w{i}": n for b, block in enumerate(sizes) for i, n in enumerate(block)}
    plan = allocate(named, entries, 0.5, epsilon=0.2, blocks=["h.*"])
    wanted = reference.block_sparsities(alphas, sizes, 0.5, 0.2)
    for block, share in enumerate(wanted):
        assert plan.sparsity[f"h.{block}.w0"] == pytest.approx(share, abs=1e-14)


def test_blocks_may_be_numbers() -> None:
    numbered: dict[str, Any] = {name: int(name.split(".")[1]) for name in BLOCKS}
    named = allocate(BLOCKS, SIZES, 0.7)
    for blocks in (numbered, lambda name: numbered[name]):
        plan = allocate(BLOCKS, SIZES, 0.7, blocks=blocks)
        assert plan.sparsity == named.sparsity
        assert list(plan.blocks) == ["0", "1", "2", "3", "4", "5"]


def test_the_order_of_the_layers_does_not_matter() -> None:
    alphas = {f"layers.{b}.{name}": 2 + b / 5 + len(name) / 7 for b in range(12) for name in ("q", "up", "down")}
    sizes = dict.fromkeys(alphas, 64)
    for method in ("alpha", "depth", "shrinkage", "shuffled"):
        plan = allocate(alphas, sizes, 0.7, method=method)
        other = allocate(dict(sorted(alphas.items())), dict(sorted(sizes.items())), 0.7, method=method)
        assert plan.sparsity == pytest.approx(other.sparsity, abs=1e-15)
        assert list(plan.blocks) == list(other.blocks) == [f"layers.{b}" for b in range(12)]


BLOCKS = {f"layers.{b}.{name}": 2.0 + b % 3 for b in range(6) for name in ("q", "up")}
SIZES = dict.fromkeys(BLOCKS, 100)


def test_depth_is_a_straight_line() -> None:
    plan = allocate({}, SIZES, 0.7, method="depth", epsilon=0.2)
    assert [plan.sparsity[f"layers.{b}.q"] for b in range(6)] == pytest.approx(np.linspace(0.56, 0.84, 6))
    found = compare_with_depth(plan)
    assert found.correlation == pytest.approx(1)
    assert found.from_line == pytest.approx(0, abs=1e-15)
    assert found.from_uniform == pytest.approx(0.084)


def test_shuffled_is_the_allocation_by_alpha_in_another_order() -> None:
    by_alpha = allocate(BLOCKS, SIZES, 0.7)
    shuffles = [allocate(BLOCKS, SIZES, 0.7, method="shuffled", seed=seed) for seed in (0, 1, 1)]
    for plan in shuffles:
        assert sorted(plan.sparsity.values()) == pytest.approx(sorted(by_alpha.sparsity.values()))
    assert shuffles[0].sparsity != shuffles[1].sparsity
    assert shuffles[1] == shuffles[2]


@pytest.mark.parametrize("case", REFERENCE["masks"]["model"]["owl"])
def test_owl_spreads_the_shares_of_outliers(case: dict[str, Any]) -> None:
    """With the outliers that the sparsities imply; blocks are of equal size, so their plain mean is the target."""
    wanted = case["sparsity_of_blocks"]
    outliers = {f"layers.{b}": 50 - 10 * share for b, share in enumerate(wanted)}
    sizes = {f"layers.{b}.{name}": 64 for b in range(3) for name in ("q", "up")}
    plan = allocate({}, sizes, case["target"], method="owl", outliers=outliers, owl_lambda=case["lamda"])
    assert [plan.sparsity[f"layers.{b}.up"] for b in range(3)] == pytest.approx(wanted, abs=1e-9)


def test_mixed_keeps_the_mean_of_each_block() -> None:
    alphas = {f"layers.{b}.{i}m": 2 + 0.2 * b + 0.3 * i for b in range(3) for i in range(4)}
    sizes = {name: 10 + i for i, name in enumerate(alphas)}
    mixed = allocate(alphas, sizes, 0.5, granularity="mixed", epsilon=0.1)
    plain = allocate(alphas, sizes, 0.5, granularity="block", epsilon=0.1)
    assert len(set(mixed.sparsity.values())) == 12
    for names in plain.blocks.values():
        weights = [sizes[name] for name in names]
        shares = [mixed.sparsity[name] for name in names]
        assert np.average(shares, weights=weights) == pytest.approx(plain.sparsity[names[0]], abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*above 1")
def test_a_wild_alpha_changes_nothing_for_the_other_blocks() -> None:
    """An alpha of 41 among ones of 2 to 4 takes no part; the reference squeezes all other blocks together."""
    rng = np.random.default_rng(0)
    alphas = {f"layers.{b}.{name}": float(rng.uniform(2, 4)) for b in range(30) for name in "qkvogud"}
    clean = allocate(alphas, dict.fromkeys(alphas, 100), 0.7, epsilon=0.3)
    hit = {**alphas, "layers.23.v": 41.0}
    with pytest.warns(UserWarning, match=r"took no part: layers\.23\.v \(41\)"):
        plan = allocate(hit, dict.fromkeys(hit, 100), 0.7, epsilon=0.3)
    assert plan.layers["layers.23.v"].alpha == 41.0
    moved = [abs(plan.sparsity[name] - clean.sparsity[name]) for name in alphas if ".23." not in name]
    assert max(moved) < 0.02
    squeezed = allocate(hit, dict.fromkeys(hit, 100), 0.7, epsilon=0.3, compat="alphapruning")
    assert squeezed.sparsity["layers.23.q"] > 1


@pytest.mark.parametrize("alphas", [{}, dict.fromkeys(BLOCKS, 2.5), dict.fromkeys(BLOCKS, math.nan)])
@pytest.mark.parametrize("method", ["alpha", "shrinkage", "shuffled"])
def test_without_differences_the_plan_is_uniform(alphas: dict[str, float], method: str) -> None:
    assert set(allocate(alphas, SIZES, 0.7, method=method).sparsity.values()) == {0.7}


def test_a_block_without_alphas_counts_as_the_mean_of_the_others() -> None:
    alphas = {"layers.0.q": 2.0, "layers.1.q": None, "layers.2.q": 4.0}
    with pytest.warns(UserWarning, match=r"without an alpha.*layers\.1"):
        plan = allocate(alphas, dict.fromkeys(alphas, 10), 0.5, epsilon=0.1)
    assert plan.sparsity["layers.1.q"] == pytest.approx(0.5)


def test_a_ratio_of_zero_gives_only_where_it_must() -> None:
    alphas = {"layers.0.q": 2.0, "layers.1.q": 3.0}
    plan = allocate(alphas, dict.fromkeys(alphas, 10), 0.8, epsilon=1.0, max_sparsity=0.9)
    assert plan.sparsity == pytest.approx({"layers.0.q": 0.7, "layers.1.q": 0.9})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5, "epsilon": 0.3}, "epsilon=0.3 is large"),
        ({"target": 0.9, "epsilon": 0.3}, "held at max_sparsity"),
        ({"target": 0.7, "epsilon": 0.3, "min_sparsity": 0.6}, "held at min_sparsity"),
    ],
)
def test_warnings_name_what_to_compare(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        plan = allocate(BLOCKS, SIZES, **options)
    assert any(message in note for note in plan.notes)


@pytest.mark.filterwarnings("error")
def test_a_plan_close_to_a_line_in_depth_says_so() -> None:
    rising = {f"layers.{b}.q": 2 + b / 10 for b in range(8)}
    with pytest.warns(UserWarning, match="straight line in depth"):
        allocate(rising, dict.fromkeys(rising, 10), 0.7)
    allocate(BLOCKS, SIZES, 0.7)
    allocate(rising, dict.fromkeys(rising, 10), 0.7, method="depth")


@pytest.mark.parametrize("model", ["LLaMA-7B, whole matrices", "LLaMA-7B, FARMS 2000x2000, 15x15 windows"])
def test_the_alphas_of_a_large_model_are_close_to_a_line(model: str) -> None:
    case = {**ALLOCATIONS[model], "epsilon": 0.3}
    found = compare_with_depth(allocated(case, given_alphas(case)))
    assert found.correlation == pytest.approx(0.86, abs=0.02)
    assert found.from_line < 0.07 < 0.1 < found.from_uniform


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": 1.5}, ValueError, "target"),
        ({"target": math.nan}, ValueError, "target"),
        ({"target": "0.5"}, TypeError, "target"),
        ({"target": 0.995}, ValueError, r"out of reach.*0\.0 to 0\.99"),
        ({"min_sparsity": 0.6, "target": 0.5}, ValueError, r"0\.6 to 0\.99"),
        ({"min_sparsity": 0.8, "max_sparsity": 0.7}, ValueError, "must not exceed"),
        ({"epsilon": 1.5}, ValueError, "epsilon"),
        ({"method": "alfa"}, ValueError, "method must be one of"),
        ({"methode": "alpha"}, TypeError, "did you mean 'method'"),
        ({"granularity": "layer"}, ValueError, "granularity"),
        ({"granularity": "mixed", "method": "depth"}, ValueError, "mixed"),
        ({"compat": "owl"}, ValueError, "compat"),
        ({"compat": "farms", "method": "depth"}, ValueError, "compat"),
        ({"compat": "farms", "granularity": "mixed"}, ValueError, "mixed"),
        ({"method": "owl"}, ValueError, "outliers"),
        ({"method": "owl", "outliers": {"layers.0": 1.0}}, ValueError, r"layers\.1"),
        ({"seed": -1}, ValueError, "seed"),
        ({"sizes": {}}, TypeError, "sizes"),
        ({"sizes": [1, 2]}, TypeError, "sizes"),
        ({"sizes": {"layers.0.q": 0, "layers.1.q": 1}}, ValueError, r"layers\.0\.q.*at least 1"),
        ({"sizes": {"layers.0.q": 2.5, "layers.1.q": 1}}, TypeError, "integer"),
        ({"sizes": {"a": 10, "b": 20}, "alphas": {}}, ValueError, "no blocks.*granularity='matrix'"),
        ({"blocks": ["nothing.*"]}, ValueError, "no blocks"),
        ({"blocks": {"other": "layers.0"}}, ValueError, "other"),
        ({"alphas": {"x": 2.0}}, ValueError, "no layer in common"),
        ({"alphas": {"layers.0.q": math.inf}}, ValueError, r"alphas\['layers\.0\.q'\]"),
        ({"alphas": {"layers.0.q": "2"}}, TypeError, "alphas"),
        ({"errors": {"layers.0.q": -0.1}}, ValueError, "errors"),
    ],
)
def test_mistakes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"alphas": BLOCKS, "sizes": SIZES, "target": 0.7, **changes}
    with pytest.raises(error, match=message):
        allocate(**arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    alphas = {"layers.0.up": np.float32(2.0), "layers.1.up": np.float32(3.0)}
    sizes = dict.fromkeys(alphas, np.int64(1000))
    plan = allocate(alphas, sizes, np.float32(0.5), epsilon=np.float32(0.25), seed=np.int64(3))
    assert plan == allocate(
        {"layers.0.up": 2.0, "layers.1.up": 3.0}, dict.fromkeys(alphas, 1000), 0.5, epsilon=0.25, seed=3
    )


def test_a_search_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon=0"):
        SparsityOptions(method="search", epsilon=0)
