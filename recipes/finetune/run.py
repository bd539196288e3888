"""One run of fine-tuning, from settings to summary.

The order is that of the cost of a mistake: settings and folders, then the data, the network, and only then
training.
"""

from __future__ import annotations

import errno
import json
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from rich.markup import escape
from safetensors import SafetensorError, safe_open

from farms_tb.atomic_write import atomic_path
from recipes.config import build, build_balancer, check_resumed_config, check_values
from recipes.console import make_console, warn
from recipes.errors import RecipeError
from recipes.finetune.building import Run, build_run, score
from recipes.finetune.checks import check_batch, check_score, check_training
from recipes.finetune.data import Examples
from recipes.finetune.network import load_weights
from recipes.finetune.records import MetricsCallback, RatesCallback, epochs_begun
from recipes.folder import CONFIG_FILE, run_folder, save_config
from recipes.run import check_archive
from recipes.summary import finish, measure_layers, run_facts

__all__ = ["finetune"]

CHECKPOINTS = "checkpoints"
_TRAINER_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
_LAST_WEIGHTS = "last.ckpt"
_DAMAGE = (OSError, ValueError, zipfile.BadZipFile, SafetensorError)
"""What `_check_checkpoint` raises of a checkpoint that is not whole."""


def finetune(cfg: DictConfig) -> dict[str, Any]:
    """Run one experiment.

    Args:
        cfg: The composed settings; `paths.run_dir` is filled in.

    Returns:
        The facts that `summary.json` holds, without the layers: under `test` the scores of the best epoch's
        weights (`test/...`) and of the last one's (`test_last/...`).

    Raises:
        RecipeError: A setting, a folder or a data file is at fault.
    """
    checkpoint = _check(cfg)
    with run_folder(cfg, _newest_checkpoint) as folder:
        return _finetune_in(folder, cfg, checkpoint)


def _check(cfg: DictConfig) -> Path | None:
    """Check what can be checked without reading data.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        RecipeError: The settings do not resolve or contradict each other, or the checkpoint is not whole.
    """
    check_values(cfg)
    if cfg.ckpt_path is None:
        return None
    checkpoint = Path(cfg.ckpt_path)
    try:
        _check_checkpoint(checkpoint)
    except _DAMAGE as error:
        whole = _newest_checkpoint(checkpoint.resolve().parent.parent)
        other = whole is not None and whole.resolve() != checkpoint.resolve()
        way_out = f"take {whole}" if other else "start anew without ckpt_path"
        raise RecipeError(
            f"ckpt_path={checkpoint} is no whole checkpoint of the Trainer ({error}); {way_out}"
        ) from error
    saved = checkpoint.resolve().parent.parent / CONFIG_FILE
    if saved.is_file():
        for section in check_resumed_config(cfg, saved):
            warn(make_console(), f"resuming with other settings under {section!r} than before")
    return checkpoint


