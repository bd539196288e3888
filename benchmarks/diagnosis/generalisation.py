"""Which summary of a network's layers goes with its test error, at fixed depth and across depths?

MLPs differ in width, weight decay, label noise and the number of training images. Among 60 of one depth each level
occurs equally often, in an order drawn at random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.diagnosis.measures import layer_measures
from benchmarks.diagnosis.training import Digits, Settings, digits, error, train
from benchmarks.results import Value
from benchmarks.rows import Row, Rows
from farms_tb import analyze

__all__ = ["DEPTHS", "KEYS", "SUMMARIES", "measure", "runs"]

DEPTHS = (3, 5, 8)
MOST_NETS = 60
KEYS = ("depth", "net")
LEVELS: dict[str, tuple[float, ...]] = {
    "width": (32, 64, 128, 256),
    "weight_decay": (0.0, 0.1, 0.3, 1.0),
    "label_noise": (0.0, 0.1, 0.2, 0.4),
    "train_images": (100, 200, 500, 1000),
}

SUMMARIES = {
    "effect": "mean effect (FARMS alpha - its permutation null)",
    "alpha": "mean FARMS alpha",
    "whole_alpha": "mean alpha of whole matrices",
    "ww_alpha": "mean of WeightWatcher's alpha",
    "weighted_alpha": "mean of alpha log10(largest eigenvalue), whole matrices",
    "rank_share": "mean share of directions with 99 % of the energy",
    "log_norm": "mean log10 of the squared Frobenius norm",
    "log_spectral_norm": "mean log10 of the squared spectral norm",
    "stable_rank": "mean stable rank, share of the largest possible",
    "distance": "mean distance from the start (needs the start)",
    "train_loss": "training loss (needs the data)",
}
"""By the name of their column."""


def runs(nets: int = 30) -> list[dict[str, Value]]:
    """Return the settings of each network, those of all depths in turn.

    Args:
        nets: networks of each depth, at most 60: a longer list begins with the shorter one.
    """
    found = []
    for depth in DEPTHS:
        generator = np.random.default_rng(depth)
        columns = {
            name: generator.permutation(np.resize(np.array(levels), MOST_NETS)) for name, levels in LEVELS.items()
        }
        for net in range(nets):
            settings = {name: float(values[net]) for name, values in columns.items()}
            found.append({"depth": float(depth), "net": float(net), **settings})
    return sorted(found, key=lambda run: (run["net"], run["depth"]))


def measure(run: Mapping[str, float], rows: Rows) -> None:
    """Train one network, and add the row of its error and summaries."""
    started = time.monotonic()
    seed = int(1000 * run["depth"] + run["net"])
    torch.manual_seed(seed)
    net = _mlp(int(run["width"]), int(run["depth"]))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    data = digits(int(run["train_images"]), seed, run["label_noise"])
    train(net, data, Settings(1500, "AdamW", lr=2e-3, weight_decay=run["weight_decay"]), seed)
    row: Row = {**run, "test_error": error(net, data.test_images, data.test_labels)}
    row |= {"train_error": error(net, data.images, data.labels)}
    rows.add([row | _summaries(net, start, data) | {"seconds": time.monotonic() - started}])


def _mlp(width: int, depth: int) -> nn.Module:
    """Return an MLP of equal hidden layers without normalisation, so that the norms of its weights matter."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([64] + [width] * (depth - 1)):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _summaries(net: nn.Module, start: dict[str, torch.Tensor], data: Digits) -> Row:
    """Return every summary: means over the layers, and the training loss."""
    layers = layer_measures(net, start).values()
    names = ("effect", "alpha", "whole_alpha", "ww_alpha", "stable_rank", "distance")
    summaries: Row = {name: fmean(layer[name] for layer in layers) for name in names}
    whole = [record for record in analyze(net, esd="full", threads=1).layers.values() if record.alpha is not None]
    summaries["weighted_alpha"] = fmean(record.alpha_hat or math.nan for record in whole)
    summaries["rank_share"] = fmean(record.rank_share or math.nan for record in whole)
    summaries["log_norm"] = fmean(math.log10(record.norm or math.nan) for record in whole)
    summaries["log_spectral_norm"] = fmean(math.log10(record.spectral_norm or math.nan) for record in whole)
    with torch.no_grad():
        summaries["train_loss"] = float(functional.cross_entropy(net(data.images), data.labels))
    return summaries
