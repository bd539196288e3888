"""The run folder: found or made, and proven writable, before anything costs time.

A folder is named by the time at which a run starts, so only the first process can choose it. The processes that
Lightning starts from there learn it from an environment variable.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from farms_tb.atomic_write import atomic_path
from recipes.console import make_console, warn
from recipes.errors import RecipeError
from recipes.processes import process_rank

__all__ = ["CONFIG_FILE", "open_run_folder", "run_folder", "save_config"]

CONFIG_FILE = "config.yaml"
_LOCK = ".lock"
SHARED_FOLDER = "FARMS_TB_RUN_DIR"  # environment variable: processes that Lightning starts find the folder by it


@contextmanager
def run_folder(cfg: DictConfig, newest: Callable[[Path], Path | None]) -> Iterator[Path]:
    """Make the run folder, see `open_run_folder`, and keep other runs out of it meanwhile.

    A user whose run is interrupted, or meets a full disk, is told how to go on with it. A folder in which nothing
    was written is removed at the end.

    Args:
        cfg: The composed settings.
        newest: Returns the checkpoint in the folder that the run can be resumed from; None where there is none.

    Yields:
        The folder.

    Raises:
        RecipeError: As `open_run_folder` does, or another run is at work in the folder.
    """
    folder = open_run_folder(cfg, newest)
    try:
        if process_rank() > 0:
            yield folder
            return
        with _locked(folder):
            _check_free(folder, cfg, newest)  # again: another run may have ended since
            yield folder
    except (KeyboardInterrupt, SystemExit, OSError):
        checkpoint = newest(folder)
        if checkpoint is not None:
            warn(make_console(), f"stopped; to go on, repeat the command with ckpt_path={checkpoint}")
        raise
    finally:
        _drop_if_empty(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system opens again when this process ends, however it ends.

    Raises:
        RecipeError: Another process holds it.
    """
    lock: AbstractContextManager[Any] = nullcontext()
    try:
        lock = FileLock(folder / _LOCK).acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another run is at work in {folder}; wait for it, or choose another folder with paths.run_dir=..."
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    with lock:
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def open_run_folder(cfg: DictConfig, newest: Callable[[Path], Path | None]) -> Path:
    """Make the run folder and enter it into `cfg.paths.run_dir`.

    It is `paths.run_dir` where that is set; the folder of the run that `ckpt_path` belongs to when resuming; else
    `<output_dir>/<name>/<date_time>`, with a number behind it where that is taken. Of several processes that train
    one model the first makes it, and those that it starts find it.

    Args:
        cfg: The composed settings.
        newest: Returns the checkpoint in a folder that its run can be resumed from; None where there is none.

    Returns:
        The folder.

    Raises:
        RecipeError: It can't be made or written, holds another run, or this process can't know which one the first
            has made.
    """
    folder = _chosen_folder(cfg)
    try:
        if folder is None:
            folder = _shared_folder() or _new_folder(Path(_path(cfg, "output_dir")) / cfg.name)
        if process_rank() == 0:
            _check_free(folder, cfg, newest)
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            if place.is_dir():
                tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise RecipeError(
            f"the output folder can't be written ({error}); choose another with paths.output_dir=... "
            "or paths.run_dir=..."
        ) from error
    cfg.paths.run_dir = str(folder)
    if process_rank() == 0:
        os.environ[SHARED_FOLDER] = str(folder.resolve())
    return folder


def _path(cfg: DictConfig, name: str) -> str:
    """Return a path of the section `paths`.

    Raises:
        RecipeError: It is empty, none, or a URL.
    """
    value = cfg.paths[name]
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"paths.{name} must be the path of a folder, got {value!r}")
    if "::" in value or "://" in value:  # by which checkpoints would be written elsewhere
        raise RecipeError(f"paths.{name} must be the path of a folder on this machine, got {value!r}")
    return str(Path(value).expanduser())


def _shared_folder() -> Path | None:
    """Return the folder that the process that started this one has made; None for the first process."""
    if process_rank() == 0:
        return None
    folder = os.environ.get(SHARED_FOLDER)
    if folder is None:
        raise RecipeError(
            f"process {process_rank()} can't know the run folder that process 0 makes: where torchrun or "
            "SLURM starts the processes, set paths.run_dir=..."
        )
    return Path(folder)


def _chosen_folder(cfg: DictConfig) -> Path | None:
    """Return the run folder that the settings name: `paths.run_dir`, or that of the checkpoint to resume from.

    A checkpoint that lies elsewhere, without the settings of its run, names none.

    Args:
        cfg: The composed settings.

    Returns:
        The folder; None where one is to be chosen.
    """
    if cfg.paths.run_dir is not None:
        return Path(_path(cfg, "run_dir"))
    if cfg.ckpt_path is None:
        return None
    if not isinstance(cfg.ckpt_path, str):
        raise RecipeError(f"ckpt_path must be null or the path of a checkpoint, got {cfg.ckpt_path!r}")
    folder = Path(cfg.ckpt_path).resolve().parent.parent
    if not (folder / CONFIG_FILE).is_file():
        return None
    return folder


def _check_free(folder: Path, cfg: DictConfig, newest: Callable[[Path], Path | None]) -> None:
    """Refuse a folder in which another run has left rows or checkpoints, which would be mixed or overwritten.

    Raises:
        RecipeError: There are some, and it is not the run that is resumed.
    """
    is_resumed = cfg.ckpt_path is not None and Path(cfg.ckpt_path).resolve().parent.parent == folder.resolve()
    # Without what a process that was killed had begun.
    left = [*folder.glob("metrics.csv"), *folder.glob("checkpoints/[!.]*")]
    if not left or is_resumed:
        return
    checkpoint = newest(folder)
    way_out = "delete it, as it has no checkpoint to resume from"
    if checkpoint is not None:
        way_out = f"resume that run with ckpt_path={checkpoint}"
    raise RecipeError(
        f"{folder} holds another run ({left[0].relative_to(folder)}): choose another paths.run_dir, or {way_out}"
    )


def _new_folder(parent: Path) -> Path:
    """Make a folder named by the time, with a number behind it where another run started in the same second."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / stamp
    number = 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{stamp}_{number}"


def _drop_if_empty(folder: Path) -> None:
    """Remove a run folder in which nothing was written."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@rank_zero_only
def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the settings, every reference resolved, to `config.yaml`; the first process alone does.

    Args:
        cfg: The composed settings.
        folder: The run folder, which can be resumed from as soon as it holds this file and a checkpoint.
    """
    with atomic_path(folder / CONFIG_FILE) as part:
        OmegaConf.save(cfg, part, resolve=True)
