"""Measure, allocate, prune and score: one model, one target, several allocations."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

import farms_tb
from farms_tb.atomic_write import atomic_path
from farms_tb.keywords import resolved
from farms_tb.options import SpectrumOptions, check_number
from farms_tb.sparsity import SparsityOptions, plan_from_report, prune
from farms_tb.sparsity.options import PRUNE_METHODS
from recipes.config import build
from recipes.errors import RecipeError
from recipes.prune.scores import Score

__all__ = ["compare_arms", "epsilon_of"]

Row = dict[str, Any]


def compare_arms(cfg: DictConfig) -> Iterator[Row]:
    """Score the dense model, then prune and score it by each arm.

    The output folder gets `config.yaml`, `results.csv`, which is whole after each row, and `plan_<arm>.json`.

    Args:
        cfg: the settings of `conf/prune.yaml`.

    Yields:
        A row of `results.csv` whenever one is finished, the dense model's first: the settings, `sparsity`, the
        share of zeros that was achieved over the planned layers, `score` with its standard error `error`, and
        `difference`, the mean difference from the first arm over samples, in nats a token or in accuracy, with
        half of its `interval` of 95 %.

    Raises:
        RecipeError: a setting, the model or data are at fault, or the output folder holds results of other
            settings. What can be told before the model is loaded, is.
    """
    if cfg.task is None:
        raise RecipeError("say what to prune: experiment=prune/<name>, a file of conf/experiment/prune")
    options = _checked_options(cfg)
    measure: Any = OmegaConf.to_container(cfg.measure, resolve=True)
    with refused("target"):
        check_number("target", cfg.target, at_least=0, at_most=1)
    with refused("measure"):
        resolved(SpectrumOptions, None, measure)
    device = _checked_device(cfg.device)
    _check_folder(cfg)
    task = build(cfg, "task")
    if "search" in options and not task.has_loss:
        raise RecipeError("arms: search goes by the model's loss on calibration data, and images have none")
    with refused("calibration"):
        needs_inputs = PRUNE_METHODS[cfg.method].needs_inputs
        batches = task.batches(cfg.seed) if needs_inputs or "search" in options else None
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)

    with refused("model"):
        model = task.load().to(device)
    with refused("evaluation"):
        dense = task.score(model)
    with refused("measure"):
        report = farms_tb.analyze(model, **measure)
    rows = [_row(cfg, "dense", 0.0, dense)]
    yield _written(rows, folder)
    first: Score | None = None
    for arm, chosen in options.items():
        del model  # before its weights are loaded again
        model = task.load().to(device)
        with refused(f"arm {arm}"):
            data = {"model": model, "calibration": batches} if arm == "search" else {}
            plan = plan_from_report(report, cfg.target, **data, **asdict(chosen))
            plan.save(folder / f"plan_{arm}.json")
            done = prune(model, plan, cfg.method, calibration=batches if needs_inputs else None)
            score = task.score(model)
        row = _row(cfg, arm, done.sparsity, score) | {"epsilon": chosen.epsilon}
        if first is not None:
            row["difference"], row["interval"] = score.difference(first)
        first = first or score
        rows.append(row)
        yield _written(rows, folder)


def _checked_options(cfg: DictConfig) -> dict[str, SparsityOptions]:
    """Return the options of each arm.

    Raises:
        RecipeError: there is no arm, or one cannot be.
    """
    if not cfg.arms or "owl" in cfg.arms:
        raise RecipeError(f"arms must be methods of farms_tb.sparsity.allocate, without owl, got {cfg.arms}")
    shared: dict[str, Any] = {
        "epsilon": epsilon_of(cfg),
        "granularity": cfg.granularity,
        "seed": cfg.seed,
        "prune_method": cfg.method,
        "evaluations": cfg.evaluations,
    }
    with refused("arms"):
        return {arm: SparsityOptions(method=arm, **shared) for arm in cfg.arms}


def epsilon_of(cfg: DictConfig) -> float:
    """Return epsilon as it is set, or as it was published for this measurement, method and target.

    Raises:
        RecipeError: none is set and none was published.
    """
    if cfg.epsilon is not None:
        return float(cfg.epsilon)
    by_method = cfg.epsilons.get(cfg.measure.esd) or {}
    by_target = by_method.get(cfg.method) or {}
    if cfg.target not in by_target:
        raise RecipeError(
            f"no epsilon was published for measure.esd={cfg.measure.esd} method={cfg.method} target={cfg.target}: "
            "set it, epsilon=0.2 for example"
        )
    return float(by_target[cfg.target])


def _check_folder(cfg: DictConfig) -> None:
    """Refuse an output folder with results of other settings, whose plans would be taken for those of this run.

    Raises:
        RecipeError: it is such a folder.
    """
    folder = Path(cfg.output)
    if not (folder / "results.csv").exists():
        return
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    before: Any = {}
    with suppress(OSError, ValueError, YAMLError):  # without its settings the folder is another run's
        before = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    changed = [name for name, value in now.items() if name != "output" and before.get(name) != value]
    if changed:
        raise RecipeError(
            f"output={folder} holds results of other settings, which differ in {', '.join(changed)}; choose "
            "another output, or remove that folder"
        )


def _checked_device(name: str | None) -> torch.device:
    """Return the device to run on; for None a GPU where there is one.

    Raises:
        RecipeError: torch knows no such device, or it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device={name} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def refused(part: str) -> Iterator[None]:
    """Turn what farms_tb refuses into a `RecipeError` that names the part of the settings."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{part}: {error}") from error


def _row(cfg: DictConfig, arm: str, sparsity: float, score: Score) -> Row:
    """Return the results of one arm, without the comparison."""
    return {
        "experiment": cfg.name,
        "arm": arm,
        "esd": cfg.measure.esd,
        "method": cfg.method,
        "target": cfg.target,
        "epsilon": None,
        "seed": cfg.seed,
        "sparsity": sparsity,
        "metric": score.metric,
        "score": score.value,
        "error": score.error,
        "difference": None,
        "interval": None,
    }


def _written(rows: list[Row], folder: Path) -> Row:
    """Write all rows and return the last one."""
    with atomic_path(folder / "results.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows[-1]
