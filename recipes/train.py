"""Train, test and draw one experiment: `python -m recipes.train`.

Settings come from `conf/` through Hydra; `experiment=...` picks an experiment, `balancing=farms|full|off|...`
the arm, any other setting is overridden by its name (`trainer.max_epochs=5 balancing.lr_max_ratio=1.9`). Nothing
is made or downloaded before the output folder is known to be writable and the settings to be consistent.

The run folder `<paths.output_dir>/<name>/<date_time>` holds

- `config.yaml`, the settings with every reference resolved;
- `checkpoints/best.ckpt`, best on validation data and the one that is tested, and `checkpoints/last.ckpt`, of the
  last epoch;
- `metrics.csv` and the W&B run under `wandb/` (offline unless `logger.wandb.offline=false`);
- `alpha.png`, `lr_ratio.png` and `lr_ratio_map.png`, each layer's curves, and `report.html`, a page about the run;
- `summary.json`, the test scores and the layers.

`sweep=seeds` runs an experiment with each of its published seeds; `hydra/launcher=joblib|slurm|ray` side by side.
`trainer=ddp|fsdp` trains on several devices; the first process alone writes and prints.

`ckpt_path=<run folder>/checkpoints/last.ckpt` with the same overrides resumes a run in its folder.

Exits with status 2 and one sentence when a setting, a folder or a data file is at fault, with 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from recipes.command import hand_over_hydras_errors, hydra_run, user_errors
from recipes.config import CONFIG_DIR, check_config, check_resumed_config
from recipes.console import make_console, quiet_lightning, warn
from recipes.folder import CONFIG_FILE, run_folder, save_config
from recipes.loggers import METRICS_FILE, RunFolderWandbLogger, forget_rows_after
from recipes.old_names import current_overrides, current_settings
from recipes.run import Run, build_run, check_weights, read_checkpoint
from recipes.summary import FinalLayers, finish, measure_layers, parameter_count, run_facts

__all__ = ["main", "train"]


# Data in memory need no loader processes, short epochs no denser logging, a resumed run has a folder, `val_size=0`
# means it; the one about specs is Lightning's own affair.
_NOT_FOR_USERS = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    "Total length of `list` across ranks is zero.*",
)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run one experiment from settings to summary.

    Args:
        cfg: The composed settings; `paths.run_dir` is filled in.

    Returns:
        The facts that `summary.json` holds, without the layers.

    Raises:
        RecipeError: A setting, a folder or a data file is at fault.
    """
    has_old_name = "farms" in cfg and "balancing" not in cfg
    if has_old_name:
        warnings.warn(
            "the section `farms` of the settings is now `balancing`; the old name goes with the next release",
            FutureWarning,
            stacklevel=2,
        )
        cfg = OmegaConf.create(current_settings(OmegaConf.to_container(cfg)))  # type: ignore[arg-type]
    with run_folder(cfg, _last_checkpoint) as folder:
        return _train_in(folder, cfg)


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint in a run folder; None where there is none.

    A run that ended in its first epoch may have that of its best weights alone.
    """
    checkpoints = folder / "checkpoints"
    found = [file for file in (checkpoints / "last.ckpt", checkpoints / "best.ckpt") if file.exists()]
    return found[0] if found else None


def _train_in(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """Run one experiment in its folder; see `train`.

    The order is that of the cost of a mistake: settings, checkpoint, parts, and only then data and training.
    """
    started = time.monotonic()
    console = make_console()
    check_config(cfg)
    checkpoint = None if cfg.ckpt_path is None else read_checkpoint(cfg.ckpt_path)
    if checkpoint is not None and (folder / CONFIG_FILE).exists():
        for section in check_resumed_config(cfg, folder / CONFIG_FILE):
            warn(console, f"resuming with other settings under {section!r} than before")
    with warnings.catch_warnings():
        run = build_run(cfg)
        for message in _NOT_FOR_USERS:  # only now: packages imported for a part set filters of their own
            warnings.filterwarnings("ignore", message=message)
        if checkpoint is not None:
            check_weights(run.model, checkpoint, cfg.ckpt_path)
            _forget_unsaved_rows(checkpoint, run.trainer, folder)
        if run.trainer.is_global_zero:
            for part in folder.glob(".*.part"):  # what a process that was killed had begun to write
                part.unlink(missing_ok=True)
        save_config(cfg, folder)
        console.print(_announcement(cfg, run, folder))
        layers, scores = _fit_and_test(cfg, run)
    facts = run_facts(cfg, run.model, _training(cfg, run), scores, started)
    if run.trainer.is_global_zero:
        finish(folder, facts, layers)
    return facts


def _announcement(cfg: DictConfig, run: Run, folder: Path) -> str:
    """Return the first line of a run: what is trained, and where it goes."""
    size = f"{parameter_count(run.model):,} parameters"
    return f"[bold]{cfg.name}[/bold] balancing={cfg.arm} seed={cfg.seed}: {size}, into {escape(str(folder))}"


def _forget_unsaved_rows(checkpoint: dict[str, Any], trainer: Trainer, folder: Path) -> None:
    """Cut the metrics back to the checkpoint, so that the resumed run logs nothing twice."""
    if trainer.is_global_zero and (folder / METRICS_FILE).exists():
        forget_rows_after(folder / METRICS_FILE, checkpoint["global_step"])


def _fit_and_test(cfg: DictConfig, run: Run) -> tuple[FinalLayers, Mapping[str, float]]:
    """Train, measure the final weights, then test the best ones.

    Args:
        cfg: The composed settings.
        run: The parts of the run.

    Returns:
        The layers, and the test scores by name.
    """
    _log_settings(cfg, run)
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=cfg.ckpt_path)
        layers = measure_layers(run.model, cfg, run.last)
        best = run.checkpoint.best_model_path or None
        tested = run.trainer.test(run.model, datamodule=run.data, ckpt_path=best, verbose=False)
    finally:
        for logger in run.trainer.loggers:
            if isinstance(logger, RunFolderWandbLogger):
                logger.close()
    return layers, tested[0] if tested else {}  # none with trainer.limit_test_batches=0


def _training(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Return what `run_facts` wants to know of the training; None for what a run without validation has not."""
    best = run.checkpoint.best_model_path
    best_epoch = None
    if best:
        best_epoch = torch.load(best, map_location="cpu", weights_only=True)["epoch"] + 1
    best_score = None
    if run.checkpoint.best_model_score is not None:
        best_score = float(run.checkpoint.best_model_score)
    return {
        "monitor": cfg.task.monitor,
        "best_checkpoint": best and str(Path(best)),
        "best_score": best_score,
        "best_epoch": best_epoch,
        "epochs": run.trainer.current_epoch,
        "steps": run.trainer.global_step,
    }


def _log_settings(cfg: DictConfig, run: Run) -> None:
    """Hand the settings, every reference resolved, to the loggers that keep some."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    for logger in run.trainer.loggers:
        logger.log_hyperparams(settings)  # type: ignore[arg-type]


@hydra.main(config_path=CONFIG_DIR, config_name="train", version_base="1.3")
def _task(cfg: DictConfig) -> None:
    """Train with the composed settings; a launcher may call this in a process of its own."""
    quiet_lightning(logging.WARNING)
    with hydra_run():
        train(cfg)


def main() -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    hand_over_hydras_errors()
    with user_errors():
        sys.argv[1:], notes = current_overrides(sys.argv[1:])
        for note in notes:
            warn(make_console(stderr=True), f"warning: {note}")
        _task()


if __name__ == "__main__":
    main()
