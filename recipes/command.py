"""What every command of the recipes does around its work: mistakes of the user end in one sentence.

The exit status is 2 for such a mistake and 130 after Ctrl-C. Anything else is a fault of the program and keeps its
traceback. With RECIPES_FULL_ERROR=1 or HYDRA_FULL_ERROR=1 in the environment every error does.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOWrapper

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape

from farms_tb.missing import missing_package
from recipes.console import make_console
from recipes.errors import RecipeError
from recipes.extras import extra_of

__all__ = ["hand_over_hydras_errors", "hydra_run", "sentence", "show_errors", "user_errors"]

FULL_ERROR = "RECIPES_FULL_ERROR"
_SETUP = ("setup", "on_train_start", "on_train_begin")
"""Hooks of both trainers in which the callback refuses what can't work."""

_NOISE = ("full_key:", "object_type=", "reference_type=", "Config search path:", "provider=", "_")
"""Starts of lines in messages of Hydra and OmegaConf that say nothing to users: classes, paths, shared files."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn mistakes of the user into one printed sentence and exit status 2, and Ctrl-C into status 130.

    Characters that the terminal does not know, as those of a progress bar, are replaced instead of ending the run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as error:  # Lightning's trainer exits with status 1 after Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    except Exception as error:
        message = _wanted_sentence(error)
        if message is None:
            raise
        show_errors(message)
        raise SystemExit(2) from None


@contextmanager
def hydra_run() -> Iterator[None]:
    """Do what `user_errors` does, for the function that Hydra calls once, or for each run of a sweep.

    In a sweep relative paths are those of the folder in which it was started; Ray's processes begin in another.
    A mistake is raised as a `RecipeError`, which the launcher brings from the process of the run to that of the
    sweep, where Hydra names the run and `user_errors` prints the sentence. The original error would arrive without
    its traceback, by which `sentence` knows a mistake in the balancing options.
    """
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        with user_errors():
            yield
        return
    try:
        if not settings.job.chdir:
            os.chdir(settings.runtime.cwd)
        yield
    except Exception as error:
        message = _wanted_sentence(error)
        if message is None:
            raise
        raise RecipeError(message) from None


def _wanted_sentence(error: Exception) -> str | None:
    """Return what to print in place of the traceback; None where the traceback is wanted."""
    if os.environ.get(FULL_ERROR, "0") != "0":
        return None
    return sentence(error)


def show_errors(message: str) -> None:
    """Print an error to the standard error stream, in one line however wide the terminal is."""
    make_console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)


def hand_over_hydras_errors() -> None:
    """Let Hydra raise its errors instead of printing them itself with exit status 1."""
    os.environ.setdefault(FULL_ERROR, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The file and the plugin have the same name, and Hydra 1.3 checks the one by the other, as it should.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")


def sentence(error: BaseException) -> str | None:
    """Return what to tell the user about a mistake of theirs; None for a fault of the program.

    Args:
        error: Any exception. Mistakes of the user are a `RecipeError`, an error of Hydra or OmegaConf about the
            settings, of Lightning about the trainer's, of the balancing callback before the first step, and of
            the operating system about a file.

    Returns:
        A sentence in one line.
    """
    for kinds, describe in ((_refused_by_lightning(), _trainer_error), *_MISTAKES):
        if isinstance(error, kinds):
            return describe(error)
    return None


def _one_line(text: str) -> str:
    """Join the lines of a message, without those that say nothing to users."""
    lines = map(str.strip, text.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(_NOISE))


def _settings_error(error: BaseException) -> str:
    """Put an error of Hydra and the one that caused it in one line; name the way out for the group's old name."""
    text = _one_line(str(error))
    cause = _one_line(str(error.__cause__ or ""))
    if cause not in text:
        text = f"{text} ({cause})"
    if "'farms'" in text or "farms/" in text:
        text += ". The config group farms is called balancing now: balancing=..., override /balancing: ..."
    if "hydra/launcher" in text:
        text += ". Launchers come with pip install 'farms-tb[launchers,cluster]'"
    return text + _nearest_key(error.__cause__)


