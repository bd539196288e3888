"""Train, test and draw one experiment: `python -m recipes.train`.

Settings come from `conf/` through Hydra; `experiment=...` picks an experiment, `farms=farms|full|off|monitor` the
arm, any other setting is overridden by its name (`trainer.max_epochs=5 data.batch_size=10`). Nothing is made or
downloaded before the output folder is known to be writable and the settings to be consistent.

The run folder `<paths.output_dir>/<name>/<date_time>` holds

- `config.yaml`, the settings with every reference resolved;
- `checkpoints/best.ckpt`, best on validation data and the one that is tested, and `checkpoints/last.ckpt`, of the
  last epoch;
- `metrics.csv` and the W&B run under `wandb/` (offline unless `logger.wandb.offline=false`);
- `alpha.png`, `lr_ratio.png` and `lr_ratio_map.png`, each layer's curves, and `report.html`, a page about the run;
- `summary.json`, the test scores and the layers.

`sweep=seeds` runs an experiment with each of its published seeds; `hydra/launcher=joblib|slurm` side by side.
`trainer=ddp|fsdp` trains on several devices; the first process alone writes and prints.

`ckpt_path=<run folder>/checkpoints/last.ckpt` with the same overrides resumes a run in its folder.

Exits with status 2 and one message when a setting, a folder or a data file is at fault.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from recipes.callbacks import LastCheckpoint, LastStepRates
from recipes.config import build, check_combination, check_config, check_resumed_config
from recipes.console import make_console
from recipes.errors import RecipeError
from recipes.folder import CONFIG_FILE, drop_if_empty, open_run_folder, save_config
from recipes.loggers import METRICS_FILE, RunFolderWandbLogger, forget_rows_after
from recipes.processes import check_processes
from recipes.summary import FinalLayers, draw_run, measure_layers, print_summary, write_summary

__all__ = ["CONFIG_DIR", "main", "train"]

CONFIG_DIR = str(Path(__file__).resolve().parents[1] / "conf")

# Data in memory need no loader processes, short epochs no denser logging, a resumed run has a folder, `val_size=0`
# means it; the one about specs is Lightning's own affair.
_NOT_FOR_USERS = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    "Total length of `list` across ranks is zero.*",
)


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        data: The data.
        model: The task with its network.
        last: Rates of the last step.
        checkpoint: Keeper of the best weights.
        loggers: Where metrics go.
        trainer: The trainer, with callbacks and loggers.
    """

    data: LightningDataModule
    model: LightningModule
    last: LastStepRates
    checkpoint: ModelCheckpoint
    loggers: list[Logger]
    trainer: Trainer


def build_run(cfg: DictConfig) -> Run:
    """Build every part; none of them makes or loads data yet.

    Raises:
        RecipeError: A part refuses its settings, or two parts do not fit.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    data = build(cfg, "data")
    factories = {"optimizer": build(cfg, "optimizer"), "scheduler": build(cfg, "scheduler")}
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build(cfg, "model", **factories)
    check_combination(cfg, model, data)
    balancer = None if cfg.farms is None else build(cfg, "farms")
    last = LastStepRates(balancer)
    callbacks: list[Callback] = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks]
    kept = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    best = [callback for callback in kept if not isinstance(callback, LastCheckpoint)]
    if len(best) != 1:
        raise RecipeError(f"callbacks needs exactly one ModelCheckpoint, got {len(best)}")
    callbacks = [*([balancer] if balancer is not None else []), last, *callbacks]
    loggers: list[Logger] = [build(cfg, f"logger.{name}") for name in cfg.logger]
    trainer = build(cfg, "trainer", callbacks=callbacks, logger=loggers)
    check_processes(trainer)
    return Run(data, model, last, best[0], loggers, trainer)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run one experiment from settings to summary.

    Args:
        cfg: The composed settings; `paths.run_dir` is filled in.

    Returns:
        The facts that `summary.json` holds, without the layers.

    Raises:
        RecipeError: A setting, a folder or a data file is at fault.
    """
    folder = open_run_folder(cfg)
    try:
        return _train_in(folder, cfg)
    except (KeyboardInterrupt, SystemExit):
        _say_how_to_resume(folder)
        raise
    finally:
        drop_if_empty(folder)


