"""The cells of a study, one for each experiment, composed from `conf/`.

A cell is composed once for each arm, before anything is trained, so that a mistake in the settings of the last arm
shows at once. What the results of a cell depend on is its `identity`, which `recipes.study.settings` keeps in the
cell's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from recipes.command import sentence
from recipes.config import CONFIG_DIR, plain
from recipes.errors import RecipeError
from recipes.study.options import Options, Resources, did_you_mean, setting_name
from recipes.study.programs import load_program, program_of
from recipes.study.records import Job

__all__ = ["Cell", "Study", "load_study"]

_SET_BY_STUDY = ("seed", "lr", "balancing")
"""Settings of each run that the study decides."""

_NOT_IN_IDENTITY = {
    "": ("paths", "logger", "callbacks", "threads", "ckpt_path", "arms", "seed", "seeds"),
    "data": ("data_dir", "folder", "cache_dir"),
    "trainer": ("default_root_dir",),
    "training": ("output_dir",),
}
"""Settings, by section, that results do not depend on: where files are, who logs what, what each run has of its
own. Under "" are whole sections and what is in none."""


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
        """Return the arm's own learning rate, the one that the grid has multiples of."""
        return float(self.arms[arm].lr)

    def settings(self, job: Job) -> dict[str, Any]:
        """Return all settings of a run, resolved: plain values that can be sent to another process."""
        cfg = self.arms[job.arm].copy()
        if "seed" in cfg.data:  # before the seed, from which an experiment may draw its data
            cfg.data.seed = job.seed if self.options.vary_data else cfg.data.seed
        cfg.seed = job.seed
        cfg.lr = job.lr
        settings: dict[str, Any] = plain(cfg)
        return settings

    def identity(self) -> dict[str, Any]:
        """Return what the results depend on: more seeds and other arms may join, all else must stay.

        Returns:
            Under "study" what decides the choice of learning rates, under "arms" the settings of each arm.
        """
        return {"study": self._tuning(), "arms": {arm: _lasting(cfg) for arm, cfg in self.arms.items()}}

    def fingerprint(self, arm: str) -> str:
        """Return twelve hex digits that stand for the arm's settings; every row of the results has them."""
        text = json.dumps([self._tuning(), _lasting(self.arms[arm])], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _tuning(self) -> dict[str, Any]:
        """Return what decides the choice of learning rates."""
        options = self.options
        tuning = {
            "grid": list(options.grid),
            "tune_seeds": options.tune_seeds,
            "extend": options.extend,
            "vary_data": options.vary_data,
            "evaluations": options.evaluations,
        }
        if options.baseline_grid is not None:  # absent otherwise, as in studies that were begun without it
            tuning["baseline_grid"] = list(options.baseline_grid)
            tuning["baseline"] = options.baseline
        return tuning


@dataclass(frozen=True)
class Study:
    """What was asked for.

    Attributes:
        cells: The cells.
        folder: Where their folders are.
        resources: What the runs run on.
    """

    cells: tuple[Cell, ...]
    folder: Path
    resources: Resources

    @property
    def uses_gpus(self) -> bool:
        """Whether some run may train on a GPU."""
        return any(
            load_program(cell.options.program).uses_gpu(cfg) for cell in self.cells for cfg in cell.arms.values()
        )


def load_study(overrides: Sequence[str]) -> Study:
    """Compose the study and every arm of every cell.

    Args:
        overrides: As on the command line: `study...` is the study's, `experiment=` names the cells, all others go
            to every run.

    Returns:
        The study; nothing is made yet.

    Raises:
        RecipeError: Something is wrong with the settings.
    """
    of_study, experiments, of_runs = _sort_overrides(overrides)
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        settings = _compose_study(of_study)
        folder = settings.pop("folder")
        if folder is None or not str(folder).strip():
            raise RecipeError(f"study.folder must be a path such as runs/study, got {folder!r}")
        folder = Path(str(folder))
        resources = Resources(**{field.name: settings.pop(field.name) for field in fields(Resources)})
        options_by_cell = _cells_of(settings.pop("cells"))
        names = experiments or list(options_by_cell)
        _check_typed_cells(of_study, names)
        if not names:
            raise RecipeError("say what to study: experiment=<name>[,<name>...], or study=small")
        cells = []
        for name in names:
            own = options_by_cell.get(name) or {}
            options = _read_options({**settings, **_without_typed(own, name, of_study)})
            cells.append(_load_cell(name, folder, options, of_runs))
    _check_together(cells)
    return Study(tuple(cells), folder, resources)


def _cells_of(value: Any) -> dict[str, Any]:
    """Return the cells of the study's file, each with the settings that differ for it."""
    cells = value or {}  # the line "cells:" with nothing below it
    if not isinstance(cells, dict):
        raise RecipeError(f"study.cells must be experiments by name such as {{darcy_fno: {{}}}}, got {value!r}")
    for name, own in cells.items():
        if not (own is None or isinstance(own, dict)):
            raise RecipeError(f"study.cells.{name} must be settings by name such as {{seeds: 20}}, got {own!r}")
    return cells


def _check_typed_cells(overrides: Sequence[str], cells: Sequence[str]) -> None:
    """Refuse settings that are typed for a cell that is not studied; a file may have them for others."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        path = override.key_or_group.removeprefix("study.cells")
        if override.is_delete() or path == override.key_or_group:
            continue
        value = override.value()
        typed = [path[1:].partition(".")[0]] if path else list(value if isinstance(value, dict) else ())
        for name in typed:
            if name not in cells:
                raise RecipeError(
                    f"study.cells has settings for {name}, which is none of experiment={','.join(cells)}"
                    f"{did_you_mean(name, cells)}"
                )


def _without_typed(own: Mapping[str, Any], cell: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Leave out a cell's own settings that the command line gives for all cells: what is typed counts."""
    typed = set(map(setting_name, overrides))
    return {
        name: value
        for name, value in own.items()
        if f"study.{name}" not in typed or f"study.cells.{cell}.{name}" in typed
    }


def _sort_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Sort the arguments of the command line; of several `experiment=` the last one counts.

    Returns:
        The study's own settings; the names of the experiments, none where none was named; the settings that go to
        every run.

    Raises:
        RecipeError: A setting is given that the study itself sets for every run.
    """
    of_study: list[str] = []
    experiments: list[str] = []
    of_runs: list[str] = []
    for text in overrides:
        name, _, value = text.lstrip("+~").partition("=")
        if name.partition(".")[0] == "study":
            of_study.append(text)
        elif name == "experiment":
            experiments = value.split(",")
        elif name == "ckpt_path":
            raise RecipeError(f"{text} can't be set: a study starts every run anew; its finished runs are kept")
        elif name in _SET_BY_STUDY:
            raise RecipeError(f"{text} can't be set: a study sets {', '.join(_SET_BY_STUDY)} of every run itself")
        else:
            of_runs.append(text)
    return of_study, experiments, of_runs


def _compose_study(overrides: list[str]) -> dict[str, Any]:
    """Return the settings of `conf/study.yaml` as plain values."""
    try:
        study: dict[str, Any] = plain(compose("study", overrides).study)
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(f"the study's settings: {sentence(error)}") from error
    return study


def _read_options(settings: Mapping[str, Any]) -> Options:
    """Check what is done in a cell; lists, as Hydra gives them, become tuples."""
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise RecipeError(f"unknown settings under study: {', '.join(unknown)}; known are {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in settings.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    if values.get("variants") is None:  # the line "variants:" with nothing below it
        values["variants"] = {}
    return Options(**values)


def _load_cell(experiment: str, folder: Path, options: Options, overrides: Sequence[str]) -> Cell:
    """Compose one experiment with every arm of a cell; `overrides` go to every run."""
    arms = {arm: _compose_arm(experiment, options, arm, overrides) for arm in options.arms}
    baseline = arms[options.baseline]
    has_seed = "seed" in baseline.data
    if options.vary_data is None:
        options = replace(options, vary_data=has_seed)
    if options.vary_data and not has_seed:
        raise RecipeError(
            f"experiment={experiment}: its data have no seed to vary (data.seed); leave study.vary_data out"
        )
    _check_data_seed(options, overrides)
    _check_metrics(experiment, options, arms)
    name = baseline.name
    return Cell(name, folder / name, options, arms)


def _check_data_seed(options: Options, overrides: Sequence[str]) -> None:
    """Refuse a seed of the data, typed or in a variant, that the study would replace by that of each run."""
    if not options.vary_data:
        return
    for text in [*overrides, *chain.from_iterable(map(options.overrides, options.arms))]:
        if setting_name(text) == "data.seed":
            raise RecipeError(
                f"{text} can't be set: each seed of the study has data of its own; leave it out, or set "
                "study.vary_data=false too, by which all seeds have the same data"
            )


def _check_metrics(experiment: str, options: Options, arms: Mapping[str, DictConfig]) -> None:
    """Refuse arms that are scored by different metrics, whose errors can't be compared."""
    program = load_program(options.program)
    metrics = {arm: program.metric_of(cfg) for arm, cfg in arms.items()}
    if len(set(metrics.values())) > 1:
        found = ", ".join(f"{metric} of {arm}" for arm, metric in metrics.items())
        raise RecipeError(
            f"experiment={experiment}: all arms of a cell must have the same metric, got {found}; set it for "
            f"every arm ({program.METRIC_SETTING}=...), not in a variant"
        )


def _compose_arm(experiment: str, options: Options, arm: str, overrides: Sequence[str]) -> DictConfig:
    """Compose and check the settings of an experiment with one arm. The runs of a study log nothing.

    Where the settings of the arm and the overrides set the same, those of the arm count.
    """
    own = options.overrides(arm)
    if "balancing=off" in own:  # it has no callback whose options could be set
        overrides = [text for text in overrides if not text.lstrip("+~").startswith("balancing.")]
    program = load_program(options.program)
    try:
        cfg = compose(options.program, [f"experiment={experiment}", *overrides, *own])
        program.prepare(cfg)
    except (HydraException, OmegaConfBaseException, RecipeError) as error:
        right = program_of(experiment)
        if right not in (None, options.program):
            raise RecipeError(
                f"experiment={experiment} is for python -m recipes.{right}: set study.program={right}, or where a "
                f"study has cells of both programs '+study.cells={{{experiment}:{{program:{right}}}}}'"
            ) from error
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"experiment={experiment}: {sentence(error)}") from error
    if cfg.lr == 0:
        raise RecipeError(
            f"experiment={experiment}: lr=0 of the arm {arm} has no multiples to try; set arms.farms.lr above 0"
        )
    return cfg


def _check_together(cells: Sequence[Cell]) -> None:
    """Refuse cells of one name, which would write into one folder, and of two baselines: no effects to compare."""
    counts = Counter(cell.name for cell in cells)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise RecipeError(
            f"two experiments have the same name: {', '.join(twice)}; a cell's folder is named by it"
        )
    baselines = {cell.options.baseline: cell.name for cell in cells}
    if len(baselines) > 1:
        found = ", ".join(f"{baseline} in {cell}" for baseline, cell in baselines.items())
        raise RecipeError(f"all cells of a study have one baseline, got {found}")


def _lasting(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that results depend on."""
    settings: dict[str, Any] = plain(cfg)
    data = settings["data"]
    if data.get("path"):  # of a file in the folder of all data: that is another one on another machine
        data["path"] = data["path"].removeprefix(f"{settings['paths']['data_dir']}/")
    for section, names in _NOT_IN_IDENTITY.items():
        holder = settings.get(section, {}) if section else settings
        for name in names:
            holder.pop(name, None)
    return settings
