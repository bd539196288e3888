"""The parts of a run: network, inputs and Hugging Face's Trainer, built from the settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from recipes.config import build
from recipes.finetune.data import Examples
from recipes.finetune.encoding import Encoded
from recipes.finetune.heads import HEADS
from recipes.finetune.network import ModelOptions, load_network, load_tokens
from recipes.finetune.records import CLOCKS

__all__ = ["Run", "build_run", "score"]


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        model: the network with its head.
        trainer: Hugging Face's Trainer, with callbacks.
        train: the examples to train on.
        val: the validation examples.
        test: the test examples.
    """

    model: nn.Module
    trainer: transformers.Trainer
    train: Encoded
    val: Encoded
    test: Encoded


class _Trainer(transformers.Trainer):
    """A Trainer whose evaluations take all examples, and leave the random numbers of the training alone.

    To begin with a data loader draws a number, so dropout would depend on how often the network was evaluated.
    """

    def get_eval_dataloader(self, *args: Any, **options: Any) -> DataLoader[Any]:
        """Return the loader of the validation examples."""
        with self._keeping_last():
            return super().get_eval_dataloader(*args, **options)

    def get_test_dataloader(self, *args: Any, **options: Any) -> DataLoader[Any]:
        """Return the loader of the examples to predict."""
        with self._keeping_last():
            return super().get_test_dataloader(*args, **options)

    @contextlib.contextmanager
    def _keeping_last(self) -> Iterator[None]:
        """Leave `dataloader_drop_last`, which transformers applies to every loader, to the training."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate, and put the random number generators back."""
        with torch.random.fork_rng():
            return super().evaluation_loop(*args, **options)


def build_run(cfg: DictConfig, examples: Examples, callbacks: Sequence[Any]) -> Run:
    """Build network, inputs and Trainer.

    Args:
        cfg: the composed settings.
        examples: the examples.
        callbacks: callbacks of the Trainer, in order; the balancing one among them.

    Returns:
        The parts. Head and adapters are drawn from `cfg.seed`.

    Raises:
        RecipeError: the model is not there, or a part refuses its settings.
    """
    options = ModelOptions(**OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]
    tokens = load_tokens(options)
    transformers.set_seed(cfg.seed)
    model = load_network(options, examples.task, examples.classes)
    head = HEADS[examples.task.kind]
    train, val, test = (
        head.encode(rows, examples.task, tokens) for rows in (examples.train, examples.val, examples.test)
    )
    collator: Any = transformers.default_data_collator
    if not head.is_padded:
        collator = transformers.DataCollatorWithPadding(tokens.tokenizer)
    trainer = _Trainer(
        model=model,  # type: ignore[arg-type]
        args=_arguments(cfg, len(train.features)),
        data_collator=collator,
        train_dataset=train.features,  # type: ignore[arg-type]
        eval_dataset=val.features,  # type: ignore[arg-type]
        compute_metrics=val.score,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return Run(model, trainer, train, val, test)


def _arguments(cfg: DictConfig, examples: int) -> transformers.TrainingArguments:
    """Build the Trainer's arguments; a `warmup_steps` below 1 is the fraction of the run that warms up."""
    warmup = cfg.training.warmup_steps
    if not 0 < warmup < 1:
        return build(cfg, "training")  # type: ignore[no-any-return]
    args: transformers.TrainingArguments = build(cfg, "training", warmup_steps=0)
    args.warmup_steps = math.ceil(warmup * _steps(args, examples))  # only the latest transformers takes a fraction
    return args


def _steps(args: transformers.TrainingArguments, examples: int) -> int:
    """Return how many optimizer steps the Trainer will take over so many examples, on all devices together."""
    if args.max_steps > 0:
        return args.max_steps
    batch: int = args.train_batch_size * args.world_size
    batches = examples // batch if args.dataloader_drop_last else math.ceil(examples / batch)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def score(trainer: transformers.Trainer, encoded: Encoded, prefix: str) -> dict[str, float]:
    """Score the model with the weights that it has now.

    Args:
        trainer: the Trainer of the model.
        encoded: the examples.
        prefix: begins the names of the scores.

    Returns:
        `<prefix>/loss` and what the task is scored by, `<prefix>/accuracy` for example.
    """
    trainer.compute_metrics = encoded.score
    found = trainer.predict(encoded.features, metric_key_prefix=prefix).metrics or {}  # type: ignore[arg-type]
    return {
        name.replace(f"{prefix}_", f"{prefix}/", 1): float(value)
        for name, value in found.items()
        if not name.endswith(CLOCKS)
    }
