"""The cells of a study, one for each experiment, composed from `conf/`.

A cell is composed once for each arm, before anything is trained, so that a mistake in the settings of the last arm
shows at once. What the results of a cell depend on is its `identity`, which `recipes.study.settings` keeps in the
cell's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from recipes.command import sentence
from recipes.config import ARMS, CONFIG_DIR, plain
from recipes.errors import RecipeError
from recipes.study.programs import PROGRAMS, load_program, program_of
from recipes.study.records import Job
from recipes.values import Range

__all__ = ["Cell", "Options", "Resources", "Study", "load_study"]

ENGINES = ("local", "ray")

_SET_BY_STUDY = ("seed", "lr", "balancing")
"""Settings of each run that the study decides."""

_NOT_OF_AN_ARM = {
    "seed": "all arms have the same seeds, 1, 2, 3, ...; leave it out",
    "ckpt_path": "a study starts every run anew; leave it out",
}
"""Settings that a variant can't have, and why not."""

_NOT_IN_IDENTITY = ("paths", "logger", "callbacks", "threads", "ckpt_path", "arms", "seed", "seeds")
"""Sections that results do not depend on: where files are, who logs what, and what each run has of its own."""

_FOLDERS = (
    *("data.data_dir", "data.folder", "data.cache_dir"),
    *("trainer.default_root_dir", "training.output_dir"),
)


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
        Range(1).check("study.evaluations", self.evaluations)
        Range(1).check("study.seeds", self.seeds)
        Range(1).check("study.tune_seeds", self.tune_seeds)
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
                reason = _NOT_OF_AN_ARM.get(_name(text))
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
                raise RecipeError(f"study.arms: there is no arm {arm!r}{_nearest(arm, known)}")
        if len(set(self.arms)) < len(self.arms):
            raise RecipeError(f"study.arms must be different ones, got {list(self.arms)}")
        if self.baseline not in self.arms:
            raise RecipeError(f"study.baseline={self.baseline} is not one of study.arms {list(self.arms)}")


def _name(override: Any) -> str:
    """Return the name of the setting in an argument of the command line, such as `+lr=0.1`."""
    return str(override).lstrip("+~").partition("=")[0]


def _check_name(where: str, name: Any) -> None:
    """Refuse an arm's name that is no text: the results would not be found under it again.

    Args:
        where: The setting that it stands in, for the message.
        name: The name.
    """
    if not isinstance(name, str) or not name.strip():
        raise RecipeError(
            f'{where}: the name of an arm must be text, got {name!r}; write it in quotes, as in "off"'
        )


def _nearest(name: Any, known: Sequence[str]) -> str:
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
class Resources:
    """What the runs of a study run on; `conf/study.yaml` explains each.

    Attributes:
        engine: `"local"` or `"ray"`.
        workers: Most runs at the same time; None for as many as there is room for.
        address: That of the Ray cluster; None for `RAY_ADDRESS`, or one that is started on this machine.
        gpus_per_run: GPUs, or the share of one, that a run has; None for no share in particular.
        minutes: After so many no run is begun any more; None for no limit.
    """

    engine: str = "local"
    workers: int | None = None
    address: str | None = None
    gpus_per_run: float | None = None
    minutes: float | None = None

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
        folder = _folder(settings.pop("folder"))
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
    _check_names(cells)
    _check_baselines(cells)
    return Study(tuple(cells), folder, resources)


def _folder(value: Any) -> Path:
    """Return the folder of the study.

    Raises:
        RecipeError: The value is no path.
    """
    if value is None or not str(value).strip():
        raise RecipeError(f"study.folder must be a path such as runs/study, got {value!r}")
    return Path(str(value))


def _cells_of(value: Any) -> dict[str, Any]:
    """Return the cells of the study's file, each with the settings that differ for it.

    Raises:
        RecipeError: Those of a cell are not settings by name.
    """
    cells: dict[str, Any] = value or {}  # the line "cells:" with nothing below it
    for name, own in cells.items():
        if not (own is None or isinstance(own, dict)):
            raise RecipeError(f"study.cells.{name} must be settings by name such as {{seeds: 20}}, got {own!r}")
    return cells


