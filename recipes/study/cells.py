"""The cells of a study, one for each experiment, composed from `conf/`."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.command import sentence
from recipes.config import ARMS, check_config
from recipes.errors import RecipeError
from recipes.study.records import Job
from recipes.study.single import metric_of

__all__ = ["Cell", "Options", "Study", "load_study"]

_OURS = ("seed", "lr", "balancing", "ckpt_path")


@dataclass(frozen=True)
class Options:
    """What is done in a cell; `conf/study.yaml` explains each.

    Attributes:
        arms: The arms.
        baseline: The arm that the others are compared with.
        seeds: Final runs of each arm.
        grid: Multiples of an arm's learning rate to try, ascending.
        tune_seeds: Runs for each of them.
        extend: How often the grid may grow at each end.
        vary_data: Whether each seed has a data split of its own.
    """

    arms: tuple[str, ...]
    baseline: str
    seeds: int
    grid: tuple[float, ...]
    tune_seeds: int
    extend: int
    vary_data: bool

    def __post_init__(self) -> None:
        self._check_arms()
        self._check_numbers()

    def _check_arms(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise RecipeError(f"study.arms must be different ones of {', '.join(ARMS)}, got {list(self.arms)}")
        if self.baseline not in self.arms:
            raise RecipeError(f"study.baseline={self.baseline} is not one of study.arms {list(self.arms)}")

    def _check_numbers(self) -> None:
        for name, least in (("seeds", 1), ("tune_seeds", 1), ("extend", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"study.{name} must be a whole number of at least {least}, got {value!r}")
        numbers = all(isinstance(m, int | float) and math.isfinite(m) and m > 0 for m in self.grid)
        if not self.grid or not numbers or list(self.grid) != sorted(set(self.grid)):
            raise RecipeError(f"study.grid must be positive multiples in ascending order, got {list(self.grid)}")
        if not isinstance(self.vary_data, bool):
            raise RecipeError(f"study.vary_data must be true or false, got {self.vary_data!r}")


@dataclass(frozen=True)
class Cell:
    """One experiment of a study.

    Attributes:
        name: Its name, the experiment's `name`.
        folder: Its folder.
        options: What is done.
        arms: Settings of each arm.
    """

    name: str
    folder: Path
    options: Options
    arms: Mapping[str, DictConfig]

    def lr(self, arm: str) -> float:
        """Return the arm's own learning rate."""
        return float(self.arms[arm].lr)

    def settings(self, job: Job) -> dict[str, Any]:
        """Return all settings of a run, resolved."""
        cfg = self.arms[job.arm].copy()
        cfg.seed, cfg.lr = job.seed, job.lr
        if self.options.vary_data:
            cfg.data.seed = job.seed
        return _plain(cfg)

    def identity(self) -> dict[str, Any]:
        """Return what the results depend on: more seeds and other arms may join, all else must stay."""
        tuning = {name: getattr(self.options, name) for name in ("grid", "tune_seeds", "extend", "vary_data")}
        arms = {arm: _lasting(cfg) for arm, cfg in self.arms.items()}
        return {"study": {**tuning, "grid": list(self.options.grid)}, "arms": arms}

    def fingerprint(self, arm: str) -> str:
        """Return twelve hex digits that stand for the arm's settings."""
        identity = self.identity()
        text = json.dumps([identity["study"], identity["arms"][arm]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Study:
    """What was asked for.

    Attributes:
        cells: The cells.
        folder: Where their folders are.
        workers: Number of processes; None for one a core.
    """

    cells: tuple[Cell, ...]
    folder: Path
    workers: int | None


def _plain(cfg: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _lasting(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that results depend on: not where files are, nor who logs what."""
    plain = _plain(cfg)
    for section in ("paths", "logger", "callbacks", "threads", "ckpt_path", "arms", "seed", "seeds"):
        plain.pop(section, None)
    plain["data"].pop("data_dir", None)
    plain["trainer"].pop("default_root_dir", None)
    return plain


def load_study(config_dir: str, overrides: Sequence[str]) -> Study:
    """Compose the study and every arm of every cell.

    Args:
        config_dir: The folder `conf/`.
        overrides: As on the command line: `study...` is the study's, `experiment=` names the cells, all others go
            to every run.

    Returns:
        The study; nothing is made yet.

    Raises:
        RecipeError: Something is wrong with the settings.
    """
    ours, experiments, rest = _sort_overrides(overrides)
    with initialize_config_dir(config_dir, version_base="1.3"):
        try:
            plain = _plain(compose("study", ours).study)
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"the study's settings: {sentence(error)}") from error
        own: dict[str, Any] = plain.pop("cells")
        folder, workers = Path(str(plain.pop("folder"))), plain.pop("workers")
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise RecipeError(f"study.workers must be null or a positive number, got {workers!r}")
        names = experiments or list(own)
        if not names:
            raise RecipeError("say what to study: experiment=<name>[,<name>...], or study=small")
        cells = tuple(_load_cell(name, folder, {**plain, **(own.get(name) or {})}, rest) for name in names)
    twice = sorted(name for name, count in Counter(cell.name for cell in cells).items() if count > 1)
    if twice:
        raise RecipeError(
            f"two experiments have the same name: {', '.join(twice)}; a cell's folder is named by it"
        )
    return Study(cells, folder, workers)


def _sort_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the study's own settings, the names of the experiments, and the settings that go to every run.

    Raises:
        RecipeError: One of the latter is set by the study itself.
    """
    ours, experiments, rest = [], [], []
    for text in overrides:
        name, _, value = text.lstrip("+~").partition("=")
        if name.partition(".")[0] == "study":
            ours.append(text)
        elif name == "experiment":
            experiments = value.split(",")
        elif name in _OURS:
            raise RecipeError(f"{text} can't be set: a study sets {', '.join(_OURS[:3])} for every run itself")
        else:
            rest.append(text)
    return ours, experiments, rest


def _load_cell(experiment: str, folder: Path, plain: Mapping[str, Any], overrides: Sequence[str]) -> Cell:
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(plain) - set(known))
    if unknown:
        raise RecipeError(f"unknown settings under study: {', '.join(unknown)}; known are {', '.join(known)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
    }
    options = Options(**values)
    arms = {}
    for arm in options.arms:
        try:
            cfg = compose("train", [f"experiment={experiment}", f"balancing={arm}", *_those_of(arm, overrides)])
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"experiment={experiment}: {sentence(error)}") from error
        check_config(cfg)
        metric_of(cfg)
        if "log" in cfg.balancing:
            cfg.balancing.log = False
        arms[arm] = cfg
    return Cell(cfg.name, folder / cfg.name, options, arms)


def _those_of(arm: str, overrides: Sequence[str]) -> list[str]:
    """Leave out the options of the callback for the arm that has none."""
    return [text for text in overrides if arm != "off" or not text.lstrip("+~").startswith("balancing.")]
