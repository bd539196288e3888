"""The run folder: found or made, and proven writable, before anything costs time."""

from __future__ import annotations

import itertools
import tempfile
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipes.errors import RecipeError

__all__ = ["CONFIG_FILE", "drop_if_empty", "open_run_folder", "save_config"]

CONFIG_FILE = "config.yaml"


def open_run_folder(cfg: DictConfig) -> Path:
    """Make the run folder and enter it into `cfg.paths.run_dir`.

    It is `paths.run_dir` where that is set; the folder of the run that `ckpt_path` belongs to when resuming; else
    `<output_dir>/<name>/<date_time>`, with a number behind it where that is taken.

    Returns:
        The folder.

    Raises:
        RecipeError: It can't be made or written.
    """
    folder = _resumed_folder(cfg) if cfg.paths.run_dir is None else Path(cfg.paths.run_dir)
    try:
        folder = _new_folder(Path(cfg.paths.output_dir) / cfg.name) if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(
            f"the output folder can't be written ({error}); choose another with paths.output_dir=... "
            "or paths.run_dir=..."
        ) from error
    cfg.paths.run_dir = str(folder)
    return folder


def _resumed_folder(cfg: DictConfig) -> Path | None:
    """Return the run folder a checkpoint lies in, None for no or a foreign checkpoint."""
    if cfg.ckpt_path is None:
        return None
    folder = Path(cfg.ckpt_path).resolve().parent.parent
    return folder if (folder / CONFIG_FILE).is_file() else None


def _new_folder(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            continue
        return folder
    raise AssertionError("unreachable: the count has no end")


def drop_if_empty(folder: Path) -> None:
    """Remove a run folder in which nothing was written."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the settings, every reference resolved, to `config.yaml`."""
    OmegaConf.save(cfg, folder / CONFIG_FILE, resolve=True)
