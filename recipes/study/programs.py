"""The programs whose runs a study can compare: `study.program` names the command, `python -m recipes.<program>`.

Each is a module with the functions of `Program`, so that the one that does a run can be sent to another process.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from recipes.config import SECTIONS
from recipes.errors import RecipeError

__all__ = ["PROGRAMS", "Program", "load_program", "program_of"]

PROGRAMS = {"train": "recipes.study.single", "finetune": "recipes.study.finetuning"}
"""The module of each program. A program has the name of its settings in `conf/` and of its command."""


class Program(Protocol):
    """What a study needs of a program."""

    def prepare(self, cfg: DictConfig) -> None:
        """Check the composed settings of an arm without building anything, and let its runs log and keep nothing.

        Raises:
            RecipeError: They can't work, or what they are scored by can't be compared.
        """

    def build_once(self, cfg: DictConfig) -> None:
        """Build the parts of a run and throw them away: a mistake shows before time is spent.

        Raises:
            RecipeError: A part refuses its settings, or two parts do not fit.
        """

    def uses_gpu(self, cfg: DictConfig) -> bool:
        """Return whether a run may train on a GPU."""

    def run_quietly(self, arguments: tuple[dict[str, Any], int]) -> tuple[dict[str, Any], list[str]]:
        """Do a run in a process of an engine: on one thread, with nothing printed.

        Args:
            arguments: All settings of the run, resolved, and the number of epochs whose weights are validated and
                tested.

        Returns:
            The fields of `recipes.study.records.Record` that the run decides, and the callback's warnings.
        """


def load_program(name: str) -> Program:
    """Import a program.

    Args:
        name: One of `PROGRAMS`.

    Raises:
        RecipeError: A package that it needs is not installed.
    """
    try:
        return cast(Program, import_module(PROGRAMS[name]))
    except ImportError as error:
        extra = "recipes" if name == "train" else name
        raise RecipeError(f"study.program={name} needs {error.name}: pip install 'farms-tb[{extra}]'") from error


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
