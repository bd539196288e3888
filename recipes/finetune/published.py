"""The numbers of Model Balancing (Liu et al., EMNLP 2024, arXiv 2410.12178), each once.

For each cell, a task at a fraction of its training examples, the paper searched the learning rate among 1e-5, 2e-5
and 3e-5 and the batch among 16 and 32, and does not print what was chosen. QNLI alone has them in a script. The
other tasks have the middle of the grid and the smaller batch here.

The strength of the sigmoid map was chosen for each cell, too, by the scores that the paper reports. A run with it
repeats the paper's setting, and is no evidence for the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import OmegaConf

from recipes.errors import RecipeError
from recipes.finetune.draw import read_fraction
from recipes.finetune.tasks import TASKS

__all__ = ["published", "register_resolver"]

_Pair = tuple[float, float]


@dataclass(frozen=True)
class _Training:
    """Learning rate and batch."""

    learning_rate: float
    batch_size: int


_GROUPS = {
    "glue": _Training(2e-5, 16),
    "superglue": _Training(2e-5, 16),
    "squad": _Training(2e-5, 24),
    "domain": _Training(3e-5, 16),
}

# QNLI by fraction: of the plain arm, of the balanced one.
_QNLI = {
    0.05: (_Training(2e-5, 32), _Training(3e-5, 32)),
    0.01: (_Training(3e-5, 16), _Training(3e-5, 16)),
    0.005: (_Training(2e-5, 16), _Training(2e-5, 16)),
    0.001: (_Training(3e-5, 16), _Training(3e-5, 16)),
    0.0005: (_Training(2e-5, 4), _Training(3e-5, 8)),
    0.0002: (_Training(3e-5, 4), _Training(3e-5, 4)),
}

_LARGE = (0.05, 0.01, 0.005, 0.001, 0.0005, 0.0002)
_SMALL = (0.5, 0.2, 0.1)


def _by_fraction(fractions: tuple[float, ...], *strengths: float | _Pair) -> Mapping[float, _Pair]:
    """Return strengths (below the mean alpha, above it) by fraction; one number stands for both."""
    pairs = [strength if isinstance(strength, tuple) else (strength, strength) for strength in strengths]
    return dict(zip(fractions, pairs, strict=True))


_STRENGTHS = {
    "sst2": _by_fraction(_LARGE, (2, 1), 1.25, 1, (2, 1), 1.25, 1.25),
    "mnli": _by_fraction(_LARGE, 1.25, 1.25, 1.25, 1, 0.5, 1.25),
    "qnli": _by_fraction(_LARGE, (2, 1), 1, 1, 1.25, 1.25, 0.25),
    "qqp": _by_fraction(_LARGE, 1.25, 1, 1.25, 1.25, 1, 1.25),
    "cola": _by_fraction(_SMALL, 1.25, 1, 1),
    "mrpc": _by_fraction(_SMALL, 1.25, 1.25, 1),
    "stsb": _by_fraction(_SMALL, 0.75, 0.5, 1),
    "rte": _by_fraction(_SMALL, 1.25, 0.5, 1.25),
}
"""The sigmoid map's strengths by task and fraction of the training examples."""

_OTHER_STRENGTH = (1.0, 1.0)


def published(name: str, task: str, fraction: float | str, arm: str) -> float | int | str:
    """Return a setting of the paper; the resolver `${published:...}` of the configs.

    Args:
        name: `learning_rate`, `batch_size`, `sigmoid_min`, `sigmoid_max`, or `score`, by which the best epoch is
            chosen.
        task: name of the task.
        fraction: fraction of the training examples, such as 0.05 or "1/20". Those that the paper has not
            run get the numbers of the benchmark, and strength 1.
        arm: name of the arm: QNLI's learning rates and batches differ between the plain arm and the others.

    Raises:
        RecipeError: the task is unknown, or the fraction out of range.
    """
    if task not in TASKS:
        raise RecipeError(f"data.task must be one of {', '.join(TASKS)}, got {task}")
    fraction = read_fraction(fraction)
    training = _GROUPS[TASKS[task].group]
    if task == "qnli" and fraction in _QNLI:
        training = _QNLI[fraction][arm != "off"]
    low, high = _STRENGTHS.get(task, {}).get(fraction, _OTHER_STRENGTH)
    settings: dict[str, float | int | str] = {
        **vars(training),
        "sigmoid_min": float(low),
        "sigmoid_max": float(high),
        "score": TASKS[task].score,
    }
    return settings[name]


def register_resolver() -> None:
    """Let settings name the paper's: `${published:learning_rate,sst2,0.01,off}`."""
    OmegaConf.register_new_resolver("published", published, replace=True)
