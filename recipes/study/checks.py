"""Settings of `python -m recipes.train` that a study refuses: its runs would have no scores, or mean nothing."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.errors import RecipeError

__all__ = ["check_for_study"]

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


def check_for_study(cfg: DictConfig, metric: str) -> None:
    """Refuse settings that work alone, and not in a study.

    Args:
        cfg: The composed settings of an arm, every reference resolvable.
        metric: The score that is compared.

    Raises:
        RecipeError: The learning rate stays as it is when the study changes `lr`, a run would not train or have no
            score, it would need several processes, or nothing says what a network scores that has learnt nothing.
    """
    _check_rate(cfg)
    _check_amounts(cfg)
    _check_processes(cfg)
    _check_classes(cfg, metric)


def _check_rate(cfg: DictConfig) -> None:
    """Refuse a learning rate that is no function of `lr`, by which a study sets those that it tries."""
    changed = cfg.copy()
    changed.lr = _PROBE
    before, after = ([_plain(settings, section) for section in _FOLLOWING] for settings in (cfg, changed))
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


def _plain(cfg: DictConfig, section: str) -> Any:
    """Return a section as plain values, references resolved."""
    value = cfg[section]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


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
    devices, nodes = (
        _plain(cfg.trainer, "devices") if "devices" in cfg.trainer else None,
        cfg.trainer.get("num_nodes"),
    )
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
