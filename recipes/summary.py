"""What a run leaves behind and prints at its end: the layers, the scores, the pictures, the page.

The layers are those of the last epoch's weights, whose alphas the callback logged last; the scores are those of
the weights that were best on validation data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import farms_tb
from farms_tb.atomic_write import write_text_atomically
from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import plot_alpha_curves, plot_ratio_curves, plot_ratio_map
from farms_tb.viewing.run_folder import read_run_folder
from farms_tb.weights.layers import find_layers
from recipes.callbacks import LastStepRates
from recipes.console import make_console

__all__ = ["FinalLayers", "LayerRow", "finish", "layer_table", "measure_layers", "parameter_count", "run_facts"]

SCORES_IN_A_LINE = 5


@dataclass(frozen=True)
class LayerRow:
    """One layer after training.

    Attributes:
        layer: Its name.
        alpha_full: Alpha of the whole weight matrix (TempBalance).
        alpha_farms: Alpha by FARMS.
        ratio: Learning-rate ratio of the last step.
        lr: Learning rate of the last step.
        note: Why an alpha is missing; empty where both are there.
    """

    layer: str
    alpha_full: float | None
    alpha_farms: float | None
    ratio: float
    lr: float | None
    note: str


@dataclass(frozen=True)
class FinalLayers:
    """The layers after training.

    Attributes:
        rows: One a layer, in order of depth.
        farms: Their measurement by FARMS, with spectra.
        full: The same of whole matrices.
    """

    rows: list[LayerRow]
    farms: farms_tb.Report
    full: farms_tb.Report


def measure_layers(model: torch.nn.Module, cfg: DictConfig, last: LastStepRates) -> FinalLayers:
    """Measure the trained weights both ways, with the spectral options of `cfg.balancing` where there are any.

    Args:
        model: The trained model.
        cfg: The composed settings.
        last: Learning rates and ratios of the last step.

    Returns:
        The layers, and the two measurements that they are taken from.
    """
    options = OmegaConf.to_container(cfg.balancing, resolve=True)
    assert isinstance(options, dict)  # the callback's keyword arguments
    # The two measurements differ in these; the threads are those of the training.
    own = ("esd", "min_eigenvalues", "threads")
    spectral = [field.name for field in fields(SpectrumOptions) if field.name not in own]
    shared: dict[str, Any] = {name: options[name] for name in spectral if name in options}
    least = cfg.arms.farms.min_eigenvalues
    least_full = OmegaConf.select(cfg, "arms.full.min_eigenvalues", default=least)
    full = farms_tb.analyze(model, esd="full", min_eigenvalues=least_full, histogram=True, **shared)
    farms = farms_tb.analyze(model, esd="farms", min_eigenvalues=least, histogram=True, **shared)
    layers = find_layers(model, adapters=shared.get("adapters", SpectrumOptions.adapters))
    parameters = {layer.name: layer.parameters for layer in layers}
    rows = []
    for name in farms.layers:
        lr = last.lr_of(parameters.get(name, ()))
        rows.append(_layer_row(name, full.layers[name], farms.layers[name], lr, last.ratios.get(name, 1.0)))
    return FinalLayers(rows, farms, full)


def _layer_row(name: str, full: LayerRecord, farms: LayerRecord, lr: float | None, ratio: float) -> LayerRow:
    """Join what is known of one layer.

    Args:
        name: Its name.
        full: Its record by whole matrices.
        farms: Its record by FARMS.
        lr: Learning rate of its param group in the last step; None where there was no step.
        ratio: Its learning-rate ratio in the last step.

    Returns:
        The row; a reason for a missing alpha that both measurements give stands once in its note.
    """
    reasons = [record.status for record in (full, farms) if record.status != "ok"]
    note = "; ".join(dict.fromkeys(reasons))
    own_lr = None if lr is None else lr * ratio
    return LayerRow(name, full.alpha, farms.alpha, ratio, own_lr, note)


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """Lay the layers out as a table, alpha of the whole matrix next to alpha by FARMS.

    Args:
        rows: The layers. Where one of them has a note, the table gets a column `status`.
    """
    table = Table(
        title="Layers after training; ratio and lr of the last step", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("layer", no_wrap=True)
    for heading in ("alpha full", "alpha FARMS", "ratio", "lr"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes = any(row.note for row in rows)
    if notes:
        table.add_column("status")
    for row in rows:
        cells = [row.layer, _cell(row.alpha_full, ".2f"), _cell(row.alpha_farms, ".2f")]
        cells += [_cell(row.ratio, ".2f"), _cell(row.lr, ".2e")]
        if notes:
            cells.append(row.note or "ok")
        table.add_row(*map(Text, cells))
    return table


def _cell(value: float | None, form: str) -> str:
    """Format a number; one that is missing becomes a dash."""
    if value is None:
        return "-"
    return format(value, form)


def parameter_count(model: torch.nn.Module) -> int:
    """Return the number of the model's parameters, those of all processes together."""
    return sum(parameter.numel() for parameter in model.parameters())


