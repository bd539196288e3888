"""How far alpha is from that of plain singular values in double precision, over weights easy and hard.

    python -m benchmarks.accuracy                     # some minutes on one core
    python -m benchmarks.accuracy --device cuda       # alpha measured there, the SVDs on the CPU
    python -m benchmarks.accuracy --networks FNO --epochs 2

The networks: a ResNet-18 and a small ViT that learn scikit-learn's digits, a UNet and an FNO that learn Darcy
flow, by the recipes' settings, for some epochs; and a convolution of 512 x 512 channels, the widest of ResNet-18,
untrained. Each with its weights

- as initialised, and as trained;
- trained, and rounded to bfloat16;
- trained, and the smallest 50 or 90 % of the entries of each weight set to zero;
- trained, and the columns scaled by 1, 1/2, 1/3, ...;
- trained, and of each matrix a quarter of the singular values kept;
- trained, and the singular values of each matrix spread by chance, in their logarithms, over 4, 8 or 12 decades.

Alpha is compared layer by layer, for the three fits, of FARMS windows and of whole matrices. What it is compared
with cuts the windows by plain loops, takes numpy's SVD of each, and looks at every tail that a fit may choose: the
reference implementations of the test suite.

Writes `accuracy.csv`, `accuracy.png` and the table of `README.md`. Exits with status 1 where an error is above
1e-4.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import get_args

import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.models import settings
from benchmarks.references import plain_alphas
from benchmarks.results import BLUE, GREEN, ORANGE, Value, markdown_table, publish, write_csv
from farms_tb import analyze
from farms_tb.options import Esd, Fit
from farms_tb.viewing.plots.style import FAINT, new_figure, styled
from recipes.console import quiet_lightning
from recipes.parts import build_parts
from tests.reference import layers as reference

AIM = 1e-4
FLAT_ALPHA, MIN_EIGENVALUES = 1e4, 5
FLOOR = 1e-16
"""Smaller errors are drawn here."""


def trained(epochs: int, *overrides: str, net: Callable[[], nn.Module] | None = None) -> Iterator[nn.Module]:
    """Yield the network of a recipe, as initialised and after some epochs.

    Args:
        epochs: how long it is trained.
        overrides: the settings of the recipe.
        net: another network for the same task.
    """
    parts = build_parts(settings(*overrides))
    task = parts.model
    if net is not None:
        task.net = net()
    yield deepcopy(task.net)  # type: ignore[misc]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=parts.data)
    yield task.net  # type: ignore[misc]


def small_vit() -> nn.Module:
    """Return a transformer for images of 8 x 8 pixels."""
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    net.conv_proj = nn.Conv2d(1, 64, kernel_size=2, stride=2)
    return net


def large_convolution(epochs: int) -> Iterator[nn.Module]:
    """Yield a convolution as initialised."""
    seed_everything(0, verbose=False)
    yield nn.Sequential(nn.Conv2d(512, 512, 3))


NETWORKS: dict[str, Callable[[int], Iterator[nn.Module]]] = {
    "ResNet-18": lambda epochs: trained(epochs, "experiment=digits_resnet18"),
    "ViT": lambda epochs: trained(epochs, "experiment=digits_resnet18", net=small_vit),
    "UNet": lambda epochs: trained(epochs, "experiment=darcy_unet"),
    "FNO": lambda epochs: trained(epochs, "experiment=darcy_fno"),
    "512 x 512": large_convolution,
}
"""What yields each network as initialised, then as trained if it is trained."""


def changed(net: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy with each weight's matrices `(K, R, C)` changed: one a kernel position or Fourier mode."""
    net = deepcopy(net)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            matrices = change(parameter.detach().reshape(*parameter.shape[:2], -1).permute(2, 0, 1))
            parameter.data = matrices.permute(1, 2, 0).reshape(parameter.shape)
    return net


def rounded(matrices: Tensor) -> Tensor:
    """Round real weights to bfloat16; there are no such complex ones."""
    return matrices if matrices.is_complex() else matrices.bfloat16()


def pruned(share: float) -> Callable[[Tensor], Tensor]:
    """Set a share of the entries to zero, the smallest of the weight."""

    def change(matrices: Tensor) -> Tensor:
        size = matrices.abs()
        kept = size > size.flatten().sort().values[int(share * size.numel())]
        return matrices * kept

    return change


def heavy_tailed(matrices: Tensor) -> Tensor:
    """Scale columns by 1, 1/2, 1/3, ... in any order: tails as of a trained layer, of any size."""
    columns = matrices.shape[-1]
    return matrices / (1 + torch.randperm(columns, generator=torch.Generator().manual_seed(0)))


def low_rank(matrices: Tensor) -> Tensor:
    """Keep the largest quarter of the singular values."""
    left, singular, right = torch.linalg.svd(matrices, full_matrices=False)
    rank = math.ceil(singular.shape[-1] / 4)
    return (left[..., :rank] * singular[:, None, :rank]) @ right[:, :rank]


def ill_conditioned(decades: int) -> Callable[[Tensor], Tensor]:
    """Spread the singular values over so many powers of ten, by chance, in double precision."""

    def change(matrices: Tensor) -> Tensor:
        wide = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
        left, singular, right = torch.linalg.svd(wide, full_matrices=False)
        # Not evenly: all bins of xmin_peak's histogram would be as full as the fullest.
        generator = torch.Generator().manual_seed(decades)
        exponents = (
            torch.rand(singular.shape, generator=generator, dtype=torch.float64).sort(descending=True).values
        )
        exponents[:, 0], exponents[:, -1] = 1, 0
        spread = 10 ** (decades * (exponents - 1))
        return (left * (singular[:, :1] * spread)[:, None]) @ right

    return change


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": rounded,
    "pruned by 50 %": pruned(0.5),
    "pruned by 90 %": pruned(0.9),
    "heavy tails": heavy_tailed,
    "low rank": low_rank,
    "condition 1e4": ill_conditioned(4),
    "condition 1e8": ill_conditioned(8),
    "condition 1e12": ill_conditioned(12),
}


