"""One run of a study: build, train, validate and test, and nothing else.

A study makes hundreds of runs, so this leaves out all that the commands do around a training: no run folder, no
checkpoints, no loggers, no pictures.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from recipes.console import quiet_lightning
from recipes.study.course import Ratios, best_epochs, outcome
from recipes.study.programs import load_program

__all__ = ["Trained", "run_once", "run_quietly"]

_RECIPES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trained:
    """What a program's training leaves.

    Attributes:
        model: The model that was trained.
        ratios: Its learning-rate ratios.
        scores: By epoch, counted from 1, what its weights score on validation and test data, `val/...` and
            `test/...`; the last epoch is among them.
        facts: The fields of `recipes.study.records.Record` that each program finds in its own way: `blind_error`,
            `steps`, `train_seconds`, `callback_seconds`, `val_samples`, `test_samples` and `device`.
    """

    model: nn.Module
    ratios: Ratios
    scores: Mapping[int, Mapping[str, float]]
    facts: Mapping[str, Any]


def run_once(settings: dict[str, Any], evaluations: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Train, then validate and test.

    Args:
        settings: All settings of the run, resolved.
        evaluations: Epochs whose weights are validated and tested, see `recipes.study.course.evaluated_epochs`.

    Returns:
        The fields of `recipes.study.records.Record` that the run decides, and the callback's warnings.

    Raises:
        RecipeError: A part refuses its settings, or a data file is at fault.
    """
    cfg = OmegaConf.create(settings)
    program = load_program("finetune" if "training" in cfg else "train")  # of the two it alone has that section
    metric = program.metric_of(cfg)
    started = time.perf_counter()
    with _callback_warnings() as messages:
        trained: Trained = program.train(cfg, evaluations)
    epochs = max(trained.scores)
    facts = {
        **outcome(trained.scores[epochs], metric),
        **best_epochs(trained.scores, metric),
        **trained.ratios.facts(),
        **trained.facts,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in trained.model.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return facts, messages


@contextlib.contextmanager
def _callback_warnings() -> Iterator[list[str]]:
    """Show no warning, and collect those of the balancing callback.

    Its warnings are plain `UserWarning`s that point at the caller of the trainer, which is a line of the recipes.
    Those of the trainers themselves point into a library, or are of a class of their own.

    Yields:
        A list that has the messages once the block has ended.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [
        str(warning.message)
        for warning in caught
        if warning.category is UserWarning and _RECIPES in Path(warning.filename).parents
    ]


def run_quietly(arguments: tuple[dict[str, Any], int]) -> tuple[dict[str, Any], list[str]]:
    """Do a run in a process of an engine: `run_once` on one thread, with nothing printed."""
    torch.set_num_threads(1)
    quiet_lightning(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return run_once(*arguments)
