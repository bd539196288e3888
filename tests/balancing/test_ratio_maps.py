"""The maps from alphas to ratios: against the reference implementation, and where there is little to map."""

import math
import sys
from typing import get_args

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from farms_tb import lr_ratios
from farms_tb.options import MAPS, AssignFunc
from tests.reference import ratios as reference
from tests.reference.compare import assert_same_figures

PAPERS = ["tb_linear_map", "tb_sqrt", "tb_log2", "tb_step", "tb_sigmoid"]
"""The maps of the papers, which the reference implementation has."""
ORDERED = [name for name, traits in MAPS.items() if traits.takes != "nothing"]
BOUNDED = [name for name, traits in MAPS.items() if traits.bounded] + ["tb_sigmoid"]


def named(values):
    return {f"layer{i}": value for i, value in enumerate(values)}


def mapped(values, name, **options):
    """The ratios of a map, with a standard error for each value where the map takes them."""
    errors = dict.fromkeys(named(values), 0.1) if MAPS[name].takes == "effect" else None
    return lr_ratios(named(values), name, errors=errors, **options)


def test_each_map_has_its_traits():
    assert tuple(MAPS) == get_args(AssignFunc)


def assert_ratios(found, expected, rtol=1e-9):
    assert_same_figures(*({k: {"ratio": v} for k, v in ratios.items()} for ratios in (found, expected)), rtol=rtol)


@pytest.mark.parametrize("name", PAPERS)
@given(alphas=st.lists(st.floats(1.001, 20), min_size=2, max_size=12))
def test_match_the_reference(name, alphas):
    assume(min(alphas) < max(alphas))
    assert_ratios(lr_ratios(named(alphas), name), named(getattr(reference, name)(alphas)))


@given(alphas=st.lists(st.sampled_from([1.5, 2.0, 3.0]), min_size=2, max_size=12))
@pytest.mark.parametrize("name", PAPERS)
def test_ties_match_the_reference(name, alphas):
    assume(min(alphas) < max(alphas))
    assert_ratios(lr_ratios(named(alphas), name), named(getattr(reference, name)(alphas)))


@given(low=st.floats(0, 2), width=st.floats(0.01, 3), alphas=st.lists(st.floats(1.1, 9), min_size=2, max_size=8))
def test_bounds_match_the_reference(low, width, alphas):
    assume(min(alphas) < max(alphas))
    bounds = {"lr_min_ratio": low, "lr_max_ratio": low + width}
    for name in ("tb_linear_map", "tb_step"):
        expected = getattr(reference, name)(alphas, low, low + width)
        assert_ratios(lr_ratios(named(alphas), name, **bounds), named(expected))


def test_sigmoid_options_match_the_reference():
    alphas = [1.7, 2.0, 2.1, 3.5]
    found = lr_ratios(named(alphas), "tb_sigmoid", sigmoid_min=0.3, sigmoid_max=1.2, sigmoid_tau=4.0)
    assert_ratios(found, named(reference.tb_sigmoid(alphas, 0.3, 1.2, 4.0)))


def test_by_hand():
    alphas = {"a": 2.0, "b": 3.0, "c": 4.0}
    assert lr_ratios(alphas) == {"a": 0.5, "b": 1.0, "c": 1.5}
    assert lr_ratios(alphas, "tb_step") == pytest.approx({"a": 0.5, "b": 0.5 + 1 / 3, "c": 0.5 + 2 / 3})
    assert lr_ratios(alphas, "tb_sigmoid")["b"] == 1.0
    assert sum(lr_ratios(alphas, "tb_sqrt").values()) == pytest.approx(3)
    assert lr_ratios({"a": 2.0, "b": 8.0}, "tb_log2") == pytest.approx({"a": 0.5, "b": 1.5})


@pytest.mark.parametrize("name", ORDERED)
def test_a_small_alpha_may_be_favoured_instead(name):
    alphas = [2.0, 2.1, 2.7, 4.5]
    turned = list(mapped(alphas, name, favor="small_alpha").values())
    assert turned == sorted(set(turned), reverse=True)
    mirrored = [6.5 - alpha for alpha in alphas]
    assert turned == pytest.approx(list(mapped(mirrored, name).values()))


