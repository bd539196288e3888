"""What can be asked of a layer's weights to tell how far it is trained, each as one number."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.references import import_weightwatcher
from farms_tb import analyze

__all__ = ["MEASURES", "Measure", "layer_measures", "weightwatcher_version"]


@dataclass(frozen=True)
class Measure:
    """A number of a layer.

    Attributes:
        label: what it is called in tables and pictures.
        untrained: 1 where a large value means that a layer is little trained, -1 where a small one does.
    """

    label: str
    untrained: int


MEASURES = {
    "effect": Measure("effect (FARMS alpha - its permutation null)", 1),
    "alpha": Measure("FARMS alpha", 1),
    "z": Measure("z-score of FARMS alpha", 1),
    "whole_alpha": Measure("alpha of whole matrices", 1),
    "ww_alpha": Measure("WeightWatcher's alpha", 1),
    "norm": Measure("weight norm", -1),
    "spectral_norm": Measure("spectral norm", -1),
    "stable_rank": Measure("stable rank", 1),
    "distance": Measure("distance from the start (oracle)", -1),
}
"""By the name of their column. Norms are in units of a random matrix's: sqrt(fan_in) times the root mean square of
the entries, the spectral norm likewise; the stable rank is a share of the number of singular values."""


def layer_measures(net: nn.Module, start: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the measures of each layer that has an alpha.

    Args:
        net: the network.
        start: its state dict before training.

    Returns:
        By layer, by name of the measure; WeightWatcher's is NaN where that is not installed.
    """
    farms = analyze(net, null=True, threads=1)
    whole = analyze(net, esd="full", threads=1)
    others = _weightwatcher(net)
    found = {}
    for name, record in farms.layers.items():
        if record.alpha is None or record.null_mean is None or record.z_score is None:
            continue
        found[name] = {
            "effect": record.alpha - record.null_mean,
            "alpha": record.alpha,
            "z": record.z_score,
            "whole_alpha": whole.alphas[name] or math.nan,
            **others.get(name, {"ww_alpha": math.nan, "ww_undertrained": math.nan}),
            **_of_entries(net.get_parameter(f"{name}.weight").detach(), start[f"{name}.weight"]),
        }
    return found


def _of_entries(weight: Tensor, start: Tensor) -> dict[str, float]:
    """Return what needs no fit: norms, stable rank and the distance from the start, relative to its norm."""
    matrix = weight.flatten(1)
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    total = float(matrix.norm())
    rows, columns = matrix.shape
    return {
        "norm": total / math.sqrt(rows),
        "spectral_norm": largest * math.sqrt(columns) / (math.sqrt(rows) + math.sqrt(columns)),
        "stable_rank": (total / largest) ** 2 / min(rows, columns),
        "distance": float((weight - start).norm() / start.norm()),
    }


def weightwatcher_version() -> str | None:
    """Return the version of WeightWatcher, None where it cannot be imported."""
    library = import_weightwatcher()
    return None if library is None else str(library.__version__)


def _weightwatcher(net: nn.Module) -> dict[str, dict[str, float]]:
    """Return WeightWatcher's alpha of each layer, and 1 where it warns that the layer is under-trained."""
    library = import_weightwatcher()
    if library is None:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):
        details = library.WeightWatcher(model=net).analyze(min_evals=5)
    return {
        str(row.longname): {"ww_alpha": float(row.alpha), "ww_undertrained": float(row.warning == "under-trained")}
        for row in details.itertuples()
        if row.status == "success"
    }
