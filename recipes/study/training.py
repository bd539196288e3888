"""What a study needs of `python -m recipes.train`, see `recipes.study.programs`.

Model, data, callback and optimizer of a run are built as the command builds them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig

from recipes.config import build, check_config, plain
from recipes.errors import RecipeError
from recipes.parts import Parts, build_parts
from recipes.study.course import Course, Ratios, Weights
from recipes.study.one_run import Trained

__all__ = ["METRIC_SETTING", "build_once", "make_trainer", "metric_of", "prepare", "train", "uses_gpu"]

METRIC_SETTING = "task.monitor"
_METRICS = ("accuracy", "nrmse", "relative_l2", "loss")
_NEVER = 10**9
_NEEDED = {
    **dict.fromkeys(("limit_train_batches", "max_steps", "max_epochs"), "trains"),
    "limit_val_batches": "is validated",
    "limit_test_batches": "is tested",
}
"""Settings of the trainer that must not be 0, and what a run does not do otherwise."""
_ONE_PROCESS = (None, 1, "1", -1, "-1", "auto")
"""Values of `trainer.devices` that give one process: a run sees one GPU at most."""
_PROBE = 0.123  # a learning rate that nobody sets
_FOLLOWING = ("optimizer", "scheduler", "model")
"""The sections by which a learning rate reaches a run."""


def prepare(cfg: DictConfig) -> None:
    """Check the settings of an arm, which may work alone and not in a study, and let its runs log nothing."""
    check_config(cfg)
    metric = metric_of(cfg)
    _check_rate(cfg)
    _check_amounts(cfg)
    _check_processes(cfg)
    _check_classes(cfg, metric)
    if "log" in cfg.balancing:
        cfg.balancing.log = False


def _check_rate(cfg: DictConfig) -> None:
    """Refuse a learning rate that is no function of `lr`, by which a study sets those that it tries."""
    changed = cfg.copy()
    changed.lr = _PROBE
    before, after = ([plain(settings, section) for section in _FOLLOWING] for settings in (cfg, changed))
    if before != after:
        return
    name = "the optimizer's learning rate"
    optimizer = before[0]
    if isinstance(optimizer, dict) and "lr" in optimizer:
        name = f"optimizer.lr={optimizer['lr']}"
    raise RecipeError(
        f"{name} can't be set: a study tunes the learning rate, and all that it tries would train the same; leave "
        "optimizer.lr at ${lr} and set arms.farms.lr, or lr=... in a variant, which the grid has multiples of"
    )


def _check_amounts(cfg: DictConfig) -> None:
    """Refuse a trainer that skips what every run of a study needs."""
    for name, done in _NEEDED.items():
        value = cfg.trainer.get(name)
        if value is not None and value == 0:
            raise RecipeError(
                f"trainer.{name}={value}: every run of a study {done}; set it above 0, or leave it at its default"
            )
    duration = cfg.trainer.get("max_time")
    # Written as days:hours:minutes:seconds, or as a dict of units. Lightning itself refuses any other text.
    if duration is not None and not re.search("[1-9]", str(duration)):
        raise RecipeError(
            f"trainer.max_time={duration}: every run of a study trains; leave it out, and set trainer.max_epochs "
            "to how long"
        )


def _check_processes(cfg: DictConfig) -> None:
    """Refuse a trainer of several processes: a run of a study has one."""
    devices, nodes = plain(cfg.trainer, "devices"), cfg.trainer.get("num_nodes")
    single = len(devices) == 1 if isinstance(devices, list) else devices in _ONE_PROCESS
    if single and nodes in (None, 1):
        return
    raise RecipeError(
        f"trainer.devices={devices} trainer.num_nodes={nodes}: each run of a study is one process on one device; "
        "set trainer.devices=1 trainer.num_nodes=1, and study.workers to how many runs there are at the same time"
    )


def _check_classes(cfg: DictConfig, metric: str) -> None:
    """Refuse a score whose error of blind guessing can't be told: that takes the number of classes."""
    classes = cfg.task.get("out_channels")
    if metric not in ("accuracy", "loss") or (isinstance(classes, int) and classes > 1):
        return
    raise RecipeError(
        f"a study that compares {metric} needs the number of classes, at least 2, for the error of blind "
        f"guessing: set task.out_channels (with + where data of your own have none), got {classes}"
    )


def build_once(cfg: DictConfig) -> dict[str, Any] | None:
    """Build the parts of a run and throw them away; see `recipes.study.programs`."""
    parts = build_parts(cfg)
    make_trainer(cfg, parts)
    return getattr(parts.data, "made_by", None)


def uses_gpu(cfg: DictConfig) -> bool:
    """Return whether a run may train on a GPU."""
    return cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def metric_of(cfg: DictConfig) -> str:
    """Return the name of the score that is compared; one without an error of blind guessing is refused."""
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


def train(cfg: DictConfig, evaluations: int) -> Trained:
    """Train, then validate and test; see `recipes.study.one_run.run_once`."""
    parts = build_parts(cfg)
    ratios, weights = Ratios(parts.balancer), Weights(evaluations)
    trainer, clock = make_trainer(cfg, parts, _OneLoader(), Course(ratios, weights))
    trainer.fit(parts.model, datamodule=parts.data)
    training = {"steps": trainer.global_step, **_times(clock)}
    scores = {epoch: _evaluate(trainer, parts) for epoch in weights.epochs(parts.model, trainer.current_epoch)}
    facts = {
        "blind_error": _blind_error(cfg),
        **training,
        "val_samples": _samples(parts.data, "val"),
        "test_samples": _samples(parts.data, "test"),
        "device": str(trainer.strategy.root_device),
    }
    return Trained(parts.model, ratios, scores, facts)


class _OneLoader(Callback):
    """Looks at the validation data before time is spent; test data may not be there until they are needed."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data with several loaders for validation, or none."""
        _samples(trainer.datamodule, "val")  # type: ignore[attr-defined]


def _samples(data: LightningDataModule, split: str) -> int:
    """Return the number of validation or test samples.

    Refuses data with several loaders of them, or none, where a score has no name or no value.
    """
    loader = getattr(data, f"{split}_dataloader")()
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        raise RecipeError(
            f"{type(data).__name__}.{split}_dataloader must return one DataLoader for a study, which compares one "
            f"score of it, got a {type(loader).__name__}; return the one that decides"
        )
    return len(dataset)


def _evaluate(trainer: Trainer, parts: Parts) -> dict[str, float]:
    """Return the scores of the weights that the model has now, on validation and on test data."""
    validation = trainer.validate(parts.model, datamodule=parts.data, verbose=False)[0]
    test = trainer.test(parts.model, datamodule=parts.data, verbose=False)[0]
    return {**validation, **test}


def _blind_error(cfg: DictConfig) -> float:
    """Return the error of a network that has learnt nothing; see `recipes.study.records.METRICS`."""
    metric = metric_of(cfg)
    if metric == "accuracy":
        return 1.0 - 1.0 / float(cfg.task.out_channels)
    return math.log(cfg.task.out_channels) if metric == "loss" else 1.0


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
