"""Which values the numbers among the settings can have, checked by name before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.errors import RecipeError

__all__ = ["Range", "check_name", "check_numbers"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting can have.

    Attributes:
        least: The smallest.
        most: The largest.
        whole: Whether it is a whole number.
        null: Whether the setting may be null.
    """

    least: float
    most: float = math.inf
    whole: bool = True
    null: bool = False

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a finite number"
        upper = "" if math.isinf(self.most) else f" and at most {self.most}"
        return f"{'null or ' if self.null else ''}{number} of at least {self.least}{upper}"

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is none of these.

        Args:
            name: The setting, for the message.
            value: Its value.

        Raises:
            RecipeError: The value is out of range or of another type.
        """
        if not self._holds(value):
            raise RecipeError(f"{name} must be {self}, got {value!r}")

    def _holds(self, value: Any) -> bool:
        """Return whether a value is one of these; true and false are no numbers."""
        if value is None:
            return self.null
        kind = Integral if self.whole else Real  # NumPy's, too
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        return is_number and self.least <= value <= self.most and math.isfinite(value)


_SEED = Range(0, 2**32 - 1)
_COUNT = Range(1)
_RANGES = {
    "seed": _SEED,
    "threads": Range(1, null=True),
    "lr": Range(0, whole=False),
    "data.seed": _SEED,
    "data.shuffle_seed": _SEED,
    "data.batch_size": _COUNT,
    "data.num_workers": Range(0),
    "data.image_size": _COUNT,
    "data.train_size": Range(0, null=True),
    "data.val_size": Range(0, null=True),
    "data.test_size": Range(0, null=True),
    "optimizer.lr": Range(0, whole=False),
    "optimizer.momentum": Range(0, whole=False),
    "optimizer.weight_decay": Range(0, whole=False),
    "trainer.max_epochs": Range(-1),
    "trainer.max_steps": Range(-1),
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.check_val_every_n_epoch": Range(1, null=True),
    "trainer.log_every_n_steps": Range(0, null=True),
    "scheduler.T_max": _COUNT,  # most experiments take it from trainer.max_epochs
}


def check_numbers(cfg: DictConfig) -> None:
    """Refuse numbers that no run can work with; a setting that an experiment does not have is left alone.

    Args:
        cfg: The composed settings, every reference resolvable.

    Raises:
        RecipeError: A value is no such number; the message names the setting.
    """
    for name, numbers in _RANGES.items():
        section, _, key = name.rpartition(".")
        holder: Any = OmegaConf.select(cfg, section) if section else cfg
        if OmegaConf.is_dict(holder) and key in holder:
            numbers.check(name, holder[key])


def check_name(name: Any) -> None:
    """Refuse a name of an experiment that is no path of folders below another one.

    Args:
        name: The setting `name`.

    Raises:
        RecipeError: It is empty, absolute, leads out of the folder, or is no string.
    """
    if isinstance(name, str) and name.strip():
        path = PurePath(name)
        if path.parts and not path.is_absolute() and ".." not in path.parts:
            return
    raise RecipeError(f"name must be that of a folder, such as darcy or images/resnet18, got {name!r}")