def _say_how_to_resume(folder: Path) -> None:
    """Point an interrupted user to the last checkpoint, if there is one."""
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        hint = f"stopped; to go on, repeat the command with ckpt_path={last}"
        make_console().print(f"[yellow]{escape(hint)}[/yellow]", soft_wrap=True)


def _train_in(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """Run one experiment in its folder; see `train`."""
    started = time.monotonic()
    console = make_console()
    check_config(cfg)
    if cfg.ckpt_path is not None and (folder / CONFIG_FILE).exists():
        for section in check_resumed_config(cfg, folder / CONFIG_FILE):
            console.print(f"[yellow]resuming with other settings under {section!r} than before[/yellow]")
    with warnings.catch_warnings():
        run = build_run(cfg)
        for message in _NOT_FOR_USERS:  # only now: packages imported for a part set filters of their own
            warnings.filterwarnings("ignore", message=message)
        save_config(cfg, folder)
        console.print(_announcement(cfg, run, folder))
        facts, layers = _fit_and_test(cfg, run, folder)
    facts["seconds"] = round(time.monotonic() - started, 1)
    if run.trainer.is_global_zero:
        write_summary(folder, facts, layers.rows)
        draw_run(folder, layers, title=f"{cfg.name}, farms={cfg.arm}, seed {cfg.seed}")
        print_summary(console, folder, facts, layers.rows)
    return facts


def _announcement(cfg: DictConfig, run: Run, folder: Path) -> str:
    size = f"{_parameters(run.model):,} parameters"
    return f"[bold]{cfg.name}[/bold] farms={cfg.arm} seed={cfg.seed}: {size}, into {escape(str(folder))}"


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fit_and_test(cfg: DictConfig, run: Run, folder: Path) -> tuple[dict[str, Any], FinalLayers]:
    """Train, measure the final weights, then test the best ones."""
    if cfg.ckpt_path is not None and run.trainer.is_global_zero:
        _forget_unsaved_rows(cfg.ckpt_path, folder)
    _log_settings(cfg, run)
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=cfg.ckpt_path)
        layers = measure_layers(run.model, cfg, run.last)
        best = run.checkpoint.best_model_path or None
        scores = run.trainer.test(run.model, datamodule=run.data, ckpt_path=best, verbose=False)[0]
    finally:
        for logger in run.loggers:
            if isinstance(logger, RunFolderWandbLogger):
                logger.close()
    return {**_facts(cfg, run, folder), "test": {name: float(value) for name, value in scores.items()}}, layers


def _facts(cfg: DictConfig, run: Run, folder: Path) -> dict[str, Any]:
    best = run.checkpoint.best_model_path
    score = run.checkpoint.best_model_score
    return {
        "name": cfg.name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "monitor": cfg.task.monitor,
        "best_checkpoint": best and str(Path(best)),
        "best_score": None if score is None else float(score),
        "best_epoch": torch.load(best, map_location="cpu", weights_only=True)["epoch"] + 1 if best else None,
        "epochs": run.trainer.current_epoch,
        "steps": run.trainer.global_step,
        "parameters": _parameters(run.model),
        "wandb": sorted(str(path) for path in folder.glob("wandb/*run-*") if path.is_dir()),
    }


def _forget_unsaved_rows(ckpt_path: str, folder: Path) -> None:
    """Cut the metrics back to the checkpoint, so that the resumed run logs nothing twice."""
    if (folder / METRICS_FILE).exists():
        step = torch.load(ckpt_path, map_location="cpu", weights_only=True)["global_step"]
        forget_rows_after(folder / METRICS_FILE, step)


def _log_settings(cfg: DictConfig, run: Run) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    for logger in run.loggers:
        logger.log_hyperparams(settings)  # type: ignore[arg-type]


@hydra.main(config_path=CONFIG_DIR, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        train(cfg)
    except RecipeError as error:
        make_console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
