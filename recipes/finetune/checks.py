"""Settings of the Trainer with which a run could not choose or test its best epoch, refused before it trains."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from transformers import TrainingArguments

from recipes.config import build
from recipes.errors import RecipeError
from recipes.finetune.heads import HEADS
from recipes.finetune.tasks import Kind

__all__ = ["check_batch", "check_score", "check_training"]

_REFUSED = {
    "load_best_model_at_end": "the recipe itself loads the best epoch, after the last one is measured and tested",
    "prediction_loss_only": "the best epoch is chosen by a score, which needs the predictions",
    "batch_eval_metrics": "a score is that of all examples together",
}
"""Options of `TrainingArguments` that take from a run what its summary is made of, and why."""


def check_training(cfg: DictConfig) -> None:
    """Refuse settings with which the weights of the best epoch would not be chosen, kept or tested.

    Args:
        cfg: the composed settings.

    Raises:
        RecipeError: such an option is set, nothing is evaluated, or what is evaluated is not saved.
    """
    for name, reason in _REFUSED.items():
        if cfg.training.get(name):
            raise RecipeError(f"training.{name}={cfg.training[name]}: leave it out; {reason}")
    args = build(cfg, "training", warmup_steps=0)
    evaluated, saved = args.eval_strategy.value, args.save_strategy.value
    if evaluated == "no":
        raise RecipeError("training.eval_strategy=no: the best epoch is chosen by evaluations; set epoch or steps")
    if saved not in ("best", evaluated):
        raise RecipeError(
            f"training.save_strategy={saved}: the best epoch is tested from its checkpoint; set it to "
            f"{evaluated}, as training.eval_strategy is, or to best"
        )
    if saved == "steps" and not _saves_all(args.eval_steps, args.save_steps):
        raise RecipeError(
            f"training.save_steps={args.save_steps:g} does not save at every "
            f"training.eval_steps={args.eval_steps:g}; set both to the same number, or training.save_strategy=best"
        )


def _saves_all(eval_steps: float, save_steps: float) -> bool:
    """Return whether each evaluation comes with a checkpoint; numbers below 1 are fractions of the run."""
    if eval_steps == save_steps:
        return True
    return min(eval_steps, save_steps) >= 1 and eval_steps % save_steps == 0


def check_batch(args: TrainingArguments, examples: int) -> None:
    """Refuse a batch that the training examples do not fill where only full ones are trained on.

    Args:
        args: the Trainer's arguments.
        examples: how many inputs there are to train on.

    Raises:
        RecipeError: no batch would be left.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and examples < batch:
        raise RecipeError(
            f"training.dataloader_drop_last=true leaves nothing to train on: a batch has {batch} examples, there "
            f"are {examples}; set training.per_device_train_batch_size lower"
        )


def check_score(name: str, score: Any, kind: Kind) -> None:
    """Refuse a score that an evaluation does not give.

    Args:
        name: the setting, for the message.
        score: its value.
        kind: what the task predicts.

    Raises:
        RecipeError: there is no such score; the message names those there are.
    """
    known = (*HEADS[kind].scores, "loss")
    if str(score).removeprefix("eval_") not in known:
        raise RecipeError(f"{name} must be one of {', '.join(known)}, got {score}")
