"""Which measure finds the one layer of a network that was held back in training?

One hidden layer, drawn at random, is frozen or trains with a fraction of the learning rate. A measure is scored by
the share of the other layers that it ranks as better trained: 1 is perfect, 0.5 a coin.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from benchmarks.diagnosis.measures import MEASURES, layer_measures
from benchmarks.diagnosis.networks import NETWORKS
from benchmarks.diagnosis.training import Settings, digits, error, train
from benchmarks.results import Value
from benchmarks.rows import Row, Rows

__all__ = ["FACTORS", "KEYS", "SETTINGS", "measure", "runs"]

FACTORS = (0.0, 0.03, 0.1, 0.3)
KEYS = ("network", "seed", "factor")
TRAIN_IMAGES = 1000

SETTINGS = {
    "CNN": Settings(500),
    "MLP": Settings(1000, lr=0.05),
    "transformer": Settings(600, "AdamW", lr=5e-3, weight_decay=0.05),
}


def runs(seeds: int) -> list[dict[str, Value]]:
    """Return what each run is of: every network with every factor, seed by seed."""
    grid = itertools.product(range(seeds), NETWORKS, FACTORS)
    return [{"network": network, "seed": seed, "factor": factor} for seed, network, factor in grid]


def measure(run: Mapping[str, Value], rows: Rows) -> None:
    """Train one network with a layer held back, and add the row of its scores."""
    started = time.monotonic()
    network, seed, factor = str(run["network"]), int(run["seed"]), float(run["factor"])
    torch.manual_seed(seed)
    net = NETWORKS[network]()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    held = _hidden_layer(net, seed)
    data = digits(TRAIN_IMAGES, seed)
    train(net, data, replace(SETTINGS[network], lr_factors={held: factor}), seed)
    found = layer_measures(net, start)
    row: Row = {**run, "layer": held, "test_error": error(net, data.test_images, data.test_labels)}
    rows.add([row | _scores(found, held) | {"seconds": time.monotonic() - started}])


def _hidden_layer(net: nn.Module, seed: int) -> str:
    """Draw one of the layers between the first and the last, of those with at least 16 rows and columns."""
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][1:-1]
    large = [name for name in layers if min(net.get_parameter(f"{name}.weight").shape[:2]) >= 16]
    return large[int(np.random.default_rng(seed).integers(len(large)))]


def _scores(found: Mapping[str, Mapping[str, float]], held: str) -> Row:
    """Return the share of the other layers that each measure ranks as better trained; ties count half.

    Layers count that all measures can be taken of. WeightWatcher's columns are NaN where it is not installed.
    """
    installed = not math.isnan(found[held]["ww_alpha"])
    names = [name for name in MEASURES if installed or name != "ww_alpha"]
    complete = [layer for layer, row in found.items() if all(math.isfinite(row[name]) for name in names)]
    others = [found[layer] for layer in complete if layer != held]
    scores: Row = {"others": len(others)}
    for name, kind in MEASURES.items():
        lead = kind.untrained * np.array([found[held][name] - other[name] for other in others])
        scores[name] = float(np.mean(np.where(np.isnan(lead), np.nan, (lead > 0) + 0.5 * (lead == 0))))
    scores["ww_warns"] = found[held]["ww_undertrained"]
    scores["ww_warns_others"] = float(np.mean([other["ww_undertrained"] for other in others]))
    return scores
