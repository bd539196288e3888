"""One run of a study: build, train, validate and test the final weights, and nothing else.

A study makes hundreds of runs, so this leaves out all that `recipes.train` does around a training: no run folder,
no checkpoints, no loggers, no pictures. Model, data, callback and optimizer are built the same way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig, OmegaConf

from recipes.config import build
from recipes.console import quiet_lightning
from recipes.errors import RecipeError
from recipes.parts import Parts, build_parts
from recipes.study.course import Course, best_epochs

__all__ = ["METRICS", "make_trainer", "metric_of", "run_once", "run_quietly"]

METRICS = {
    "accuracy": "1 - accuracy",
    "nrmse": "nRMSE",
    "relative_l2": "relative L2 error",
    "loss": "cross-entropy in nats",
}
"""The scores a study can compare, and their errors. A network that has learnt nothing has the error of blind
guessing, 1 - 1 / classes or ln(classes), or that of predicting zero, 1."""

_NEVER = 10**9


def metric_of(cfg: DictConfig) -> str:
    """Return the name of the score that is compared, that of `task.monitor`.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: It is not one of `METRICS`.
    """
    metric = str(cfg.task.monitor).removeprefix("val/")
    # Of other tasks a loss has no error of blind guessing.
    if metric not in METRICS or (metric == "loss" and cfg.model._target_ != "recipes.tasks.LanguageModel"):
        known = ", ".join(f"val/{name}" for name in METRICS)
        raise RecipeError(f"a study compares errors: task.monitor must be one of {known}, got {cfg.task.monitor}")
    return metric


def make_trainer(cfg: DictConfig, parts: Parts, *more: Callback) -> tuple[Trainer, SimpleProfiler]:
    """Build the trainer of a run, and the clock that times its actions.

    No logger, no checkpoints, no progress bar; validation data are looked at after training alone.

    Args:
        cfg: The composed settings.
        parts: What is trained.
        more: Callbacks after the balancing one.

    Returns:
        The trainer, and the profiler that it records the times of its hooks with.

    Raises:
        RecipeError: The trainer refuses its settings.
    """
    clock = SimpleProfiler()
    callbacks = [] if parts.balancer is None else [parts.balancer]
    callbacks += more
    trainer = build(
        cfg,
        "trainer",
        callbacks=callbacks,
        logger=False,
        profiler=clock,
        enable_checkpointing=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=_NEVER,
    )
    return trainer, clock


def run_once(settings: dict[str, Any], evaluations: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Train, then validate and test.

    Args:
        settings: All settings of the run, resolved.
        evaluations: Epochs whose weights are validated and tested, see `recipes.study.course.evaluated_epochs`.

    Returns:
        The fields of `recipes.study.records.Record` that the run decides, and the callback's warnings.

    Raises:
        RecipeError: A part refuses its settings.
    """
    started = time.perf_counter()
    cfg = OmegaConf.create(settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = build_parts(cfg)
        course = Course(parts.balancer, evaluations)
        trainer, clock = make_trainer(cfg, parts, course)
        trainer.fit(parts.model, datamodule=parts.data)
        last = trainer.current_epoch
        training = {"epochs": last, "steps": trainer.global_step, **_times(clock)}
        scores = {epoch: _evaluate(trainer, parts) for epoch in course.epochs(parts.model, last)}
    facts: dict[str, Any] = {
        **_outcome(cfg, scores[last]),
        **best_epochs(scores, metric_of(cfg)),
        "mean_ratio": course.mean_ratio,
        "ratio_sd": course.ratio_sd,
        **training,
        "val_samples": _size(parts.data.val_dataloader()),
        "test_samples": _size(parts.data.test_dataloader()),
        "parameters": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        "device": str(trainer.strategy.root_device),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return facts, [str(warning.message) for warning in caught if "farms_tb" in warning.filename]


def run_quietly(arguments: tuple[dict[str, Any], int]) -> tuple[dict[str, Any], list[str]]:
    """Do a run in a process of an engine: on one thread, with nothing printed.

    Args:
        arguments: Those of `run_once`.
    """
    torch.set_num_threads(1)
    quiet_lightning(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return run_once(*arguments)


def _evaluate(trainer: Trainer, parts: Parts) -> dict[str, float]:
    """Return the scores of the weights that the model has now, on validation and on test data."""
    validation = trainer.validate(parts.model, datamodule=parts.data, verbose=False)[0]
    test = trainer.test(parts.model, datamodule=parts.data, verbose=False)[0]
    return {**validation, **test}


def _outcome(cfg: DictConfig, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return what the scores say, in the fields of `Record`; a score that is not finite means that it diverged."""
    metric = metric_of(cfg)
    blind_error = 1.0
    if metric == "accuracy":
        blind_error = 1.0 - 1.0 / cfg.task.out_channels
    elif metric == "loss":
        blind_error = math.log(cfg.task.out_channels)
    status, val, test = "ok", scores[f"val/{metric}"], scores[f"test/{metric}"]
    if not all(math.isfinite(score) for score in scores.values()):
        status, val, test = "diverged", math.nan, math.nan
    return {"status": status, "metric": metric, "val": val, "test": test, "blind_error": blind_error}


def _size(loader: Any) -> int:
    """Return the number of samples that a loader goes through."""
    return len(loader.dataset)


def _times(clock: SimpleProfiler) -> dict[str, float]:
    """Split the time of the training loop, in seconds, into the callback's and the rest."""
    callback = within_epochs = 0.0
    for name, durations in clock.recorded_durations.items():
        if name.startswith("[Callback]FARMSTempBalance"):
            callback += math.fsum(durations)
            # The trainer's clock of an epoch runs while batches are trained: it includes the hooks around batches.
            if "_batch_" in name:
                within_epochs += math.fsum(durations)
    loop = math.fsum(clock.recorded_durations["run_training_epoch"])
    return {"train_seconds": round(loop - within_epochs, 4), "callback_seconds": round(callback, 4)}
