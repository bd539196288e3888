"""The cells of a study, one for each experiment: composed from `conf/`, checked, and kept from changing.

A cell's folder holds `settings.yaml`, what its results depend on, and `results.csv`.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.config import ARMS, check_config
from recipes.errors import RecipeError
from recipes.study.records import Job
from recipes.study.single import assemble, metric_of

__all__ = ["SETTINGS_FILE", "Cell", "Options", "Study", "check_cell", "keep_settings", "load_study"]

SETTINGS_FILE = "settings.yaml"
_OURS = ("seed", "lr", "farms", "ckpt_path")


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
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise RecipeError(f"study.arms must be different ones of {', '.join(ARMS)}, got {list(self.arms)}")
        if self.baseline not in self.arms:
            raise RecipeError(f"study.baseline={self.baseline} is not one of study.arms {list(self.arms)}")
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
    ours = [text for text in overrides if text.lstrip("+~").startswith(("study=", "study."))]
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    rest = [text for text in overrides if text not in ours and not text.startswith("experiment=")]
    for text in rest:
        if text.lstrip("+~").partition("=")[0] in _OURS:
            raise RecipeError(f"{text} can't be set: a study sets {', '.join(_OURS[:3])} for every run itself")
    with initialize_config_dir(config_dir, version_base="1.3"):
        try:
            cfg = compose("study", ours).study
            plain = _plain(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"the study's settings: {error}") from error
        own: dict[str, Any] = plain.pop("cells")
        folder, workers = Path(str(plain.pop("folder"))), plain.pop("workers")
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise RecipeError(f"study.workers must be null or a positive number, got {workers!r}")
        names = chosen[-1].split(",") if chosen else list(own)
        if not names:
            raise RecipeError("say what to study: experiment=<name>[,<name>...], or study=small")
        cells = tuple(_load_cell(name, folder, {**plain, **(own.get(name) or {})}, rest) for name in names)
    twice = sorted({cell.name for cell in cells if [other.name for other in cells].count(cell.name) > 1})
    if twice:
        raise RecipeError(
            f"two experiments have the same name: {', '.join(twice)}; a cell's folder is named by it"
        )
    return Study(cells, folder, workers)


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
            cfg = compose("train", [f"experiment={experiment}", f"farms={arm}", *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"experiment={experiment}: {error}") from error
        check_config(cfg)
        metric_of(cfg)
        if cfg.farms is not None:
            cfg.farms.log = False
        arms[arm] = cfg
    return Cell(cfg.name, folder / cfg.name, options, arms)


def check_cell(cell: Cell) -> None:
    """Build every arm once, and throw it away: a mistake shows before time is spent.

    Raises:
        RecipeError: A part refuses its settings, or two parts do not fit.
    """
    for cfg in cell.arms.values():
        assemble(cfg)


def keep_settings(cell: Cell) -> None:
    """Make the cell's folder and note there what the results depend on, or compare with what is noted.

    Raises:
        RecipeError: The folder can't be written, or holds results of other settings.
    """
    path = cell.folder / SETTINGS_FILE
    now = cell.identity()
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            saved = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(saved, dict)
            _check_same(cell, saved, now)  # type: ignore[arg-type]
            now = {**now, "arms": {**saved["arms"], **now["arms"]}}
        with tempfile.NamedTemporaryFile("w", dir=cell.folder, prefix=".settings-", delete=False) as file:
            part = Path(file.name)
        OmegaConf.save(OmegaConf.create(now), part)
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise RecipeError(
            f"the study's folder can't be written ({error}); choose another with study.folder=..."
        ) from error


def _check_same(cell: Cell, saved: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(saved["study"], "study"), _flat(now["study"], "study")
    for arm in now["arms"]:
        if arm in saved["arms"]:
            old.update(_flat(saved["arms"][arm], arm))
            new.update(_flat(now["arms"][arm], arm))
    changes = [
        f"{name} was {old.get(name, 'not set')} and is {new.get(name, 'not set')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, "not set") != new.get(name, "not set")
    ]
    if changes:
        more = f" (and {len(changes) - 8} more)" if len(changes) > 8 else ""
        raise RecipeError(
            f"the results in {cell.folder} come from other settings: {'; '.join(changes[:8])}{more}. "
            "Go back to those, or choose another study.folder"
        )


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Return nested settings under dotted names."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {name: leaf for key, below in value.items() for name, leaf in _flat(below, f"{path}.{key}").items()}
