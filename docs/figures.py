"""Draws `images/*.png`, the plots of the pages on alphas and on the maths; takes a minute on one core.

    python docs/figures.py

All of them show what the package itself computes, for weights that are made here; `minilm.png` is drawn where
`make real` has brought the trained model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from farms_tb import Report, analyze, analyze_checkpoint, lr_ratios
from farms_tb.balancing.ratio_maps import noise_lambda
from farms_tb.options import AssignFunc
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.viewing.densities import esd_density, tail_density
from farms_tb.viewing.plots import plot_alpha_by_depth
from farms_tb.viewing.plots.style import FAINT, new_figure, styled
from recipes.real import minilm_folder, missing

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, PURPLE = "#3B528B", "#D55E00", "#2A9D6F", "#8E4FA8"
MAPS: tuple[AssignFunc, ...] = ("tb_linear_map", "tb_sqrt", "tb_log2", "tb_step", "tb_sigmoid")


def layer(rows: int, columns: int, decay: float, seed: int = 0) -> nn.Linear:
    """Return a layer of Gaussian weights whose inputs are mixed with strengths k^-decay; 0 is plain random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    strengths = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    made = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    made.weight.data = weight @ (basis * strengths) @ basis.T
    made.weight.data /= made.weight.square().mean().sqrt()
    return made


def store(figure: Figure, name: str) -> None:
    """Save a figure, at twice the size that a page shows it in."""
    figure.savefig(IMAGES / f"{name}.png", dpi=200, bbox_inches="tight")


@styled
def draw_spectra() -> None:
    """Spectra of a random layer and of layers with structure, and their fitted tails."""
    figure = new_figure(7.4, 2.7)
    for index, (decay, title) in enumerate(((0.0, "random"), (0.6, "some structure"), (1.0, "much"))):
        (record,) = analyze(layer(256, 256, decay), histogram=True).layers.values()
        assert record.histogram is not None
        edges, density = esd_density(record.histogram)
        tail = tail_density(record)
        assert tail is not None
        axes = figure.add_subplot(1, 3, index + 1)
        shown = (density > 0) & (edges[:-1] > edges[-1] * 1e-3)
        axes.loglog(np.sqrt(edges[1:] * edges[:-1])[shown], density[shown], ".", color=BLUE)
        axes.loglog(*tail, color=ORANGE, linewidth=2.0)
        axes.set_title(f"{title}: alpha {record.alpha:.2f}")
        axes.set_xlabel("eigenvalue")
        axes.set_xlim(edges[-1] * 1e-3, edges[-1] * 1.6)
        axes.set_ylim(density[shown].min() / 3, density[shown].max() * 3)
    figure.axes[0].set_ylabel("density")
    store(figure, "spectra")


@styled
def draw_null() -> None:
    """Alpha of random layers by width: mean and spread, for one matrix and for nine."""
    widths = (8, 12, 16, 24, 32, 48, 64, 96, 128)
    figure = new_figure(5.6, 3.2)
    axes = figure.add_subplot()
    for kernel, colour, label, shift in ((1, ORANGE, "one matrix (1x1 convolution)", 0.985),
                                         (3, BLUE, "nine matrices (3x3 convolution)", 1.015)):  # fmt: skip
        found = np.array([[random_alpha(width, kernel, seed) for seed in range(40)] for width in widths])
        mean, spread = found.mean(1), found.std(1, ddof=1)
        axes.errorbar(
            np.array(widths) * shift, mean, spread, color=colour, marker="o", linestyle="", capsize=3, label=label
        )
        print(label, *(f"{w}: {m:.2f}±{s:.3f}" for w, m, s in zip(widths, mean, spread, strict=True)))
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axes.minorticks_off()
    axes.set_xlabel("channels in and out")
    axes.set_ylabel("power-law exponent alpha")
    axes.set_title("Random Gaussian layers, mean ± sd over 40 seeds")
    axes.legend()
    store(figure, "null")


