"""The allocations that are compared, all from one table of alphas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import Row
from farms_tb import Report
from farms_tb.sparsity import SparsityPlan, allocate

__all__ = [
    "ARMS",
    "EVALUATIONS",
    "MEASUREMENTS",
    "SEARCHES",
    "SHUFFLES",
    "TUNED",
    "UNEVEN",
    "alpha_rows",
    "plan_of",
]

SHUFFLES = ("shuffled 1", "shuffled 2", "shuffled 3")
UNEVEN = ("line", "whole", "FARMS", "shrinkage")
SEARCHES = ("search", "long search")
TUNED: Mapping[str, str] = {f"{arm}, own epsilon": arm for arm in ("line", "shrinkage")}
"""Arms with the epsilon that is best for them by themselves, in place of the one of all arms."""
ARMS = ("uniform", *UNEVEN, *TUNED, *SHUFFLES, *SEARCHES)

MEASUREMENTS: Mapping[str, Mapping[str, Any]] = {
    "whole": {"esd": "full", "fit": "xmin_peak"},
    "FARMS": {"fit": "xmin_peak", "window": 2000, "windows_per_dim": 15},
}
"""How alphas are measured: with the papers' settings for language models."""

EVALUATIONS = 16
"""Candidates of each search, the uniform one among them."""


def alpha_rows(reports: Mapping[str, Report]) -> list[Row]:
    """Return a row for each layer with its shape, and its alpha and standard error by each measurement.

    Args:
        reports: the measurements of one model, by their keys in `MEASUREMENTS`.
    """
    rows: list[Row] = []
    for name, record in reports["FARMS"].layers.items():
        if record.alpha is None:
            continue
        row: Row = {"layer": name, "rows": record.shape[1], "columns": record.shape[2]}
        for key, report in reports.items():
            of_layer = report.layers[name]
            row[key] = float(of_layer.alpha or "nan")
            row[f"{key} error"] = float(of_layer.alpha_error or "nan")
        rows.append(row)
    return rows


def plan_of(arm: str, layers: Sequence[Row], target: float, epsilon: float, **search: Any) -> SparsityPlan:
    """Return the plan of an arm.

    Args:
        arm: one of `ARMS`.
        layers: rows of `alpha_rows`.
        target: the sparsity over all layers in blocks.
        epsilon: half-width of the range of sparsities, relative to the target; the first step of a search.
        search: for the arms `SEARCHES` alone, what candidates are tried on: the options `model`, `calibration` and
            `prune_method` of `allocate`.
    """
    arm = TUNED.get(arm, arm)
    measurement = "whole" if arm == "whole" else "FARMS"
    names = [str(row["layer"]) for row in layers]
    alphas = {name: float(row[measurement]) for name, row in zip(names, layers, strict=True)}
    errors = {name: float(row[f"{measurement} error"]) for name, row in zip(names, layers, strict=True)}
    shapes = {name: (1, int(row["rows"]), int(row["columns"])) for name, row in zip(names, layers, strict=True)}
    options: dict[str, Any] = {"epsilon": epsilon}
    if arm in SHUFFLES:
        options |= {"method": "shuffled", "seed": SHUFFLES.index(arm)}
    elif arm in SEARCHES:
        options |= {"method": "search", "evaluations": EVALUATIONS, **search}
    else:
        options["method"] = {"line": "depth", "whole": "alpha", "FARMS": "alpha"}.get(arm, arm)
    return allocate(alphas, shapes, target, errors=errors, **options)
