"""The programs whose runs a study can compare: `study.program` names the command, `python -m recipes.<program>`.

Each is a module with the functions that a study needs of it. `cfg` are the composed settings of an arm; those that
can't work are refused with a `RecipeError`.

- `prepare(cfg)` checks them without building anything, and lets the arm's runs log and keep nothing;
- `build_once(cfg)` builds the parts of a run and throws them away: a mistake shows before time is spent. Returns
  what the data file says of how it was made, None for other data;
- `uses_gpu(cfg)` says whether a run may train on a GPU;
- `metric_of(cfg)` names the score that is compared, by the setting `METRIC_SETTING`;
- `train(cfg, evaluations)` trains and scores one run, see `recipes.study.one_run`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from farms_tb.missing import cannot_import
from recipes.config import SECTIONS
from recipes.errors import RecipeError

__all__ = ["PROGRAMS", "load_program", "program_of"]

PROGRAMS = {"train": "recipes.study.training", "finetune": "recipes.study.finetuning"}
"""The module of each program. A program has the name of its settings in `conf/` and of its command."""


def load_program(name: str) -> ModuleType:
    """Import a program.

    Args:
        name: One of `PROGRAMS`.

    Raises:
        RecipeError: A package that it needs is not installed.
    """
    try:
        return import_module(PROGRAMS[name])
    except ImportError as error:
        extra = "recipes" if name == "train" else name
        remedy = f"pip install 'farms-tb[{extra}]'"
        raise RecipeError(cannot_import(f"study.program={name}", error, remedy)) from error


def program_of(experiment: str) -> str | None:
    """Return the program that an experiment is for; None where there is no such experiment, or it is for another.

    Hydra has to be initialised.

    Args:
        experiment: The experiment's file in `conf/experiment`, without its ending.
    """
    try:
        cfg = compose("train", [f"experiment={experiment}"])
    except (HydraException, OmegaConfBaseException):
        return None
    if "training" in cfg:
        return "finetune"
    return "train" if set(map(str, cfg)) <= set(SECTIONS) else None