def _nearest_key(error: BaseException | None) -> str:
    """Return which setting may have been meant by one that is not there, as the end of a sentence."""
    parent = getattr(error, "parent_node", None)
    if not isinstance(error, OmegaConfBaseException) or not isinstance(parent, DictConfig):
        return ""
    nearest = get_close_matches(str(error.key), map(str, parent), n=1)
    if not nearest or str(error.key) in parent:
        return ""
    path = str(error.full_key).removesuffix(str(error.key))
    return f". Did you mean {path}{nearest[0]}?"


def _refused_by_lightning() -> tuple[type[BaseException], ...]:
    """Return the kind of error with which Lightning refuses settings; none where Lightning was never imported.

    To import it takes four seconds, and `recipes.generate` needs nothing else of it.
    """
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if exceptions is None else (exceptions.MisconfigurationException,)


def _trainer_error(error: BaseException) -> str:
    """Return Lightning's reason for refusing the trainer's settings."""
    return f"trainer: {_one_line(str(error))}"


def _value_error(error: BaseException) -> str | None:
    """Return the reason of the balancing callback, or of Hydra; None where neither of them refused something."""
    if _raised_at_setup(error):
        return f"balancing: {error}"
    raised_in = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    if raised_in and raised_in[0].startswith("hydra."):  # balancing=null, say
        return f"the settings: {_one_line(str(error))}"
    return None


def _import_error(error: BaseException) -> str | None:
    """Return what to install for a package that is missing; None for a fault in an import of the recipes' own."""
    package = missing_package(error)
    if package in ("", "recipes", "farms_tb"):
        return None
    extra = extra_of(error)
    if not extra:
        return f"the package {package} is missing: install it"
    return f"the package {package} is missing: pip install --editable '.[{extra}]' brings it"


def _wandb_error(error: BaseException) -> str | None:
    """Return what to do where W&B refuses or can't be reached; None for another error."""
    if not type(error).__module__.startswith("wandb.errors"):
        return None
    return f"W&B: {_one_line(str(error))}. logger.wandb.offline=true needs no network; `wandb sync` uploads later"


def _plugin_error(error: BaseException) -> str | None:
    """Return what to install for a launcher that Hydra does not find; None for another error."""
    if not str(error).startswith("Unknown plugin class"):
        return None
    return f"hydra/launcher: {_one_line(str(error))}: pip install 'farms-tb[launchers,cluster]'"


def _file_error(error: BaseException) -> str | None:
    """Return the operating system's reason; None for an error that Python code raised without asking it."""
    if getattr(error, "strerror", None) is None:
        return None
    return str(error)


def _raised_at_setup(error: BaseException) -> bool:
    """Return whether the balancing callback raised this while it was set up, before the first step.

    A ValueError says nothing of who is at fault. The callback checks its options in the hooks of `_SETUP`; the
    same error from anywhere else is a fault of the program, which keeps its traceback.

    Args:
        error: A ValueError or a TypeError that was caught, with its traceback.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name in _SETUP and module.startswith("farms_tb."):
            return True
    return False


_Kinds = type[BaseException] | tuple[type[BaseException], ...]
_MISTAKES: tuple[tuple[_Kinds, Callable[[BaseException], str | None]], ...] = (
    (RecipeError, str),
    ((HydraException, OmegaConfBaseException), _settings_error),
    ((ValueError, TypeError), _value_error),
    (RuntimeError, _plugin_error),
    (ImportError, _import_error),
    (ConnectionError, lambda error: _one_line(str(error))),  # Ray's, where no cluster answers, has no strerror
    (OSError, _file_error),
    (Exception, _wandb_error),
)
"""What describes each kind of mistake. The first kind that fits counts: OmegaConf has ValueErrors of its own."""
