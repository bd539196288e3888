"""Draw subsets by a seed, with the classes in the proportions of the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recipes.errors import RecipeError

__all__ = ["Draw", "draw_apart", "draw_stratified", "read_fraction"]

Draw = Literal["stratified", "first"]


def read_fraction(fraction: float | str) -> float:
    """Return a fraction of the training examples as a number; text such as "1/20" is understood.

    Raises:
        RecipeError: it is no number above 0 and at most 1.
    """
    number = fraction
    if isinstance(fraction, str):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            number = float(Fraction(fraction))
    if not isinstance(number, int | float) or not 0 < number <= 1:
        raise RecipeError(
            f"data.fraction must be above 0 and at most 1, a number such as 0.05 or 1/20, got {fraction}"
        )
    return number


def draw_apart(strata: Sequence[int], fraction: float, held_out: int, seed: int, draw: Draw) -> list[list[int]]:
    """Draw training examples, and others to choose the best epoch on.

    Args:
        strata: the class of each example; all equal where there are no classes.
        fraction: fraction of the examples to train on; at least one example.
        held_out: how many of the others to hold out.
        seed: decides which.
        draw: `"stratified"` by the seed, or the `"first"` examples of the file, as the authors of Model Balancing
            do, whatever the seed. Held out are examples drawn by the seed in either case.

    Returns:
        The indices of the training examples, and of those held out, each sorted.

    Raises:
        RecipeError: the fraction is not in (0, 1], or too few examples are left over.
    """
    read_fraction(fraction)
    if draw not in get_args(Draw):
        raise RecipeError(f"data.draw must be one of {', '.join(get_args(Draw))}, got {draw}")
    number = max(1, round(fraction * len(strata)))
    left = len(strata) - number
    if held_out > left:
        raise RecipeError(
            f"data.fraction={fraction} leaves {left} of {len(strata)} training examples to hold out, "
            f"data.val_size={held_out} asks for more; choose smaller ones"
        )
    chosen = list(range(number)) if draw == "first" else draw_stratified(strata, number, seed)
    taken = set(chosen)
    others = [index for index in range(len(strata)) if index not in taken]
    held = draw_stratified([strata[index] for index in others], held_out, seed)
    return [chosen, [others[index] for index in held]]


def draw_stratified(strata: Sequence[int], number: int, seed: int) -> list[int]:
    """Draw so many examples without replacement, each class in its proportion.

    A class gets its share rounded down; the largest remainders get the examples that are left.

    Args:
        strata: the class of each example.
        number: how many to draw, at most all.
        seed: decides which.

    Returns:
        Their indices, sorted.
    """
    generator = np.random.default_rng(seed)
    _, classes, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    order = generator.permutation(len(classes))
    chosen: list[NDArray[np.intp]] = []
    for index, quota in enumerate(_quotas(counts, number, generator)):
        chosen.append(order[classes[order] == index][:quota])
    return sorted(np.concatenate(chosen).tolist()) if chosen else []


def _quotas(counts: NDArray[np.intp], number: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """Return how many examples each class gets; ties between remainders are decided by the generator."""
    shares: NDArray[np.float64] = number * counts / max(1, counts.sum())
    quotas: NDArray[np.intp] = np.floor(shares).astype(np.intp)
    ties = generator.random(len(counts))
    largest_first = np.lexsort((ties, quotas - shares))
    quotas[largest_first[: number - quotas.sum()]] += 1
    return quotas
