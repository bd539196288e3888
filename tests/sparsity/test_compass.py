"""Compass search: finds minima, keeps its budget, is deterministic, and bears infinite values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farms_tb.sparsity.compass import Point, compass_search


@given(
    minimum=st.lists(st.floats(-1, 1), min_size=1, max_size=3), curvatures=st.lists(st.floats(0.5, 4), min_size=3)
)
def test_finds_the_minimum_of_a_bowl(minimum: list[float], curvatures: list[float]) -> None:
    def bowl(point: Point) -> float:
        return sum(c * (x - m) ** 2 for c, x, m in zip(curvatures, point, minimum, strict=False))

    found = compass_search(bowl, (0.0,) * len(minimum), 2000, 0.3, 1e-4)
    best = min(found, key=found.__getitem__)
    assert best == pytest.approx(minimum, abs=2e-4)


@pytest.mark.parametrize("evaluations", [1, 2, 5, 6, 7, 20])
def test_the_budget_is_kept_and_the_start_is_always_evaluated(evaluations: int) -> None:
    seen = []

    def counted(point: Point) -> float:
        seen.append(point)
        return sum((x - 5) ** 2 for x in point)

    found = compass_search(counted, (0.0, 0.0, 0.0), evaluations, 1.0, 1e-3)
    assert len(seen) == len(set(seen)) == len(found) == evaluations
    assert seen[0] == (0.0, 0.0, 0.0)


def test_infinite_values_are_avoided() -> None:
    found = compass_search(lambda x: math.inf if x[0] < 0.2 else (x[0] - 0.4) ** 2, (0.5,), 99, 0.4, 1e-3)
    assert min(found, key=found.__getitem__)[0] == pytest.approx(0.4, abs=2e-3)
    everywhere = compass_search(lambda x: math.inf, (0.0,), 99, 0.4, 0.1)
    assert next(iter(everywhere)) == (0.0,)
    assert len(everywhere) < 10
