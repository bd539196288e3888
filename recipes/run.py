"""The parts of one training run: built from the settings, checked against the checkpoint that it resumes from."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from recipes.callbacks import EpochOrder, LastCheckpoint, LastStepRates
from recipes.config import build
from recipes.errors import RecipeError
from recipes.parts import build_parts
from recipes.processes import check_processes

__all__ = ["Run", "build_run", "check_archive", "check_weights", "read_checkpoint"]

_NEEDED = ("state_dict", "global_step", "epoch", "optimizer_states", "loops")


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        data: The data.
        model: The task with its network.
        last: Rates of the last step.
        checkpoint: Keeper of the best weights.
        trainer: The trainer, with callbacks and loggers.
    """

    data: LightningDataModule
    model: LightningModule
    last: LastStepRates
    checkpoint: ModelCheckpoint
    trainer: Trainer


def build_run(cfg: DictConfig) -> Run:
    """Build every part; none of them makes or loads data yet.

    The balancing callback stands first among the callbacks: those that monitor its metrics find them up to date.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: A part refuses its settings, or two parts do not fit.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    parts = build_parts(cfg)
    last = LastStepRates(parts.balancer)
    configured: list[Callback] = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks]
    best = _best_checkpoint(configured)
    callbacks = [last, EpochOrder(), *configured]
    if parts.balancer is not None:
        callbacks.insert(0, parts.balancer)
    loggers = [build(cfg, f"logger.{name}") for name in cfg.logger]
    trainer = build(cfg, "trainer", callbacks=callbacks, logger=loggers)
    check_processes(trainer)
    return Run(parts.data, parts.model, last, best, trainer)


def _best_checkpoint(callbacks: list[Callback]) -> ModelCheckpoint:
    """Return the keeper of the weights that are tested, the only one that is not for resuming."""
    kept = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    best = [callback for callback in kept if not isinstance(callback, LastCheckpoint)]
    if len(best) != 1:
        raise RecipeError(f"callbacks needs exactly one ModelCheckpoint, got {len(best)}")
    return best[0]


def check_archive(path: str | Path) -> None:
    """Check that a file of `torch.save` is whole and matches its checksums, which torch does not look at.

    Args:
        path: The file.

    Raises:
        OSError: It can't be read.
        zipfile.BadZipFile: It is damaged.
    """
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile(f"{Path(path).name} is cut short, or was never one")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"in {Path(path).name}, {damaged} does not match its checksum")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint; its tensors stay on the disk until they are used.

    Args:
        path: The checkpoint. Nothing in it is executed: it may hold tensors and plain values alone.

    Returns:
        What Lightning saved, by its names; all that resuming needs is there.

    Raises:
        RecipeError: The file can't be read, or is no checkpoint of a training run.
    """
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise RecipeError(
            f"ckpt_path={path} can't be read as a checkpoint ({reason}); take another one, such as "
            "checkpoints/best.ckpt of the same run, or start anew without ckpt_path"
        ) from error
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        raise RecipeError(
            f"ckpt_path={path} is no checkpoint of a training run: it lacks {', '.join(missing)}; a run keeps its "
            "own in checkpoints/last.ckpt"
        )
    return dict(checkpoint)


def check_weights(model: LightningModule, checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse to resume from the weights of another network.

    Args:
        model: The model that is trained.
        checkpoint: The checkpoint.
        path: Where it lies, for the message.

    Raises:
        RecipeError: Names or shapes of the weights differ.
    """
    saved = _shapes(checkpoint["state_dict"])
    own = _shapes(model.state_dict())
    differ = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    if not differ:
        return
    name = differ[0]
    raise RecipeError(
        f"ckpt_path={path} is of another network: {len(differ)} of its weights differ, such as {name}, "
        f"{saved.get(name, 'missing')} there and {own.get(name, 'missing')} here; repeat the run's overrides"
    )


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a network's state, which may also hold other things."""
    shapes = {}
    for name, value in state_dict.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = tuple(value.shape)
    return shapes
