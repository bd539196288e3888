"""What a run of a study keeps of its course: the weights of some epochs, and the learning-rate ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

__all__ = ["Course", "best_epochs", "evaluated_epochs"]


def evaluated_epochs(epochs: int, number: int) -> set[int]:
    """Return `number` epochs of a training, evenly spaced, counted from 1; the last one is among them.

    Args:
        epochs: Epochs of the training, at least 1.
        number: How many to return, at least 1; all where there are fewer epochs.
    """
    number = min(number, epochs)
    return {round((place + 1) * epochs / number) for place in range(number)}


class Course(Callback):
    """Keeps a copy of the weights after some epochs, and the ratios after each measurement.

    It changes nothing in the training: weights are evaluated after it, so that no random number is drawn
    meanwhile. In the list of the trainer's callbacks it stands after the balancing callback.

    Args:
        balancer: The balancing callback; None for the arm `off`.
        number: Epochs to keep; see `evaluated_epochs`.
    """

    def __init__(self, balancer: Any, number: int) -> None:
        self._balancer = balancer
        self._number = number
        self._report: Any = None
        self._means: list[float] = []
        self._deviations: list[float] = []
        self._weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note mean and spread of the ratios where they are new."""
        if self._balancer is None or self._balancer.report is self._report:
            return
        self._report = self._balancer.report
        measured = [name for name, record in self._report.layers.items() if record.shape]
        entries = [math.prod(self._report.layers[name].shape) for name in measured]
        ratios = np.array([self._balancer.ratios[name] for name in measured])
        mean = np.average(ratios, weights=entries)
        self._means.append(float(mean))
        self._deviations.append(float(np.sqrt(np.average((ratios - mean) ** 2, weights=entries))))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights of an epoch that is evaluated later; those of the last stay in the module."""
        epoch = trainer.current_epoch + 1
        epochs = trainer.max_epochs or epoch
        if epoch < epochs and epoch in evaluated_epochs(epochs, self._number):
            self._weights[epoch] = _copied(pl_module)

    def epochs(self, pl_module: LightningModule, last: int) -> Iterator[int]:
        """Load the weights of one epoch after the other into the module; those of the last epoch come last.

        Args:
            pl_module: The module that was trained.
            last: Number of epochs that it was trained for.

        Yields:
            The epoch, counted from 1.
        """
        final = _copied(pl_module)
        for epoch, weights in {**self._weights, last: final}.items():
            pl_module.load_state_dict(weights)
            yield epoch

    @property
    def mean_ratio(self) -> float:
        """Mean over layers, each weighted by its entries, and measurements; 1 without any."""
        return fmean(self._means or [1.0])

    @property
    def ratio_sd(self) -> float:
        """Standard deviation of the ratios over the layers, weighted likewise, its mean over the measurements."""
        return fmean(self._deviations or [0.0])


def _copied(module: LightningModule) -> dict[str, Tensor]:
    """Return a copy of weights and buffers. What else neuralop puts among them, `_metadata`, can't be loaded."""
    return {name: value.clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}


def best_epochs(scores: Mapping[int, Mapping[str, float]], metric: str) -> dict[str, float]:
    """Choose the best of the evaluated epochs, by validation and by test data.

    Args:
        scores: The scores of each epoch, `val/<metric>` and `test/<metric>` among them. An epoch with a score that
            is not finite is out.
        metric: The score that decides; the larger accuracy, the smaller value of all others.

    Returns:
        `best_epoch`, `best_val`, `best_test` and `lowest_test` of `recipes.study.records.Record`; NaN where no
        epoch is left.
    """
    sign = -1.0 if metric == "accuracy" else 1.0
    finite = {epoch: found for epoch, found in scores.items() if all(map(math.isfinite, found.values()))}
    if not finite:
        return dict.fromkeys(("best_epoch", "best_val", "best_test", "lowest_test"), float("nan"))
    best = min(finite, key=lambda epoch: sign * finite[epoch][f"val/{metric}"])
    lowest = min(finite, key=lambda epoch: sign * finite[epoch][f"test/{metric}"])
    return {
        "best_epoch": float(best),  # as it is read back
        "best_val": finite[best][f"val/{metric}"],
        "best_test": finite[best][f"test/{metric}"],
        "lowest_test": finite[lowest][f"test/{metric}"],
    }