def _check_checkpoint(checkpoint: Path) -> None:
    """Check that all of a checkpoint is there and whole: the Trainer goes on without a part that is missing.

    Raises:
        OSError: A file is missing or can't be read.
        ValueError: The Trainer's state is cut.
        zipfile.BadZipFile: The state of optimizer, scheduler or random numbers is damaged.
        SafetensorError: The weights are cut.
    """
    json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "*.safetensors"):
        files = list(checkpoint.glob(pattern))
        if not files:
            raise FileNotFoundError(f"it has no {pattern}")
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            else:
                check_archive(file)


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; None where there is none."""
    found = [path for path in folder.glob(f"{CHECKPOINTS}/checkpoint-*") if _steps(path).isdecimal()]
    for checkpoint in sorted(found, key=lambda path: int(_steps(path)), reverse=True):
        try:
            _check_checkpoint(checkpoint)
        except _DAMAGE:
            continue
        return checkpoint
    return None


def _steps(checkpoint: Path) -> str:
    """Return the number of optimizer steps in the name of a checkpoint."""
    return checkpoint.name.rpartition("-")[2]


def _finetune_in(folder: Path, cfg: DictConfig, checkpoint: Path | None) -> dict[str, Any]:
    """Run one experiment in its folder; see `finetune`."""
    started = time.monotonic()
    console = make_console()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    check_training(cfg)
    balancer = build_balancer(cfg)
    examples: Examples = build(cfg, "data").read()
    check_score("training.metric_for_best_model", cfg.training.metric_for_best_model, examples.task.kind)
    rates = RatesCallback(balancer)
    balancing = [] if balancer is None else [balancer]
    run = build_run(cfg, examples, [*balancing, rates, MetricsCallback(folder)])
    check_batch(run.trainer.args, len(run.train.features))
    save_config(cfg, folder)
    sizes = (
        f"{len(examples.train)} examples to train on, {len(examples.val)} to choose, {len(examples.test)} to test"
    )
    console.print(
        f"[bold]{cfg.name}[/bold] balancing={cfg.arm} seed={cfg.seed}: {sizes}, into {escape(str(folder))}",
        soft_wrap=True,
    )
    try:
        _train(run, checkpoint)
    finally:
        if balancer is not None:
            balancer.detach()
    layers = measure_layers(run.model, cfg, rates.last)  # of the last epoch's weights
    _save_last_weights(run, balancer, folder)
    if run.trainer.state.best_model_checkpoint is None:
        score_name = run.trainer.args.metric_for_best_model
        warn(
            console,
            f"no epoch is the best one, as none was evaluated or each had {score_name} nan: test/ has the scores "
            "of the last epoch's weights",
        )
    scores = _test(run)
    facts = run_facts(cfg, run.model, _training(run), scores, started)
    finish(folder, facts, layers)
    return facts


def _train(run: Run, checkpoint: Path | None) -> None:
    """Train, from a checkpoint where there is one.

    Raises:
        OSError: A file of a checkpoint could not be written: `run_folder` then says how to go on.
    """
    try:
        run.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, SafetensorError) as error:
        # The writers of torch and safetensors, which the Trainer calls, have errors of their own for a full disk.
        if not any(words in str(error) for words in ("unexpected pos", "PytorchStreamWriter", "I/O error")):
            raise
        folder = str(run.trainer.args.output_dir)
        raise OSError(errno.ENOSPC, "a checkpoint could not be written, the disk may be full", folder) from error


def _test(run: Run) -> dict[str, float]:
    """Return the test scores of the last epoch's weights and of the best one's, which are in the model then."""
    last = score(run.trainer, run.test, "test_last")
    best = run.trainer.state.best_model_checkpoint
    if best is not None:
        load_weights(run.model, Path(best))
    return {**score(run.trainer, run.test, "test"), **last}


def _save_last_weights(run: Run, balancer: Any, folder: Path) -> None:
    """Save the last epoch's weights where `farms-tb report` looks for them."""
    state = run.trainer.state
    callbacks: dict[str, Any] = {}
    saved = None if balancer is None else balancer.state()["attributes"]["_restored"]
    if saved is not None:
        callbacks["FARMSTempBalance"] = saved
    content = {
        "state_dict": run.model.state_dict(),
        "epoch": epochs_begun(state.epoch) - 1,
        "global_step": state.global_step,
        "callbacks": callbacks,
    }
    # Through memory, since torch.save turns a full disk into a RuntimeError.
    whole = BytesIO()
    torch.save(content, whole)
    for left in (folder / CHECKPOINTS).glob(f".{_LAST_WEIGHTS}*.part"):  # by a run that was killed while it wrote
        left.unlink()
    with atomic_path(folder / CHECKPOINTS / _LAST_WEIGHTS) as path:
        path.write_bytes(whole.getbuffer())


def _training(run: Run) -> dict[str, Any]:
    """Return what `run_facts` wants to know of the training."""
    state = run.trainer.state
    best = state.best_model_checkpoint
    steps_of_best = None if best is None else int(_steps(Path(best)))
    best_epoch = None
    for row in state.log_history:
        if row["step"] == steps_of_best and "eval_loss" in row:
            best_epoch = epochs_begun(row["epoch"])
    return {
        "monitor": f"val/{run.trainer.args.metric_for_best_model}",
        "best_checkpoint": best,
        "best_score": state.best_metric,
        "best_epoch": best_epoch,
        "epochs": epochs_begun(state.epoch),
        "steps": state.global_step,
    }
