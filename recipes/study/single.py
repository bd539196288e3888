"""One run of `python -m recipes.train` in a study: build, train, validate and test, and nothing else.

A study makes hundreds of runs, so this leaves out all that `recipes.train` does around a training: no run folder,
no checkpoints, no loggers, no pictures. Model, data, callback and optimizer are built the same way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig, OmegaConf

from recipes.config import build, check_config
from recipes.console import quiet_lightning
from recipes.errors import RecipeError
from recipes.parts import Parts, build_parts
from recipes.study.course import Course, Ratios, Weights, best_epochs, outcome
from recipes.study.messages import callback_warnings

__all__ = ["build_once", "make_trainer", "metric_of", "prepare", "run_once", "run_quietly", "uses_gpu"]

_METRICS = ("accuracy", "nrmse", "relative_l2", "loss")
_NEVER = 10**9


def prepare(cfg: DictConfig) -> None:
    """Check the settings of an arm, and let its runs log nothing; see `recipes.study.programs.Program`."""
    check_config(cfg)
    metric_of(cfg)
    if "log" in cfg.balancing:
        cfg.balancing.log = False


def build_once(cfg: DictConfig) -> None:
    """Build the parts of a run and throw them away; see `recipes.study.programs.Program`."""
    make_trainer(cfg, build_parts(cfg))


def uses_gpu(cfg: DictConfig) -> bool:
    """Return whether a run may train on a GPU."""
    return cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def metric_of(cfg: DictConfig) -> str:
    """Return the name of the score that is compared, that of `task.monitor`.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: It is none that this program has.
    """
    metric = str(cfg.task.monitor).removeprefix("val/")
    # Of other tasks a loss has no error of blind guessing.
    if metric not in _METRICS or (metric == "loss" and cfg.model._target_ != "recipes.tasks.LanguageModel"):
        known = ", ".join(f"val/{name}" for name in _METRICS)
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
    with callback_warnings() as messages:
        parts = build_parts(cfg)
        ratios, weights = Ratios(parts.balancer), Weights(evaluations)
        trainer, clock = make_trainer(cfg, parts, Course(ratios, weights))
        trainer.fit(parts.model, datamodule=parts.data)
        last = trainer.current_epoch
        training = {"epochs": last, "steps": trainer.global_step, **_times(clock)}
        scores = {epoch: _evaluate(trainer, parts) for epoch in weights.epochs(parts.model, last)}
    facts: dict[str, Any] = {
        **_outcome(cfg, scores[last]),
        **best_epochs(scores, metric_of(cfg)),
        **ratios.facts(),
        **training,
        "val_samples": _size(parts.data.val_dataloader()),
        "test_samples": _size(parts.data.test_dataloader()),
        "parameters": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        "device": str(trainer.strategy.root_device),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return facts, messages


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
    """Return what the scores of the last epoch say, in the fields of `Record`."""
    metric = metric_of(cfg)
    blind_error = 1.0
    if metric == "accuracy":
        blind_error = 1.0 - 1.0 / cfg.task.out_channels
    elif metric == "loss":
        blind_error = math.log(cfg.task.out_channels)
    return {**outcome(scores, metric), "blind_error": blind_error}


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
