"""A cell's `settings.yaml`: what its results depend on, noted in its folder and kept from changing.

A study may go on over days and several commands, and its runs are compared with each other. So a command whose
settings differ from those of the runs that are there is refused, with the settings that differ by name. Settings
of an arm without a finished run may change: they may be the reason why there is none.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from farms_tb.atomic_write import atomic_path
from recipes.errors import RecipeError
from recipes.old_names import current_settings
from recipes.study.cells import Cell
from recipes.study.pairs import Records
from recipes.study.records import read_records

__all__ = ["SETTINGS_FILE", "check_settings", "keep_settings", "locked"]

SETTINGS_FILE = "settings.yaml"
_SHOWN = 8
_UNSET = "not set"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What systems answer where files can't be locked, as on some network drives."""
_EVALUATIONS = "study.evaluations"  # releases before 0.2 did not note it


@contextmanager
def locked(cell: Cell) -> Iterator[None]:
    """Make the cell's folder and keep other studies out; the system frees the lock of a process that is killed.

    Where the file system has no locks nothing is kept out.

    Raises:
        RecipeError: The folder can't be written, or another process is at work there.
    """
    lock: AbstractContextManager[Any] = nullcontext()
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cell.folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another study is at work in {cell.folder}; wait for it, or choose another study.folder"
        ) from None
    except NotImplementedError:  # filelock's word for a file system without locks
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritable(error) from error
    with lock:
        yield


def keep_settings(cell: Cell, made_by: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Note in the cell's folder, which is locked, what the results depend on, or compare with what is noted.

    Args:
        cell: The cell.
        made_by: By arm, what its data file says of how it was made; None for other data.

    Raises:
        RecipeError: The folder can't be written, or holds results of other settings, or of another data file.
    """
    path = cell.folder / SETTINGS_FILE
    files = {arm: noted for arm, noted in made_by.items() if noted}
    now = cell.identity()
    check_settings(cell)
    try:
        if path.exists():
            saved = _read_settings(path)
            _check_files(cell, saved["made_by"], files)
            now["arms"] = {**saved["arms"], **now["arms"]}
            files = {**saved["made_by"], **files}
        if files:
            now["made_by"] = files
        with atomic_path(path) as part:
            OmegaConf.save(OmegaConf.create(now), part)
    except OSError as error:
        raise _unwritable(error) from error


def check_settings(cell: Cell) -> None:
    """Compare the cell's settings with those of the finished runs in its folder, if any.

    Raises:
        RecipeError: The folder holds results of other settings, or of settings that can't be told.
    """
    path, records = cell.folder / SETTINGS_FILE, read_records(cell.folder)
    if not records:
        return
    noted: dict[str, Any] = {}
    if path.exists():
        saved = _read_settings(path)
        noted = saved["arms"]
        _check_same(cell, saved, {record.arm for record in records.values()})
    _check_fingerprints(cell, records, noted)


def _check_fingerprints(cell: Cell, records: Records, noted: Collection[str]) -> None:
    """Refuse results of arms whose settings are not noted, unless their fingerprint is that of this command's."""
    for record in records.values():
        arm = record.arm
        if arm in noted or arm not in cell.arms or record.config == cell.fingerprint(arm):
            continue
        raise RecipeError(
            f"whether the results of {arm} in {cell.folder} come from these settings can't be told: its "
            f"{SETTINGS_FILE} is missing, or does not have this arm, and the column config is that of other "
            "settings or of another version. Bring the right file back, or choose another study.folder"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    """Read what was noted, maybe by an earlier release under old names, as `Cell.identity` gives it.

    Raises:
        RecipeError: The file is damaged.
    """
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path))
        arms = {str(arm): current_settings(settings) for arm, settings in saved["arms"].items()}
        # Studies of earlier releases did not note how data files were made.
        return {"study": dict(saved["study"]), "arms": arms, "made_by": dict(saved.get("made_by", {}))}
    except (YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{path} is not a file of a study ({type(error).__name__}); bring the right one back, or choose "
            "another study.folder"
        ) from error


def _unwritable(error: OSError) -> RecipeError:
    """Return the error that tells the user of a folder that can't be written."""
    return RecipeError(f"the study's folder can't be written ({error}); choose another with study.folder=...")


def _check_same(cell: Cell, saved: dict[str, Any], done: set[str]) -> None:
    """Compare what is noted with this command's: the study's settings, and those of arms with finished runs."""
    now = cell.identity()
    new = _flat(now["study"], "study")
    old = {_EVALUATIONS: new[_EVALUATIONS], **_flat(saved["study"], "study")}
    for arm in done & now["arms"].keys() & saved["arms"].keys():
        old.update(_flat(saved["arms"][arm], arm))
        new.update(_flat(now["arms"][arm], arm))
    changes = _changes(old, new)
    if not changes:
        return
    shown = "; ".join(changes[:_SHOWN])
    if len(changes) > _SHOWN:
        shown += f" (and {len(changes) - _SHOWN} more)"
    raise RecipeError(
        f"the results in {cell.folder} come from other settings: {shown}. "
        "Go back to those, or choose another study.folder"
    )


def _check_files(cell: Cell, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a data file that was made in another way, under the same name, since an arm had its first run."""
    for arm in {record.arm for record in read_records(cell.folder).values()} & saved.keys() & now.keys():
        changes = _changes(saved[arm], now[arm])
        if changes:
            raise RecipeError(
                f"the results of {arm} in {cell.folder} come from a data file that was made in another way: "
                f"{'; '.join(changes)}. Make it again as it was, or choose another study.folder"
            )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which settings differ."""
    both = {name: (old.get(name, _UNSET), new.get(name, _UNSET)) for name in {**old, **new}}
    return [f"{name} was {before} and is {after}" for name, (before, after) in both.items() if before != after]


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Return nested settings under dotted names; an empty dict counts as a value."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, below in value.items():
        leaves.update(_flat(below, f"{path}.{key}"))
    return leaves
