"""A cell's `settings.yaml`: what its results depend on, noted in its folder and kept from changing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from farms_tb.atomic_write import atomic_path
from recipes.errors import RecipeError
from recipes.old_names import current_settings
from recipes.parts import build_parts
from recipes.study.cells import Cell
from recipes.study.single import make_trainer

__all__ = ["SETTINGS_FILE", "check_cell", "keep_settings", "locked"]

SETTINGS_FILE = "settings.yaml"
_SHOWN = 8
_UNSET = "not set"


def check_cell(cell: Cell) -> None:
    """Build every arm once, and throw it away: a mistake shows before time is spent.

    Raises:
        RecipeError: A part refuses its settings, or two parts do not fit.
    """
    for cfg in cell.arms.values():
        make_trainer(cfg, build_parts(cfg))


@contextmanager
def locked(cell: Cell) -> Iterator[None]:
    """Make the cell's folder and keep other studies out; the system frees the lock of a process that is killed.

    Raises:
        RecipeError: The folder can't be written, or another process is at work there.
    """
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cell.folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another study is at work in {cell.folder}; wait for it, or choose another study.folder"
        ) from None
    except OSError as error:
        raise _unwritable(error) from error
    with lock:
        yield


def keep_settings(cell: Cell) -> None:
    """Note in the cell's folder what the results depend on, or compare with what is noted.

    Raises:
        RecipeError: The folder can't be written, or holds results of other settings.
    """
    path = cell.folder / SETTINGS_FILE
    now = cell.identity()
    try:
        if path.exists():  # maybe written by an earlier release, under old names
            saved = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(saved, dict)
            arms = {str(arm): current_settings(settings) for arm, settings in saved["arms"].items()}
            _check_same(cell, {"study": saved["study"], "arms": arms}, now)
            now = {**now, "arms": {**arms, **now["arms"]}}
        with atomic_path(path) as part:
            OmegaConf.save(OmegaConf.create(now), part)
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> RecipeError:
    return RecipeError(f"the study's folder can't be written ({error}); choose another with study.folder=...")


def _check_same(cell: Cell, saved: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(saved["study"], "study"), _flat(now["study"], "study")
    for arm in now["arms"].keys() & saved["arms"].keys():
        old.update(_flat(saved["arms"][arm], arm))
        new.update(_flat(now["arms"][arm], arm))
    changes = [
        f"{name} was {old.get(name, _UNSET)} and is {new.get(name, _UNSET)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _UNSET) != new.get(name, _UNSET)
    ]
    if changes:
        more = f" (and {len(changes) - _SHOWN} more)" if len(changes) > _SHOWN else ""
        raise RecipeError(
            f"the results in {cell.folder} come from other settings: {'; '.join(changes[:_SHOWN])}{more}. "
            "Go back to those, or choose another study.folder"
        )


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Return nested settings under dotted names."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {name: leaf for key, below in value.items() for name, leaf in _flat(below, f"{path}.{key}").items()}
