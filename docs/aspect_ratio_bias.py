"""Draws `images/aspect_ratio_bias.png`: the bias that FARMS removes.

Random Gaussian matrices of one width and more and more rows have no structure, so a fair measure of structure
gives the same number for each. The alpha of the whole matrix does not: it follows from the Marchenko-Pastur law,
which depends on the aspect ratio. Measured in windows of one aspect ratio, as FARMS does, alpha is constant.

    python docs/aspect_ratio_bias.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from farms_tb import analyze
from farms_tb.viewing.densities import marchenko_pastur
from farms_tb.viewing.plots.style import FAINT, new_figure, save, styled

PICTURE = Path(__file__).parent / "images" / "aspect_ratio_bias.png"
ASPECT_RATIOS = (1, 2, 3, 4, 6, 8, 12, 16)
WIDTH = 256
SEEDS = 10


def random_alphas(aspect_ratio: int, seed: int) -> tuple[float, float]:
    """Return full-matrix and FARMS alpha of a random Gaussian layer with `WIDTH` inputs."""
    torch.manual_seed(seed)
    layer = nn.Linear(WIDTH, aspect_ratio * WIDTH)
    nn.init.normal_(layer.weight)
    full, farms = (analyze(layer, esd=esd).alphas.popitem()[1] for esd in ("full", "farms"))
    assert full is not None
    assert farms is not None
    return full, farms


def alpha_of_the_law(aspect_ratio: float) -> float:
    """Return 1 + 1 / mean(ln(lambda / median)) over the upper half of infinitely many eigenvalues."""
    law = marchenko_pastur(1.0, 1 / aspect_ratio)
    x = np.geomspace(law.x[0], law.x[-1], 20_001)
    weight = np.interp(x, *law) * np.gradient(x)
    share = weight.cumsum() / weight.sum()
    upper = share > 0.5
    return float(1 + 1 / np.average(np.log(x[upper] / x[upper][0]), weights=weight[upper]))


@styled
def draw() -> None:
    """Measure, and draw mean and standard deviation over the seeds."""
    alphas = np.array([[random_alphas(q, seed) for seed in range(SEEDS)] for q in ASPECT_RATIOS])
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    fine = np.geomspace(1, ASPECT_RATIOS[-1], 60)
    axes.plot(fine, [alpha_of_the_law(q) for q in fine], color=FAINT, linewidth=1.0, label="Marchenko-Pastur law")
    for index, (label, colour, marker) in enumerate((("whole matrix", "#D55E00", "s"), ("FARMS", "#3B528B", "o"))):
        mean, spread = alphas[..., index].mean(1), alphas[..., index].std(1, ddof=1)
        axes.errorbar(
            ASPECT_RATIOS, mean, spread, color=colour, marker=marker, linestyle="", capsize=3, label=label
        )
        print(label, *(f"{q}:1 {m:.2f}±{s:.3f}" for q, m, s in zip(ASPECT_RATIOS, mean, spread, strict=True)))
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_xlabel(f"aspect ratio, rows / {WIDTH} columns")
    axes.set_ylabel("power-law exponent alpha")
    axes.set_title(f"Random Gaussian matrices, mean ± sd over {SEEDS} seeds")
    axes.legend()
    save(figure, PICTURE)


if __name__ == "__main__":
    draw()