def random_alpha(width: int, kernel: int, seed: int) -> float:
    """Return alpha of a convolution with Gaussian weights."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d(width, width, kernel)
    nn.init.normal_(convolution.weight)
    (alpha,) = analyze(convolution).alphas.values()
    assert alpha is not None
    return alpha


@styled
def draw_windows() -> None:
    """Where the windows lie: row blocks of a convolution, a grid on a linear layer."""
    figure = new_figure(7.4, 3.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colours = (BLUE, GREEN, PURPLE, ORANGE)
    for kernel in range(9):
        x = kernel * 1.45
        for block in range(3):
            left.add_patch(
                Rectangle((x, -block - 1), 1, 1, facecolor=colours[block], edgecolor="white", alpha=0.85)
            )
        left.add_patch(Rectangle((x, -3.5), 1, 0.5, facecolor="0.88", edgecolor="white"))
    for block in range(3):
        left.text(
            13.2, -block - 0.5, f"block {block + 1}: one fit", va="center", fontsize=7.5, color=colours[block]
        )
    left.text(13.2, -3.25, "left over", va="center", fontsize=7.5, color="0.5")
    left.set_title("Convolution: nine matrices of R x C, here R = 3.5 C")
    _frame(left, (-0.3, 18.0), (-3.7, 0.2))
    right.add_patch(Rectangle((0, -4), 3, 4, facecolor="0.94", edgecolor="0.6"))
    for row, column in ((0, 0), (1, 1), (3, 2)):
        place = (column * 0.55, -row * 0.75 - 1.5)
        colour = colours[(row + column) % 4]
        right.add_patch(Rectangle(place, 1.5, 1.5, facecolor=colour, edgecolor=colour, alpha=0.3, linewidth=1.5))
    right.text(3.3, -2, "windows of 100 x 100 from up to\n9 x 9 places, overlapping:\none fit of all",
               va="center", fontsize=7.5, color="0.3")  # fmt: skip
    right.set_title("Linear layer: one matrix")
    _frame(right, (-0.2, 6.6), (-4.2, 0.2))
    store(figure, "windows")


def _frame(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.set_aspect("equal")
    axes.axis("off")


@styled
def draw_fits() -> None:
    """Alpha and KS distance for every start of the tail, and where the three fits start it."""
    weight = layer(256, 256, 0.35).weight.detach()
    eigenvalues = torch.linalg.svdvals(weight).flip(0).square()[None]
    starts = np.arange(0, 246)
    alphas, distances = np.array([_fit_from(eigenvalues, start) for start in starts]).T
    figure = new_figure(7.4, 2.9)
    chosen = {fit: fit_power_law(eigenvalues, fit) for fit in ("median", "goodness-of-fit", "xmin_peak")}  # type: ignore[arg-type]
    for position, (values, label) in enumerate(((distances, "KS distance D"), (alphas, "alpha")), 1):
        axes = figure.add_subplot(1, 2, position)
        axes.plot(starts, values, color=FAINT)
        for (fit, found), colour, marker in zip(chosen.items(), (BLUE, ORANGE, GREEN), "os^", strict=True):
            start = int(found.tail_start)
            axes.plot(
                start, values[start], marker, color=colour, markersize=7, label=f"{fit}: {found.alpha.item():.2f}"
            )
        axes.set_xlabel("the tail starts at eigenvalue")
        axes.set_ylabel(label)
    figure.axes[0].set_ylim(0, 0.5)
    figure.axes[1].set_ylim(1, 6)
    figure.axes[1].legend(title="fit: alpha")
    store(figure, "fits")


def _fit_from(eigenvalues: Tensor, start: int) -> tuple[float, float]:
    """Return alpha and KS distance of the tail that starts at an index."""
    # A median fit of what is left, with a divisor that takes all of it.
    fit = fit_power_law(eigenvalues[:, start:], "median", xmin_pos=float(eigenvalues.shape[1] + 1))
    return fit.alpha.item(), fit.ks_distance.item()


@styled
def draw_maps() -> None:
    """Ratio against alpha, for the five published maps and twelve layers."""
    alphas = {str(a): a for a in (1.2, 1.25, 1.28, 1.32, 1.4, 1.45, 1.55, 1.6, 1.75, 1.9, 2.05, 2.4)}
    figure = new_figure(5.6, 3.4)
    axes = figure.add_subplot()
    axes.axhline(1.0, color=FAINT, linewidth=1.0)
    for name, colour, marker in zip(MAPS, (BLUE, GREEN, PURPLE, "0.35", ORANGE), "o^Dvs", strict=True):
        ratios = lr_ratios(alphas, name)
        axes.plot(alphas.values(), ratios.values(), color=colour, marker=marker, label=name)
    axes.set_xlabel("alpha of the layer")
    axes.set_ylabel("learning rate / base rate")
    axes.legend()
    store(figure, "maps")


@styled
def draw_noise_aware() -> None:
    """Ratios of the plain and the noise-aware map, for random layers and for layers that have learnt."""
    figure = new_figure(7.4, 3.0)
    for position, (learnt, title) in enumerate(
        ((0.0, "random layers"), (0.9, "from random to much structure")), 1
    ):
        widths = (12, 16, 16, 24, 24, 32, 48, 48, 64, 64)
        decays = learnt * np.linspace(0, 1, len(widths)) ** 0.7
        model = nn.ModuleList(
            layer(w, w, float(d), seed) for seed, (w, d) in enumerate(zip(widths, decays, strict=True))
        )
        report = analyze(model, null=True)
        share = noise_lambda([z for z in report.z_scores.values() if z is not None])
        axes = figure.add_subplot(1, 2, position)
        axes.axhline(1.0, color=FAINT, linewidth=1.0)
        places = range(len(widths))
        axes.plot(places, lr_ratios(report.alphas).values(), "o-", color=ORANGE, label="tb_linear_map")
        axes.plot(
            places, lr_ratios(report.z_scores, "noise_aware").values(), "s-", color=BLUE, label="noise_aware"
        )
        axes.set_title(f"{title}: Λ = {share:.2f}")
        axes.set_xlabel("layer")
        axes.set_ylim(0.4, 1.6)
        axes.set_xticks(list(places), [str(place + 1) for place in places])
    figure.axes[0].set_ylabel("learning rate / base rate")
    figure.axes[1].legend()
    store(figure, "noise_aware")


def draw_minilm() -> None:
    """Draw alpha by depth of all-MiniLM-L6-v2, whose pooler was never used, and what random weights have."""
    if missing():
        return
    report = analyze_checkpoint(minilm_folder(), null=True)
    layers = {
        name.removeprefix("encoder.layer.").replace("attention.self.", ""): record
        for name, record in report.layers.items()
        if record.alpha is not None
    }
    store(plot_alpha_by_depth(Report(layers)), "minilm")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (draw_spectra, draw_null, draw_windows, draw_fits, draw_maps, draw_noise_aware, draw_minilm):
        draw()
