"""Accuracy on multiple-choice tasks without examples, by lm-evaluation-harness (`lm-eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from farms_tb.missing import cannot_import
from farms_tb.options import check_integer
from farms_tb.sparsity.calibration import without_network
from farms_tb.sparsity.evaluating import evaluating

PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the pruning papers, which report the mean of their accuracies."""


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy of a model on one task.

    Attributes:
        task: name of the task in `lm-eval`.
        accuracy: share of right answers, `acc`: the papers do not use `acc_norm`.
        error: standard error of `accuracy` over questions.
        samples: questions that were asked.
    """

    task: str
    accuracy: float
    error: float
    samples: int

    def __str__(self) -> str:
        return f"{self.task}: {self.accuracy:.4f} ± {self.error:.4f} ({self.samples} questions)"


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    task_folder: str | PathLike[str] | None = None,
) -> list[TaskAccuracy]:
    """Measure the accuracy of a language model on tasks of `lm-eval`, without examples in the prompt.

    Args:
        model: a causal language model of `transformers`, on the device where it shall run. Its modes are put back.
        tokenizer: its tokenizer.
        tasks: names of tasks that have the metric `acc`.
        limit: only the first so many questions of each task; the papers take 2000 for LLaMA-65B.
        batch_size: questions of one call of the model.
        task_folder: a folder with YAML files of tasks, which are known in place of those of `lm-eval`.

    Returns:
        Accuracy and its standard error of each task, in the order of `tasks`.

    Raises:
        ImportError: `lm-eval` is not installed.
        TypeError: `tasks` is a single string, or empty.
        FileNotFoundError: data of a task are not on this machine. The message says how to fetch them; nothing is
            downloaded here.
        ValueError: there is no such task, it is a group of tasks, or it has no accuracy.
    """
    check_integer("batch_size", batch_size, at_least=1)
    if isinstance(tasks, str) or not tasks:
        raise TypeError(f"tasks must be a list of names of tasks, ['arc_easy'] for example, got {tasks!r}")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(cannot_import("zero_shot", error, 'pip install "farms-tb[lm-eval]"')) from error
    if task_folder is None:
        manager = TaskManager()
    else:
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    _check_known(tasks, manager)
    try:
        with evaluating(model), without_network():
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                num_fewshot=0,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            "data of a task are not on this machine, and nothing is downloaded without being asked for: run "
            f"`lm_eval --model dummy --limit 1 --tasks {','.join(tasks)}` once where there is a network"
        ) from error
    return [_accuracy_of(task, found) for task in tasks]


def _check_known(tasks: Sequence[str], manager: Any) -> None:
    """Refuse tasks that the `TaskManager` of `lm-eval` does not know, and groups of tasks."""
    unknown = [task for task in tasks if task not in manager.all_subtasks]
    if unknown and unknown[0] in manager.all_tasks:
        raise ValueError(
            f"{unknown[0]!r} is a group of tasks, not one: pass those in it, as `lm_eval ls subtasks` names them"
        )
    if unknown:
        raise ValueError(
            f"there is no task {unknown[0]!r}: `lm_eval ls tasks` lists those of lm-eval; pass task_folder for "
            "tasks of your own"
        )


def _accuracy_of(task: str, found: Any) -> TaskAccuracy:
    """Return the accuracy of one task from the results of `simple_evaluate`."""
    metrics = found["results"][task]
    if "acc,none" not in metrics:
        measured = ", ".join(sorted(name for name in metrics if "," in name))
        raise ValueError(f"the task {task!r} has no accuracy, only {measured}: leave it out")
    return TaskAccuracy(
        task=task,
        accuracy=float(metrics["acc,none"]),
        error=float(metrics["acc_stderr,none"]),
        samples=int(found["n-samples"][task]["effective"]),
    )