def _check_typed_cells(overrides: Sequence[str], cells: Sequence[str]) -> None:
    """Refuse settings that are typed for a cell that is not studied; a file may have them for others.

    Args:
        overrides: The study's part of the command line.
        cells: The experiments that are studied.

    Raises:
        RecipeError: There is no such cell.
    """
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
                    f"{_nearest(name, cells)}"
                )


def _check_baselines(cells: Sequence[Cell]) -> None:
    """Refuse cells with different baselines: their effects have no common meaning.

    Raises:
        RecipeError: Two cells have different baselines.
    """
    baselines = {cell.options.baseline: cell.name for cell in cells}
    if len(baselines) > 1:
        found = ", ".join(f"{baseline} in {cell}" for baseline, cell in baselines.items())
        raise RecipeError(f"all cells of a study have one baseline, got {found}")


def _without_typed(own: Mapping[str, Any], cell: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Leave out a cell's own settings that the command line gives for all cells: what is typed counts.

    Args:
        own: The settings that differ for the cell, from the study's file or the command line.
        cell: Its experiment.
        overrides: The study's part of the command line.
    """
    typed = set(map(_name, overrides))
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
    """Check what is done in a cell.

    Args:
        settings: By name, as Hydra gives them; lists become tuples.

    Raises:
        RecipeError: A setting is unknown, or has a value that it can't have.
    """
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise RecipeError(f"unknown settings under study: {', '.join(unknown)}; known are {', '.join(known)}")
    values: dict[str, Any] = dict(settings)
    for name, value in settings.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    if values.get("variants") is None:  # the line "variants:" with nothing below it
        values["variants"] = {}
    return Options(**values)


def _load_cell(experiment: str, folder: Path, options: Options, overrides: Sequence[str]) -> Cell:
    """Compose one experiment with every arm of a cell.

    Args:
        experiment: The experiment's file in `conf/experiment`, without its ending.
        folder: Where the folders of the cells are.
        options: What is done in the cell.
        overrides: Settings that go to every run.
    """
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
    """Refuse a seed of the data that the study would replace by that of each run.

    Args:
        options: What is done in the cell, `vary_data` decided.
        overrides: Settings that go to every run.

    Raises:
        RecipeError: It is given, on the command line or in a variant.
    """
    if not options.vary_data:
        return
    for text in [*overrides, *chain.from_iterable(map(options.overrides, options.arms))]:
        if _name(text) == "data.seed":
            raise RecipeError(
                f"{text} can't be set: each seed of the study has data of its own; leave it out, or set "
                "study.vary_data=false too, by which all seeds have the same data"
            )


def _check_metrics(experiment: str, options: Options, arms: Mapping[str, DictConfig]) -> None:
    """Refuse arms that are scored by different metrics, whose errors can't be compared.

    Args:
        experiment: The experiment, for the message.
        options: What is done in the cell.
        arms: Settings of each arm.

    Raises:
        RecipeError: Two arms have different ones.
    """
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

    Args:
        experiment: The experiment's file in `conf/experiment`, without its ending.
        options: What is done in the cell.
        arm: The arm; where its settings and the overrides set the same, they count and not the overrides.
        overrides: Settings that go to every run.

    Raises:
        RecipeError: They do not compose, can't work, or are for another program.
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


def _check_names(cells: Sequence[Cell]) -> None:
    """Refuse cells of one name, which would write into one folder."""
    counts = Counter(cell.name for cell in cells)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise RecipeError(
            f"two experiments have the same name: {', '.join(twice)}; a cell's folder is named by it"
        )


def _lasting(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that results depend on: not where files are, nor who logs what."""
    settings: dict[str, Any] = plain(cfg)
    data = settings["data"]
    if data.get("path"):  # of a file in the folder of all data: that is another one on another machine
        data["path"] = data["path"].removeprefix(f"{settings['paths']['data_dir']}/")
    for section in _NOT_IN_IDENTITY:
        settings.pop(section, None)
    for path in _FOLDERS:
        section, _, name = path.partition(".")
        settings.get(section, {}).pop(name, None)
    return settings
