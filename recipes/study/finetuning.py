"""One run of `python -m recipes.finetune` in a study: build, train, validate and test, and nothing else.

No run folder, no checkpoints, no curves, no pictures. Data, network, callback and Trainer are built as
`recipes.finetune` builds them, and a run ends with the weights that the command has after its last epoch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import TrainerCallback

from recipes.config import build, build_balancer, check_values
from recipes.errors import RecipeError
from recipes.finetune.building import Run, build_run, score
from recipes.finetune.data import Examples
from recipes.finetune.published import register_resolver
from recipes.study.course import Ratios, Weights, best_epochs, outcome
from recipes.study.messages import callback_warnings
from recipes.study.records import SHARES

__all__ = ["build_once", "metric_of", "prepare", "run_once", "run_quietly", "uses_gpu"]

_KEEP_NOTHING = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
_PROBE = 0.123  # a learning rate that nobody sets


def prepare(cfg: DictConfig) -> None:
    """Check the settings of an arm, let its runs log and keep nothing; see `recipes.study.programs.Program`."""
    register_resolver()  # settings of Model Balancing name the paper's numbers
    check_values(cfg)
    metric_of(cfg)
    _check_rate_and_seed(cfg)
    with open_dict(cfg):
        cfg.training.update(_KEEP_NOTHING)
        if cfg.balancing.get("_target_") is not None:
            cfg.balancing.log = False


def _check_rate_and_seed(cfg: DictConfig) -> None:
    """Refuse a learning rate or a seed that stays as it is when a study changes `lr` and `seed`."""
    changed = cfg.copy()
    changed.lr = _PROBE
    changed.seed = cfg.seed + 1
    if changed.training.seed != changed.seed or changed.training.get("data_seed") is not None:
        raise RecipeError("training.seed and training.data_seed can't be set: a study sets the seed of every run")
    if changed.training.learning_rate != _PROBE:
        raise RecipeError(
            f"training.learning_rate={cfg.training.learning_rate} can't be set: a study tunes the learning rate; "
            "set arms.farms.lr, which its grid has multiples of"
        )


def metric_of(cfg: DictConfig) -> str:
    """Return the name of the score that is compared, that of `training.metric_for_best_model`.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: It has no error of blind guessing.
    """
    metric = str(cfg.training.metric_for_best_model).removeprefix("eval_")
    if metric not in SHARES:
        raise RecipeError(
            f"a study compares errors: training.metric_for_best_model must be one of {', '.join(SHARES)}, "
            f"got {metric}"
        )
    return metric


def build_once(cfg: DictConfig) -> None:
    """Build the parts of a run and throw them away; see `recipes.study.programs.Program`."""
    examples = _read(cfg)
    few = replace(examples, train=examples.train[:1], val=examples.val[:1], test=examples.test[:1])
    balancer = build_balancer(cfg)
    with _quiet(), _temporary_folder(cfg) as own:
        own.training.use_cpu = not own.training.get("fp16", False)  # leaves the GPUs to the processes that train
        build_run(own, few, [] if balancer is None else [balancer])


def uses_gpu(cfg: DictConfig) -> bool:
    """Return whether a run may train on a GPU."""
    return not cfg.training.use_cpu


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
    started = time.perf_counter()
    cfg = OmegaConf.create(settings)
    metric = metric_of(cfg)
    with callback_warnings() as messages, _quiet(), _temporary_folder(cfg) as own:
        balancer = build_balancer(cfg)
        examples = _read(cfg)
        ratios, weights, begin = Ratios(balancer), Weights(evaluations), _Begin()
        course = _Course(begin, ratios, weights)
        run = build_run(own, examples, [begin, course] if balancer is None else [begin, balancer, course])
        try:
            run.trainer.train()
        finally:
            if balancer is not None:
                balancer.detach()
        state = run.trainer.state
        last = round(state.epoch or 0)
        scores = {epoch: _evaluate(run) for epoch in weights.epochs(run.model, last)}
    facts: dict[str, Any] = {
        **outcome(scores[last], metric),
        "blind_error": 1.0 - 1.0 / len(examples.classes),
        **best_epochs(scores, metric),
        **ratios.facts(),
        "epochs": last,
        "steps": state.global_step,
        "train_seconds": round(course.seconds, 4),
        "callback_seconds": 0.0 if balancer is None else round(course.callback_seconds, 4),
        "val_samples": len(examples.val),
        "test_samples": len(examples.test),
        "parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "device": str(run.trainer.args.device),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return facts, messages


def run_quietly(arguments: tuple[dict[str, Any], int]) -> tuple[dict[str, Any], list[str]]:
    """Do a run in a process of an engine: on one thread, with nothing printed.

    Args:
        arguments: Those of `run_once`.
    """
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        return run_once(*arguments)


class _Begin(TrainerCallback):
    """Notes when the balancing callback, which comes next, begins with an event."""

    def __init__(self) -> None:
        self.time = 0.0

    def _note(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.time = time.perf_counter()

    on_train_begin = on_epoch_begin = on_step_begin = on_step_end = on_epoch_end = on_train_end = _note


class _Course(TrainerCallback):
    """Keeps ratios, weights and times of a training; it stands after the balancing callback.

    Args:
        begin: Stands before the balancing callback.
        ratios: Notes the ratios.
        weights: Keeps the weights.

    Attributes:
        seconds: Time of the epochs without the balancing callback's.
        callback_seconds: Time of the balancing callback's events.
    """

    def __init__(self, begin: _Begin, ratios: Ratios, weights: Weights) -> None:
        self.seconds = 0.0
        self.callback_seconds = 0.0
        self._begin = begin
        self._ratios = ratios
        self._weights = weights
        self._resumed = 0.0

    def _add(self, args: Any = None, state: Any = None, control: Any = None, **kwargs: Any) -> None:
        """Add the time of an event of the balancing callback, which has just ended."""
        self.callback_seconds += time.perf_counter() - self._begin.time

    on_train_begin = on_train_end = _add

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on counting the time of the training."""
        self._add()
        self._resumed = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the ratios, and leave out the time of a measurement."""
        self._leave_out()
        self._ratios.note()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the time of a measurement."""
        self._leave_out()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights."""
        self._leave_out()
        self._weights.keep(model, round(state.epoch), state.num_train_epochs)

    def _leave_out(self) -> None:
        """Count the time from the last event to this one, without the balancing callback's."""
        self.seconds += self._begin.time - self._resumed
        self._add()
        self._resumed = time.perf_counter()


def _read(cfg: DictConfig) -> Examples:
    """Read the examples.

    Raises:
        RecipeError: A data file is at fault, or what is predicted are no classes.
    """
    examples: Examples = build(cfg, "data").read()
    if not examples.classes:
        raise RecipeError(
            f"a study compares {metric_of(cfg)}: it needs data with classes, got a {examples.task.kind} to predict"
        )
    return examples


def _evaluate(run: Run) -> dict[str, float]:
    """Return the scores of the weights that the model has now, on validation and on test data."""
    return {**score(run.trainer, run.val, "val"), **score(run.trainer, run.test, "test")}


@contextlib.contextmanager
def _temporary_folder(cfg: DictConfig) -> Iterator[DictConfig]:
    """Yield the settings with a folder for the Trainer, which wants one; it is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        own = cfg.copy()
        own.training.output_dir = folder
        yield own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers print no progress and no warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