def weights_of(name: str, epochs: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network with each kind of weights."""
    for kind, net in zip(("initial", "trained"), NETWORKS[name](epochs), strict=False):
        yield kind, net
    for kind, change in CHANGES.items():
        yield kind, changed(net, change)


def compare(net: nn.Module, device: str) -> Iterator[dict[str, Value]]:
    """Yield the relative error of alpha for each layer, fit and way to cut windows."""
    on_device = deepcopy(net).to(device)
    layers = reference.layers(net)
    for esd in get_args(Esd):
        spectra = {name: reference.spectra(layer, esd=esd) for name, layer in layers.items()}
        for fit in get_args(Fit):
            report = analyze(on_device, esd=esd, fit=fit)
            found = report.alphas
            # Their tails are rounding errors of the stored weights, which have an exponent but no meaning.
            noise = {name for name, record in report.layers.items() if record.status.startswith("low rank")}
            for name, samples in spectra.items():
                if name in noise:
                    continue
                right = [
                    [alpha for alpha in plain_alphas(values, fit) if alpha <= FLAT_ALPHA] for values in samples
                ]
                if all(right) and min(map(len, samples)) >= MIN_EIGENVALUES:
                    means = [math.fsum(alphas) / len(alphas) for alphas in itertools.product(*right)]
                    yield {"esd": esd, "fit": fit, "layer": name, **closest(found[name], means)}
                elif found[name] is not None:
                    yield {"esd": esd, "fit": fit, "layer": name, "alpha": found[name], "error": math.inf}


def closest(found: float | None, right: Sequence[float]) -> dict[str, Value]:
    """Return the alpha of plain singular values that is closest to the one found, and the relative error."""
    if found is None:
        return {"alpha": right[0], "error": math.inf}
    alpha = min(right, key=lambda one: abs(found / one - 1))
    return {"alpha": alpha, "error": abs(found / alpha - 1)}


def table(rows: Sequence[Mapping[str, Value]]) -> str:
    """Return the table of the page: the largest error of each kind of weights, fit and way to cut windows."""
    shown = []
    for kind in dict.fromkeys(str(row["weights"]) for row in rows):
        line = {"weights": kind, "alphas": str(sum(row["weights"] == kind for row in rows))}
        for esd, fit in itertools.product(get_args(Esd), get_args(Fit)):
            errors = [
                float(row["error"]) for row in rows if (row["weights"], row["esd"], row["fit"]) == (kind, esd, fit)
            ]
            line[f"{esd}, {fit}"] = f"{max(errors):.0e}" if errors else ""
        shown.append(line)
    return markdown_table(shown)


@styled
def draw(path: Path, rows: Sequence[Mapping[str, Value]]) -> None:
    """Draw the error of every layer, a line for each kind of weights."""
    kinds = list(dict.fromkeys(str(row["weights"]) for row in rows))
    figure = new_figure(7.4, 0.9 + 0.36 * len(kinds))
    axes = figure.add_subplot()
    looks = zip(get_args(Fit), (BLUE, GREEN, FAINT), "o^s", (-0.22, 0.0, 0.22), strict=True)
    for fit, colour, marker, shift in looks:
        chosen = [row for row in rows if row["fit"] == fit]
        x = [min(1.0, max(FLOOR, float(row["error"]))) for row in chosen]
        y = [kinds.index(str(row["weights"])) + shift for row in chosen]
        axes.plot(x, y, marker, color=colour, markersize=3, alpha=0.5, markeredgewidth=0, label=fit)
    axes.axvline(AIM, color=ORANGE, linestyle="--", linewidth=1, label="aim")
    axes.set_xscale("log")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set(
        xlabel="relative error of alpha", title="Each layer against plain singular values in double precision"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="How exact alpha is")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=10, help="how long the networks are trained")
    parser.add_argument("--out", type=Path, default=Path("docs/results/accuracy"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_lightning(logging.WARNING)
    machine = describe(options.device, "numpy")
    print(machine)
    rows: list[dict[str, Value]] = []
    for name in options.networks:
        for kind, net in weights_of(name, options.epochs):
            start = time.monotonic()
            found = [{"network": name, "weights": kind, **row} for row in compare(net, options.device)]
            rows += found
            largest = max(float(row["error"]) for row in found)
            print(
                f"{name:>10}, {kind:<15} {len(found):4} alphas, {largest:.1e}, {time.monotonic() - start:.1f} s",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "accuracy.csv", rows)
    draw(options.out / "accuracy.png", rows)
    worst = max(rows, key=lambda row: float(row["error"]))
    headline = (
        f"Of {len(rows)} alphas the largest relative error is {float(worst['error']):.1e}: `{worst['layer']}` of "
        f"{worst['network']}, {worst['weights']}, esd={worst['esd']}, fit={worst['fit']}."
    )
    picture = "![Relative error of the alpha of each layer](accuracy.png)"
    publish(options.out, f"{headline}\n\n{picture}\n\nThe largest error:\n\n{table(rows)}\n\n```\n{machine}\n```")
    print(f"\n{headline}\n\n{table(rows)}\n\nwritten to {options.out}")
    if float(worst["error"]) > AIM:
        raise SystemExit(f"above {AIM:.0e}")


if __name__ == "__main__":
    main()
