"""What this is compared with: the research code's way and WeightWatcher for speed, plain SVDs for accuracy."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farms_tb.missing import missing_package
from farms_tb.options import Fit, SpectrumOptions
from farms_tb.spectra.windows import windows_of
from farms_tb.weights.layers import find_layers, read_stacks
from tests.reference.spectrum import hill, peak_range

TIE = 1e-9
"""Of two tails whose distances D differ by less, a search may choose either."""


@torch.no_grad()
def reference_pass(model: nn.Module, options: SpectrumOptions) -> dict[str, float]:
    """Measure a model as the research code does: layer by layer, one `svdvals` for each window, in its precision.

    Returns:
        Alpha of each layer, by the median fit.
    """
    alphas = {}
    for layer in find_layers(model):
        if layer.problem:
            continue
        windows = windows_of(read_stacks(layer.module)[layer.index], options)
        if windows is None:
            continue
        singular = [
            torch.linalg.svdvals(windows.view[index])
            for index in itertools.product(*map(range, windows.view.shape[:-2]))
        ]
        length = len(singular) // windows.samples
        pooled = [torch.cat(singular[i : i + length]) for i in range(0, len(singular), length)]
        alphas[layer.name] = sum(median_alpha(values) for values in pooled) / windows.samples
    return alphas


def median_alpha(singular: Tensor) -> float:
    """Return Hill's alpha of the upper half of the squares."""
    logs = singular.square().sort().values.log()
    tail = logs[len(logs) // 2 :]
    return 1 + len(tail) / float((tail - tail[0]).sum())


def import_weightwatcher() -> Any:
    """Return the package WeightWatcher; None where it, or what it needs, is not installed.

    Raises:
        ImportError: it is there, and fails.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import weightwatcher
    except ImportError as error:
        if not missing_package(error):
            raise
        return None
    return weightwatcher


def weightwatcher_pass() -> Callable[[nn.Module], Any] | None:
    """Return what analyses a model with WeightWatcher, by its defaults; None where that is not installed."""
    library = import_weightwatcher()
    if library is None:
        return None
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)

    def analyze(model: nn.Module) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return library.WeightWatcher(model=model, log_level=logging.ERROR).analyze()

    return analyze


def plain_alphas(values: list[float], fit: Fit) -> list[float]:
    """Return the alphas that are right for a sample, eigenvalue by eigenvalue and tail by tail.

    Args:
        values: ascending eigenvalues.
        fit: the fit, with the options of the defaults.

    Returns:
        One alpha, or more where tails or bins tie; none where there is no fit.
    """
    if values[-1] == 0:
        return []
    if fit == "median":
        alpha = hill(values, len(values) // 2)
        return [] if alpha is None else [alpha]
    tails = {value: tail_fit(np.array(values[start:])) for start, value in enumerate(values[:-1]) if value > 0}
    right: set[float] = set()
    for low, high in [(0.0, math.inf)] if fit == "goodness-of-fit" else peak_ranges(values):
        allowed = [tail for value, tail in tails.items() if low <= value <= high]
        smallest = min((distance for _, distance in allowed), default=1.0)
        right.update(alpha for alpha, distance in allowed if distance <= smallest + TIE and distance < 1)
    return sorted(right)


def peak_ranges(values: list[float]) -> set[tuple[float, float]]:
    """Return where xmin_peak may look.

    Where the smallest singular value is near the rounding of the largest, SVDs in double precision disagree on it,
    and so on the edges of the histogram's bins and on which bin is the fullest.
    """
    positive = [value for value in values if value > 0]
    smallest, rounding = math.sqrt(positive[0]), np.finfo(np.float64).eps * math.sqrt(positive[-1])
    if rounding < 1e-6 * smallest:
        return {peak_range(positive)}
    moved = np.abs(smallest + rounding * np.linspace(-1, 1, 41))
    return {peak_range([float(value) ** 2, *positive[1:]]) for value in moved}


def tail_fit(tail: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Return alpha and D of one tail; D is 1 where there is no alpha."""
    rise = np.log(tail / tail[0])
    if rise.sum() <= 0:
        return math.nan, 1.0
    alpha = 1 + len(tail) / rise.sum()
    empirical = np.arange(len(tail)) / len(tail)
    return float(alpha), float(np.abs(1 - (tail / tail[0]) ** (1 - alpha) - empirical).max())