@pytest.mark.parametrize("name", ["depth", "constant"])
def test_static_maps_favour_no_alpha(name):
    for values in ([2.0, 3.0, 4.0], [3.0, 3.0, 3.0]):
        assert mapped(values, name, favor="small_alpha") == mapped(values, name) != named([1.0] * 3)


def test_favor_by_hand():
    alphas = {"a": 2.0, "b": 3.0, "c": 3.5, "d": None}
    assert lr_ratios(alphas, favor="small_alpha") == pytest.approx({"a": 1.5, "b": 5 / 6, "c": 0.5, "d": 1.0})


@pytest.mark.parametrize("name", PAPERS)
def test_layers_without_an_alpha_keep_ratio_one_and_take_no_part(name):
    alphas = {"none": None, "a": 2.0, "nan": math.nan, "b": 3.0, "c": 2.5}
    found = lr_ratios(alphas, name)
    assert list(found) == list(alphas)
    assert found["none"] == found["nan"] == 1.0
    without = lr_ratios({key: alphas[key] for key in "abc"}, name)
    assert {key: found[key] for key in "abc"} == without


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    "alphas",
    [
        pytest.param([], id="no layer"),
        pytest.param([None, None], id="no alpha"),
        pytest.param([2.3], id="one layer"),
        pytest.param([None, 2.3, math.nan], id="one alpha"),
        pytest.param([2.3] * 5, id="all equal"),
        pytest.param([0.5] * 2, id="all equal, outside what tb_log2 maps"),
    ],
)
def test_nothing_to_balance_is_ratio_one(name, alphas):
    assert lr_ratios(named(alphas), name) == named([1.0] * len(alphas))


@pytest.mark.parametrize("favor", ["large_alpha", "small_alpha"])
@pytest.mark.parametrize("name", BOUNDED)
@given(alphas=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
@example(alphas=[sys.float_info.max, -1.0737804415345453e304])  # reflected, it is rounded beyond the largest float
@example(alphas=[0.0, 0.0, 1.3407807929942598e153, 1.3407807929942598e153])  # over squared errors
def test_any_finite_value_stays_inside_the_bounds(name, favor, alphas):
    low, high = (10**-0.25, 10**0.25) if name == "tb_sigmoid" else (0.5, 1.5)
    for ratio in mapped(alphas, name, favor=favor).values():
        assert low - 1e-12 <= ratio <= high + 1e-12


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(
    "values",
    [
        (-sys.float_info.max, sys.float_info.max),
        (0.0, 5e-324),
        (1.0, 1.0 + sys.float_info.epsilon),
        (1e-300, 1e300),
    ],
)
def test_extreme_values(name, values):
    smallest, largest = mapped(values, name).values()
    assert smallest <= largest
    assert all(map(math.isfinite, (smallest, largest)))


@pytest.mark.parametrize("name", PAPERS)
@given(alphas=st.lists(st.floats(1.001, 1e4), min_size=2, max_size=8))
def test_a_larger_alpha_never_gets_a_smaller_ratio(name, alphas):
    found = lr_ratios(named(sorted(alphas)), name)
    ratios = list(found.values())
    assert ratios == pytest.approx(sorted(ratios), rel=1e-12)


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_infinite_alpha(infinite):
    with pytest.raises(ValueError, match="alpha of 'layer1' is infinite; pass None for a layer without"):
        lr_ratios(named([2.0, infinite]))


@pytest.mark.parametrize(
    ("name", "bad", "bound"), [("tb_sqrt", -0.5, 0), ("tb_sqrt", 0.0, 0), ("tb_log2", 1.0, 1), ("tb_log2", 0.3, 1)]
)
def test_alphas_that_a_map_is_not_defined_for(name, bad, bound):
    with pytest.raises(ValueError, match=f"{name} needs alphas above {bound}, got {bad!r} for 'layer1'"):
        lr_ratios(named([2.0, bad]), name)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"assign_func must be one of 'tb_linear_map', .*, got 'tb_linear'"):
        lr_ratios({}, "tb_linear")
    with pytest.raises(ValueError, match=r"lr_min_ratio must not exceed lr_max_ratio, got lr_min_ratio=2\.0"):
        lr_ratios({}, lr_min_ratio=2.0)


def test_a_sigmoid_too_strong_for_a_float_is_refused():
    with pytest.raises(ValueError, match="sigmoid_max must be at most 100, got 1000"):
        lr_ratios({}, "tb_sigmoid", sigmoid_max=1000)
