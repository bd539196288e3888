"""Compass search: the minimum of a function of few numbers, without derivatives and within a budget.

From the best point so far, every coordinate is tried one step up and one step down; the best of these becomes the
next point, and where none is better the step is halved. It is deterministic and needs nothing of the function but
its values, which may be noisy or infinite.

Source: Kolda, Lewis & Torczon, SIAM Review 45 (2003) 385.
"""

from __future__ import annotations

from collections.abc import Callable

Point = tuple[float, ...]


def compass_search(
    function: Callable[[Point], float], start: Point, evaluations: int, step: float, smallest_step: float
) -> dict[Point, float]:
    """Search from a point; no point is evaluated twice.

    Args:
        function: what to minimise.
        start: the first point, which is evaluated in any case.
        evaluations: of the function at most.
        step: first step along each coordinate.
        smallest_step: the search ends below it.

    Returns:
        The value of each point that was evaluated, in order; the best one is the minimum that was found.

    Example:
        >>> found = compass_search(lambda x: (x[0] - 0.3) ** 2 + x[1] ** 2, (0.0, 0.0), 50, 0.2, 0.01)
        >>> best = min(found, key=found.get)
        >>> round(best[0], 2), round(best[1], 2)
        (0.3, 0.0)
    """
    values = {start: function(start)}
    best = start
    while step >= smallest_step:
        for point in _neighbours(best, step):
            if point in values:
                continue
            if len(values) >= evaluations:
                return values
            values[point] = function(point)
        nearest = min(_neighbours(best, step), key=values.__getitem__)
        if values[nearest] < values[best]:
            best = nearest
        else:
            step /= 2
    return values


def _neighbours(point: Point, step: float) -> list[Point]:
    """Return the points one step up and one step down along each coordinate."""
    found = []
    for signed in (step, -step):
        for index, value in enumerate(point):
            # Rounded, so that a way there and back leads to the same point.
            found.append((*point[:index], round(value + signed, 9), *point[index + 1 :]))
    return found
