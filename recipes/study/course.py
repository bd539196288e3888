"""What a run of a study keeps of its course: the weights of some epochs, and the learning-rate ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from recipes.study.records import SHARES

__all__ = ["Course", "Ratios", "Weights", "best_epochs", "evaluated_epochs", "outcome"]


def evaluated_epochs(epochs: int, number: int) -> set[int]:
    """Return `number` epochs of a training, evenly spaced, counted from 1; the last one is among them.

    Args:
        epochs: Epochs of the training, at least 1.
        number: How many to return, at least 1; all where there are fewer epochs.
    """
    number = min(number, epochs)
    return {round((place + 1) * epochs / number) for place in range(number)}


class Ratios:
    """Mean and spread of the learning-rate ratios over the layers, noted after each measurement.

    Args:
        balancer: The balancing callback; None for the arm `off`.
    """

    def __init__(self, balancer: Any) -> None:
        self._balancer = balancer
        self._report: Any = None
        self._means: list[float] = []
        self._deviations: list[float] = []

    def note(self) -> None:
        """Note them if they are new; call it before each step."""
        if self._balancer is None or self._balancer.report is self._report:
            return
        if self._balancer.options.ratios.target == "weight_decay":
            return  # every learning rate stays as it is
        self._report = self._balancer.report
        measured = [name for name, record in self._report.layers.items() if record.shape]
        entries = [math.prod(self._report.layers[name].shape) for name in measured]
        ratios = np.array([self._balancer.ratios[name] for name in measured])
        mean = np.average(ratios, weights=entries)
        self._means.append(float(mean))
        self._deviations.append(float(np.sqrt(np.average((ratios - mean) ** 2, weights=entries))))

    def facts(self) -> dict[str, float]:
        """Return `mean_ratio` and `ratio_sd` of `recipes.study.records.Record`.

        The mean is over layers, each weighted by its entries, and over measurements; 1 without any. Layers that
        have matrices and no alpha count with their ratio, 1. The standard deviation is over the layers, weighted
        likewise; its mean over measurements, 0 without any.
        """
        return {"mean_ratio": fmean(self._means or [1.0]), "ratio_sd": fmean(self._deviations or [0.0])}


class Weights:
    """Copies of the weights after some epochs, to be scored once the training is over.

    So that no random number is drawn meanwhile, and the training is the same whatever is looked at.

    Args:
        number: Epochs to keep; see `evaluated_epochs`.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept: dict[int, dict[str, Tensor]] = {}

    def keep(self, module: nn.Module, epoch: int, epochs: int) -> None:
        """Keep the weights of an epoch that is evaluated later; those of the last one stay in the module.

        Args:
            module: The module that is trained.
            epoch: The epoch that has ended, counted from 1.
            epochs: Epochs of the training.
        """
        if epoch < epochs and epoch in evaluated_epochs(epochs, self._number):
            self._kept[epoch] = _copied(module)

    def epochs(self, module: nn.Module, last: int) -> Iterator[int]:
        """Load the weights of one epoch after the other into the module; those of the last epoch come last.

        Args:
            module: The module that was trained.
            last: Number of epochs that it was trained for.

        Yields:
            The epoch, counted from 1.
        """
        final = _copied(module)
        for epoch, weights in {**self._kept, last: final}.items():
            module.load_state_dict(weights, strict=False)  # frozen weights are not among them
            yield epoch


class Course(Callback):
    """Keeps ratios and weights of a training under Lightning's trainer.

    In the list of the trainer's callbacks it stands after the balancing callback.

    Args:
        ratios: Notes the ratios.
        weights: Keeps the weights.
    """

    def __init__(self, ratios: Ratios, weights: Weights) -> None:
        self._ratios = ratios
        self._weights = weights

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the ratios."""
        self._ratios.note()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights."""
        self._weights.keep(pl_module, trainer.current_epoch + 1, planned_epochs(trainer))


def planned_epochs(trainer: Trainer) -> int:
    """Return how many epochs a run has, by `max_epochs` or `max_steps`, whichever ends it first.

    Of a run without end the epochs until now count.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        return trainer.current_epoch + 1
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return math.ceil(steps / per_epoch)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of buffers and weights without those that are frozen.

    What else neuralop puts among them, `_metadata`, can't be loaded.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    state = module.state_dict()
    return {name: state[name].clone() for name in state if torch.is_tensor(state[name]) and name not in frozen}


def best_epochs(scores: Mapping[int, Mapping[str, float]], metric: str) -> dict[str, float]:
    """Choose the best of the evaluated epochs, by validation and by test data.

    Args:
        scores: The scores of each epoch, `val/<metric>` and `test/<metric>` among them. An epoch with a score that
            is not finite is out.
        metric: The score that decides: the larger one of `SHARES`, the smaller value of all others.

    Returns:
        `best_epoch`, `best_val`, `best_test` and `lowest_test` of `recipes.study.records.Record`; NaN where no
        epoch is left.
    """
    sign = -1.0 if metric in SHARES else 1.0
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


def outcome(scores: Mapping[str, float], metric: str) -> dict[str, Any]:
    """Return what the scores of the last epoch say of a run.

    Args:
        scores: The scores, `val/<metric>` and `test/<metric>` among them.
        metric: The score that is compared.

    Returns:
        `status`, `metric`, `val` and `test` of `recipes.study.records.Record`. Any score that is not finite means
        that the run diverged.
    """
    if not all(map(math.isfinite, scores.values())):
        return {"status": "diverged", "metric": metric, "val": math.nan, "test": math.nan}
    return {"status": "ok", "metric": metric, "val": scores[f"val/{metric}"], "test": scores[f"test/{metric}"]}
