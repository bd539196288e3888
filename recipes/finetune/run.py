"""One run of fine-tuning, from settings to summary.

The order is that of the cost of a mistake: settings and folders, then the data, the network, and only then
training.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape
from torch import nn

from recipes.config import build, build_balancer, check_arm, check_count, check_resumed_config
from recipes.console import make_console, warn
from recipes.errors import RecipeError
from recipes.finetune.data import Examples
from recipes.finetune.encoding import Encoded
from recipes.finetune.heads import HEADS
from recipes.finetune.network import ModelOptions, load_network, load_tokens, load_weights
from recipes.finetune.records import CLOCKS, MetricsCallback, RatesCallback
from recipes.folder import CONFIG_FILE, drop_if_empty, open_run_folder, save_config
from recipes.summary import draw_run, measure_layers, print_summary, write_summary

__all__ = ["finetune"]

CHECKPOINTS = "checkpoints"
_TRAINER_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
_LAST_WEIGHTS = "last.ckpt"


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        model: the network with its head.
        trainer: Hugging Face's Trainer, with callbacks.
        val: the validation examples.
        test: the test examples.
        rates: learning rate and ratios of the last step.
        balancer: the balancing callback; None for the arm `off`.
    """

    model: nn.Module
    trainer: transformers.Trainer
    val: Encoded
    test: Encoded
    rates: RatesCallback
    balancer: Any


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
    folder = open_run_folder(cfg)
    try:
        return _finetune_in(folder, cfg, checkpoint)
    except (KeyboardInterrupt, SystemExit):
        last = _newest_checkpoint(folder)
        if last is not None:
            warn(make_console(), f"stopped; to go on, repeat the command with ckpt_path={last}")
        raise
    finally:
        drop_if_empty(folder)


def _check(cfg: DictConfig) -> Path | None:
    """Check what can be checked without reading data.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        RecipeError: The settings do not resolve or contradict each other, or the checkpoint is not whole.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"the settings do not resolve: {error}") from error
    check_arm(cfg)
    check_count("threads", cfg.threads)
    if cfg.ckpt_path is None:
        return None
    checkpoint = Path(cfg.ckpt_path)
    if not (checkpoint / _TRAINER_STATE).is_file():
        whole = _newest_checkpoint(checkpoint.resolve().parent.parent)
        way_out = f"take {whole}" if whole else "start anew without ckpt_path"
        raise RecipeError(f"ckpt_path={checkpoint} is no whole checkpoint of the Trainer; {way_out}")
    saved = checkpoint.resolve().parent.parent / CONFIG_FILE
    if saved.is_file():
        check_resumed_config(cfg, saved)
    return checkpoint


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; None where there is none."""
    states = folder.glob(f"{CHECKPOINTS}/checkpoint-*/{_TRAINER_STATE}")
    numbered = [(int(state.parent.name.rpartition("-")[2]), state.parent) for state in states]
    return max(numbered)[1] if numbered else None


def _finetune_in(folder: Path, cfg: DictConfig, checkpoint: Path | None) -> dict[str, Any]:
    """Run one experiment in its folder; see `finetune`."""
    started = time.monotonic()
    console = make_console()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    balancer = build_balancer(cfg)
    examples: Examples = build(cfg, "data").read()
    run = _build_run(cfg, examples, balancer)
    save_config(cfg, folder)
    sizes = (
        f"{len(examples.train)} examples to train on, {len(examples.val)} to choose, {len(examples.test)} to test"
    )
    console.print(
        f"[bold]{cfg.name}[/bold] balancing={cfg.arm} seed={cfg.seed}: {sizes}, into {escape(str(folder))}",
        soft_wrap=True,
    )
    try:
        run.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if run.balancer is not None:
            run.balancer.detach()
    layers = measure_layers(run.model, cfg, run.rates.last)  # of the last epoch's weights
    _save_last_weights(run, folder)
    facts = _facts(cfg, run, _test(cfg, run))
    facts["seconds"] = round(time.monotonic() - started, 1)
    write_summary(folder, facts, layers.rows)
    draw_run(folder, layers, title=f"{cfg.name}, balancing={cfg.arm}, seed {cfg.seed}")
    print_summary(console, folder, facts, layers.rows)
    return facts


