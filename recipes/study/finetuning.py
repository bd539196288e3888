"""What a study needs of `python -m recipes.finetune`, see `recipes.study.programs`.

Data, network, callback and Trainer of a run are built as the command builds them, and a run ends with the weights
that the command has after its last epoch.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import transformers
from omegaconf import DictConfig, open_dict
from transformers import TrainerCallback

from recipes.config import build, build_balancer, check_values
from recipes.errors import RecipeError
from recipes.finetune.building import Run, build_run, score
from recipes.finetune.data import Examples
from recipes.finetune.published import register_resolver
from recipes.finetune.records import epochs_begun
from recipes.study.course import Ratios, Weights
from recipes.study.one_run import Trained
from recipes.study.records import SHARES

__all__ = ["METRIC_SETTING", "build_once", "metric_of", "prepare", "train", "uses_gpu"]

METRIC_SETTING = "training.metric_for_best_model"
_KEEP_NOTHING = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "greater_is_better": True,  # of both metrics; it chooses checkpoints, of which a study keeps none
    "report_to": "none",
    "disable_tqdm": True,
}
_PROBE = 0.123  # a learning rate that nobody sets


def prepare(cfg: DictConfig) -> None:
    """Check the settings of an arm, and let its runs log and keep nothing; see `recipes.study.programs`."""
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
    """Return the name of the score that is compared; one without an error of blind guessing is refused."""
    metric = str(cfg.training.metric_for_best_model).removeprefix("eval_")
    if metric not in SHARES:
        raise RecipeError(
            f"a study compares errors: training.metric_for_best_model must be one of {', '.join(SHARES)}, "
            f"got {metric}"
        )
    return metric


def build_once(cfg: DictConfig) -> None:
    """Build the parts of a run and throw them away; see `recipes.study.programs`."""
    examples = _read(cfg)
    few = replace(examples, train=examples.train[:1], val=examples.val[:1], test=examples.test[:1])
    balancer = build_balancer(cfg)
    with _quiet(), _temporary_folder(cfg) as own:
        own.training.use_cpu = not own.training.get("fp16", False)  # leaves the GPUs to the processes that train
        build_run(own, few, [] if balancer is None else [balancer])


def uses_gpu(cfg: DictConfig) -> bool:
    """Return whether a run may train on a GPU."""
    return not cfg.training.use_cpu


def train(cfg: DictConfig, evaluations: int) -> Trained:
    """Train, then validate and test; see `recipes.study.one_run.run_once`."""
    with _quiet(), _temporary_folder(cfg) as own:
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
        scores = {epoch: _evaluate(run) for epoch in weights.epochs(run.model, epochs_begun(state.epoch))}
    facts = {
        "blind_error": 1.0 - 1.0 / len(examples.classes),
        "steps": state.global_step,
        "train_seconds": round(course.seconds, 4),
        "callback_seconds": 0.0 if balancer is None else round(course.callback_seconds, 4),
        "val_samples": len(examples.val),
        "test_samples": len(examples.test),
        "device": str(run.trainer.args.device),
    }
    return Trained(run.model, ratios, scores, facts)


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
        self._epoch_start = 0.0

    def _add(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time of an event of the balancing callback, which has just ended."""
        self.callback_seconds += time.perf_counter() - self._begin.time

    on_train_begin = on_step_end = on_train_end = _add

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count the time of an epoch."""
        self._add(args, state, control)
        self._epoch_start = self._clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the ratios."""
        self._add(args, state, control)
        self._ratios.note()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Count the time of the epoch, and keep the weights."""
        self._add(args, state, control)
        self.seconds += self._clock() - self._epoch_start
        self._weights.keep(model, epochs_begun(state.epoch), state.num_train_epochs)

    def _clock(self) -> float:
        """Return the time of a clock that stands still while the balancing callback is at work."""
        return time.perf_counter() - self.callback_seconds


def _read(cfg: DictConfig) -> Examples:
    """Read the examples; what is predicted must be classes."""
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
