"""What this is compared with: the research code's way and WeightWatcher for speed, plain SVDs for accuracy."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farms_tb.layers import find_layers, read_stacks
from farms_tb.options import Esd, Fit, SpectralOptions
from farms_tb.windows import layer_windows
from tests.reference.spectrum import eigenvalues, hill, peak_range
from tests.reference.windows import samples

TIE = 1e-6
"""Where the distances D of two tails differ by less, either may be the best: so it was agreed for all searches."""


@torch.no_grad()
def reference_pass(model: nn.Module, options: SpectralOptions) -> dict[str, float]:
    """Measure a model as the research code does: layer by layer, one `svdvals` for each window, in its precision.

    Returns:
        Alpha of each layer, by the median fit.
    """
    alphas = {}
    for layer in find_layers(model):
        if layer.problem:
            continue
        windows = layer_windows(read_stacks(layer.module)[layer.index], options)
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


def weightwatcher_pass() -> Callable[[nn.Module], Any] | None:
    """Return what analyses a model with WeightWatcher, by its defaults; None where that is not installed."""
    if find_spec("weightwatcher") is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)

    def analyze(model: nn.Module) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR).analyze()

    return analyze


def plain_spectra(module: nn.Module, esd: Esd) -> list[list[float]]:
    """Return the eigenvalues of each sample of a layer: one SVD in float64 for each window, in numpy.

    Args:
        module: a linear layer, a convolution or neuraloperator's spectral one, of one group.
        esd: `"farms"` or `"full"`, with the windows of the defaults.
    """
    weight = module.weight.to_tensor() if hasattr(module.weight, "to_tensor") else module.weight
    wide = torch.complex128 if weight.is_complex() else torch.float64
    # One matrix for each kernel position or Fourier mode.
    stack = weight.detach().cpu().to(wide).reshape(*weight.shape[:2], -1).permute(2, 0, 1).numpy()
    upright = [matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T for matrix in stack]
    sampling = "grid" if isinstance(module, nn.Linear) else "blocks"
    return [eigenvalues(sample) for sample in samples(upright, sampling, esd)]


def plain_alphas(values: list[float], fit: Fit) -> list[float]:
    """Return the alphas that are right for a sample: one, or more where tails tie; none where there is no fit."""
    if fit == "median":
        alpha = hill(values, len(values) // 2)
        return [] if alpha is None else [alpha]
    low, high = peak_range(values) if fit == "xmin_peak" else (-math.inf, math.inf)
    tails = [
        tail_fit(np.array(values[start:]))
        for start, value in enumerate(values[:-1])
        if value > 0 and low <= value <= high
    ]
    smallest = min((distance for _, distance in tails), default=1.0)
    return [alpha for alpha, distance in tails if distance <= smallest + TIE and distance < 1]


def tail_fit(tail: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Return alpha and D of one tail; D is 1 where alpha is not above 1."""
    rise = np.log(tail / tail[0])
    if rise.sum() <= 0:
        return math.nan, 1.0
    alpha = 1 + len(tail) / rise.sum()
    empirical = np.arange(len(tail)) / len(tail)
    return float(alpha), float(np.abs(1 - (tail / tail[0]) ** (1 - alpha) - empirical).max())