def _build_run(cfg: DictConfig, examples: Examples, balancer: Any) -> Run:
    """Build network, inputs and Trainer.

    Args:
        cfg: The composed settings; `paths.run_dir` is filled in.
        examples: The examples.
        balancer: The balancing callback; None for none.

    Raises:
        RecipeError: The model is not there, or a part refuses its settings.
    """
    options = ModelOptions(**OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]
    tokens = load_tokens(options)
    transformers.set_seed(cfg.seed)
    model = load_network(options, examples.task, examples.classes)
    head = HEADS[examples.task.kind]
    train, val, test = (
        head.encode(rows, examples.task, tokens) for rows in (examples.train, examples.val, examples.test)
    )
    rates = RatesCallback(balancer)
    callbacks: list[Any] = [rates, MetricsCallback(Path(cfg.paths.run_dir))]
    if balancer is not None:
        callbacks.insert(0, balancer)
    collator: Any = transformers.default_data_collator
    if not head.is_padded:
        collator = transformers.DataCollatorWithPadding(tokens.tokenizer)
    trainer = transformers.Trainer(
        model=model,  # type: ignore[arg-type]
        args=_arguments(cfg, len(train.features)),
        data_collator=collator,
        train_dataset=train.features,  # type: ignore[arg-type]
        eval_dataset=val.features,  # type: ignore[arg-type]
        compute_metrics=val.score,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return Run(model, trainer, val, test, rates, balancer)


def _arguments(cfg: DictConfig, examples: int) -> transformers.TrainingArguments:
    """Build the Trainer's arguments; a `warmup_steps` below 1 is the fraction of the run that warms up."""
    options: Mapping[str, Any] = OmegaConf.to_container(cfg.training, resolve=True)  # type: ignore[assignment]
    batch = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    warmup = options["warmup_steps"]
    if 0 < warmup < 1:  # only the latest transformers takes a fraction
        warmup = math.ceil(warmup * options["num_train_epochs"] * math.ceil(examples / batch))
    return build(cfg, "training", warmup_steps=warmup)  # type: ignore[no-any-return]


def _test(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Return the test scores of the last epoch's weights and of the best one's, which are in the model then."""
    last = _scores(run, "test_last")
    best = run.trainer.state.best_model_checkpoint
    if best is not None:
        load_weights(run.model, Path(best))
    return {**_scores(run, "test"), **last}


def _scores(run: Run, prefix: str) -> dict[str, float]:
    """Score the model on the test examples."""
    run.trainer.compute_metrics = run.test.score
    found = run.trainer.predict(run.test.features, metric_key_prefix=prefix).metrics or {}  # type: ignore[arg-type]
    return {
        name.replace(f"{prefix}_", f"{prefix}/", 1): float(value)
        for name, value in found.items()
        if not name.endswith(CLOCKS)
    }


def _save_last_weights(run: Run, folder: Path) -> None:
    """Save the last epoch's weights where `farms-tb report` looks for them."""
    state = run.trainer.state
    callbacks: dict[str, Any] = {}
    saved = None if run.balancer is None else run.balancer.state()["attributes"]["_restored"]
    if saved is not None:
        callbacks["FARMSTempBalance"] = saved
    path = folder / CHECKPOINTS / _LAST_WEIGHTS
    part = path.with_name(f".{path.name}.part")
    content = {
        "state_dict": run.model.state_dict(),
        "epoch": round(state.epoch or 0) - 1,
        "global_step": state.global_step,
        "callbacks": callbacks,
    }
    torch.save(content, part)
    shutil.move(part, path)


def _facts(cfg: DictConfig, run: Run, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return what `summary.json` says of the run, without the time that it took."""
    state = run.trainer.state
    steps_of_best = None
    if state.best_model_checkpoint is not None:
        steps_of_best = int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
    best_epoch = None
    for row in state.log_history:
        if row["step"] == steps_of_best and "eval_loss" in row:
            best_epoch = round(row["epoch"])
    return {
        "name": cfg.name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "monitor": f"val/{run.trainer.args.metric_for_best_model}",
        "best_checkpoint": state.best_model_checkpoint,
        "best_score": state.best_metric,
        "best_epoch": best_epoch,
        "epochs": round(state.epoch or 0),
        "steps": state.global_step,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "wandb": [],
        "test": dict(scores),
    }