def run_facts(
    cfg: DictConfig,
    model: torch.nn.Module,
    training: Mapping[str, Any],
    scores: Mapping[str, float],
    started: float,
) -> dict[str, Any]:
    """Return what `summary.json` says of a run, without the layers.

    Args:
        cfg: The composed settings, with the run folder filled in.
        model: The trained model.
        training: Its `monitor`, `best_checkpoint`, `best_score`, `best_epoch`, `epochs` and `steps`.
        scores: The test scores by name.
        started: When the run began, by `time.monotonic`.
    """
    return {
        "name": cfg.name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        **training,
        "parameters": parameter_count(model),
        "wandb": sorted(str(path) for path in Path(cfg.paths.run_dir).glob("wandb/*run-*") if path.is_dir()),
        "test": {name: float(value) for name, value in scores.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def finish(folder: Path, facts: Mapping[str, Any], layers: FinalLayers) -> None:
    """Write `summary.json`, draw the pictures, write the page, and print the layers, the scores and where all is.

    Args:
        folder: The run folder.
        facts: Those of `run_facts`.
        layers: The layers after training.
    """
    text = json.dumps({**facts, "layers": [asdict(row) for row in layers.rows]}, indent=2)
    write_text_atomically(folder / "summary.json", text + "\n")
    title = f"{facts['name']}, balancing={facts['arm']}, seed {facts['seed']}"
    draw_run(folder, layers, title)
    console = make_console()
    console.print(layer_table(layers.rows))
    console.print(Panel("\n".join(_lines(folder, facts)), title=escape(title), title_align="left", expand=False))


def draw_run(folder: Path, layers: FinalLayers, title: str) -> None:
    """Write `report.html` and, where the run logged alphas, `alpha.png`, `lr_ratio.png` and `lr_ratio_map.png`.

    Args:
        folder: The run folder.
        layers: The layers after training.
        title: A heading of the pictures.
    """
    run = read_run_folder(folder, farms=layers.farms, full=layers.full)
    write_page(run)
    if run.history.alpha:
        pictures = {"alpha": plot_alpha_curves, "lr_ratio": plot_ratio_curves, "lr_ratio_map": plot_ratio_map}
        for name, plot in pictures.items():
            plot(run.history, folder / f"{name}.png", title=title)


def _lines(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Return the last lines that a run prints: its scores, and where everything is."""
    scores = [f"{name} {value:.4g}" for name, value in facts["test"].items()]
    lines = []
    for start in range(0, len(scores), SCORES_IN_A_LINE):
        some = "   ".join(scores[start : start + SCORES_IN_A_LINE])
        lines.append(f"[bold]{some}[/bold]")
    lines += [
        f"best epoch {_cell(facts['best_epoch'], 'd')} by {facts['monitor']} {_cell(facts['best_score'], '.4g')}, "
        f"{facts['parameters']:,} parameters, {facts['seconds']:.0f} s",
        f"run folder  {escape(str(folder))}",
        f"in it       {escape(', '.join(sorted(path.name for path in folder.iterdir() if path.name[0] != '.')))}",
    ]
    return [*lines, *(f"W&B         {escape(run)}" for run in facts["wandb"])]
