"""The settings of `conf/study.yaml`, checked: what is done in each cell of a study, and what its runs run on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from recipes.config import ARMS
from recipes.errors import RecipeError
from recipes.study.programs import PROGRAMS
from recipes.values import Range

__all__ = ["Options", "Resources", "did_you_mean", "setting_name"]

ENGINES = ("local", "ray")

_NOT_OF_AN_ARM = {
    "seed": "all arms have the same seeds, 1, 2, 3, ...; leave it out",
    "ckpt_path": "a study starts every run anew; leave it out",
}
"""Settings that a variant can't have, and why not."""


@dataclass(frozen=True)
class Options:
    """What is done in a cell; `conf/study.yaml` explains each.

    Attributes:
        program: The command that trains each run, `"train"` or `"finetune"`.
        arms: The arms: names of `conf/balancing`, or of `variants`.
        variants: Arms of the study's own by name, each as the settings that it differs by from the arm `off`.
        baseline: The arm that the others are compared with.
        seeds: Final runs of each arm.
        grid: Multiples of an arm's learning rate to try, ascending.
        baseline_grid: Those of the baseline; None for the same as the arms.
        tune_seeds: Runs for each of them.
        extend: How often the grid may grow at each end.
        vary_data: Whether each seed has a data split of its own; None where the data have a seed to draw it by.
        evaluations: Epochs, evenly spaced and the last among them, whose weights are validated and tested.
    """

    program: str
    arms: tuple[str, ...]
    variants: Mapping[str, Sequence[str]]
    baseline: str
    seeds: int
    grid: tuple[float, ...]
    baseline_grid: tuple[float, ...] | None
    tune_seeds: int
    extend: int
    vary_data: bool | None
    evaluations: int

    def __post_init__(self) -> None:
        if self.program not in PROGRAMS:
            raise RecipeError(f"study.program must be one of {', '.join(PROGRAMS)}, got {self.program!r}")
        self._check_variants()
        self._check_arms()
        for name in ("evaluations", "seeds", "tune_seeds"):
            Range(1).check(f"study.{name}", getattr(self, name))
        Range(0).check("study.extend", self.extend)
        _check_grid("grid", self.grid)
        if self.baseline_grid is not None:
            _check_grid("baseline_grid", self.baseline_grid)
        if not (self.vary_data is None or isinstance(self.vary_data, bool)):
            raise RecipeError(f"study.vary_data must be true, false or null, got {self.vary_data!r}")

    def grid_of(self, arm: str) -> tuple[float, ...]:
        """Return the multiples of an arm's learning rate to try."""
        if arm == self.baseline and self.baseline_grid is not None:
            return self.baseline_grid
        return self.grid

    def overrides(self, arm: str) -> list[str]:
        """Return the settings that make an arm, `balancing=...` first."""
        if arm not in self.variants:
            return [f"balancing={arm}"]
        own = list(self.variants[arm])
        chooses_balancing = any(text.startswith("balancing=") for text in own)
        return own if chooses_balancing else ["balancing=off", *own]

    def _check_variants(self) -> None:
        """Refuse variants that are no lists of settings that an arm can have, or take the name of another arm."""
        if not isinstance(self.variants, Mapping):
            raise RecipeError(
                "study.variants must be arms by name such as {slow: [balancing=farms,balancing.lr_max_ratio=1]}, "
                f"got {self.variants!r}"
            )
        for name, settings in self.variants.items():
            _check_name("study.variants", name)
            if name in ARMS:
                raise RecipeError(f"study.variants.{name} is the name of an arm already; choose another one")
            if not isinstance(settings, list) or not all("=" in str(text) for text in settings):
                raise RecipeError(
                    f"study.variants.{name} must be a list of settings such as [balancing=farms,"
                    f"balancing.favor=small_alpha], got {settings}"
                )
            for text in settings:
                reason = _NOT_OF_AN_ARM.get(setting_name(text))
                if reason is not None:
                    raise RecipeError(f"study.variants.{name}: {text} can't be set: {reason}")

    def _check_arms(self) -> None:
        """Refuse arms that are unknown or named twice, and a baseline that is none of them."""
        known = [*ARMS, *self.variants]
        if not isinstance(self.arms, tuple) or not self.arms:
            raise RecipeError(f'study.arms must be a list such as ["off",farms], got {self.arms!r}')
        for arm in self.arms:
            _check_name("study.arms", arm)
            if arm not in known:
                raise RecipeError(f"study.arms: there is no arm {arm!r}{did_you_mean(arm, known)}")
        if len(set(self.arms)) < len(self.arms):
            raise RecipeError(f"study.arms must be different ones, got {list(self.arms)}")
        if self.baseline not in self.arms:
            raise RecipeError(f"study.baseline={self.baseline} is not one of study.arms {list(self.arms)}")


@dataclass(frozen=True)
class Resources:
    """What the runs of a study run on; `conf/study.yaml` explains each.

    Attributes:
        engine: `"local"` or `"ray"`.
        workers: Most runs at the same time; None for as many as there is room for.
        address: That of the Ray cluster; None for `RAY_ADDRESS`, or one that is started on this machine.
        gpus_per_run: GPUs, or the share of one, that a run has; None for no share in particular.
        minutes: After so many no run is begun any more; None for no limit.
    """

    engine: str
    workers: int | None
    address: str | None
    gpus_per_run: float | None
    minutes: float | None

    def __post_init__(self) -> None:
        Range(1, null=True).check("study.workers", self.workers)
        if self.engine not in ENGINES:
            raise RecipeError(f"study.engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        for name in ("gpus_per_run", "minutes"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise RecipeError(f"study.{name} must be a number above 0, got {value!r}")
        if self.engine == "local" and self.address is not None:
            raise RecipeError("study.address is that of a Ray cluster: it needs study.engine=ray")


def setting_name(override: Any) -> str:
    """Return the name of the setting in an argument of the command line, such as `+lr=0.1`."""
    return str(override).lstrip("+~").partition("=")[0]


def _check_name(where: str, name: Any) -> None:
    """Refuse an arm's name that is no text: the results would not be found under it again."""
    if not isinstance(name, str) or not name.strip():
        raise RecipeError(
            f'{where}: the name of an arm must be text, got {name!r}; write it in quotes, as in "off"'
        )


def did_you_mean(name: Any, known: Sequence[str]) -> str:
    """Return what may have been meant by an unknown name, as the end of a sentence; else all known names."""
    nearest = get_close_matches(str(name), known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"


def _check_grid(name: str, grid: Any) -> None:
    """Refuse a grid that is no list of positive numbers, is empty, or does not ascend."""
    if isinstance(grid, tuple) and grid and all(map(_is_positive, grid)) and list(grid) == sorted(set(grid)):
        return
    got = list(grid) if isinstance(grid, tuple) else grid
    raise RecipeError(
        f"study.{name} must be a list of positive multiples in ascending order, such as [0.5,1,2], got {got}"
    )


def _is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
