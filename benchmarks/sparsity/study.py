"""What is run: every arm at the same achieved sparsity and the same epsilon, the most telling runs first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from benchmarks.results import Value
from benchmarks.rows import Row, Rows
from benchmarks.sparsity.arms import (
    ARMS,
    MEASUREMENTS,
    SEARCHES,
    SHUFFLES,
    TUNED,
    UNEVEN,
    alpha_rows,
    plan_of,
)
from benchmarks.sparsity.subjects import Calibration, Subject
from farms_tb import analyze
from farms_tb.sparsity import SparsityPlan, compare_with_depth, prune
from farms_tb.sparsity.search import model_loss, weights_put_back

__all__ = ["EPSILONS", "EPSILON_KEYS", "KEYS", "METHODS", "TARGETS", "Study", "best_epsilon", "runs"]

KEYS = ("method", "target", "arm", "seed")
EPSILON_KEYS = ("epsilon", "arm")
EPSILONS = (0.05, 0.1, 0.2, 0.3)
METHODS = ("wanda", "magnitude", "sparsegpt")
TARGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
LONG = 3
"""How much more text the long search chooses and confirms by."""
EPSILON_TARGET = 0.7
"""Where epsilon is chosen, by Wanda; all targets and methods have the same."""

_CALIBRATED = TARGETS[:3]
_SEEDS = (0, 1)
_UNSEARCHED = tuple(arm for arm in ARMS if arm not in (*SEARCHES, *TUNED))
_PLAIN = tuple(arm for arm in _UNSEARCHED if arm not in SHUFFLES)
_ONCE = (*_PLAIN, "search")


def runs(name: str) -> list[Row]:
    """Return what each run of a model is of, the most telling ones first.

    Args:
        name: `"language"` or `"encoder"`.
    """
    return [
        {"method": method, "target": target, "arm": arm, "seed": seed}
        for method, target, seed, arms in _cells(name)
        for arm in arms
    ]


def _cells(name: str) -> Iterator[tuple[str, float, int, Sequence[str]]]:
    """Yield method, target, calibration seed and arms, in order.

    Magnitude needs no calibration data. SparseGPT is slow: it has no search, and is left out for the encoder.
    Permutations are random enough with one calibration seed, and have two where they differ most. The encoder's
    line and shrunk effects are best at the epsilon of all arms.
    """
    for target, seed in product(_CALIBRATED, _SEEDS):
        yield "wanda", target, seed, _ONCE
    for target in _CALIBRATED:
        yield "wanda", target, 0, SHUFFLES
    yield "wanda", _CALIBRATED[0], 1, SHUFFLES
    yield "wanda", 0.5, 0, ("long search",)
    for arms, target in product((_UNSEARCHED, ("search",)), TARGETS):
        yield "magnitude", target, 0, arms
    if name == "language":
        yield from _more_of_the_language_model()
    for target, seed in product(TARGETS[3:], _SEEDS):
        yield "wanda", target, seed, _PLAIN


def _more_of_the_language_model() -> Iterator[tuple[str, float, int, Sequence[str]]]:
    """Yield what the language model is pruned by, and the encoder is not."""
    for target, seed in product(_CALIBRATED, _SEEDS):
        yield "wanda", target, seed, tuple(TUNED)
    for arms, seed in ((_UNSEARCHED, 0), (_PLAIN, 1)):
        for target in _CALIBRATED:
            yield "sparsegpt", target, seed, arms


def best_epsilon(rows: Sequence[Row], arms: Collection[str] = UNEVEN) -> float:
    """Return the epsilon with the smallest loss on calibration text, the mean over some of the uneven arms.

    Args:
        rows: of the file of epsilons.
        arms: which; all by default.
    """

    def loss(epsilon: float) -> float:
        losses = [row["loss"] for row in rows if row["epsilon"] == epsilon and row["arm"] in arms]
        return float(np.mean([float(loss) for loss in losses]))

    return min(EPSILONS, key=loss)


@dataclass
class Study:
    """One model, pruned by every arm.

    Attributes:
        subject: the model and its texts.
        layers: its alphas; they are measured once.
        epsilons: the losses that epsilon is chosen by; they are measured once.
        runs: a row for each run.
    """

    subject: Subject
    layers: Rows
    epsilons: Rows
    runs: Rows

    def measure_alphas(self) -> None:
        """Measure the alphas of the dense model, where there are none yet."""
        if not self.layers:
            reports = {key: analyze(self.subject.model, **options) for key, options in MEASUREMENTS.items()}
            self.layers.add(alpha_rows(reports))

    def measure_dense(self) -> None:
        """Judge the dense model, where there is no row of it yet."""
        for run in self.runs.missing([{"method": "none", "target": 0.0, "arm": "dense", "seed": 0}]):
            self.runs.add([{**run, "epsilon": 0.0, "sparsity": 0.0, **self._judged()}])

    def measure(self, run: Mapping[str, Value]) -> None:
        """Prune by one arm and add the row of its losses."""
        method, target, seed = str(run["method"]), float(run["target"]), int(run["seed"])
        epsilon = self._epsilon(str(run["arm"]))
        calibration = self.subject.calibration(seed)
        sequences = LONG if run["arm"] == "long search" else 1
        batches = self.subject.calibration(seed, sequences).for_search
        search = {"model": self.subject.model, "calibration": batches, "prune_method": method}
        plan = plan_of(str(run["arm"]), self.layers, target, epsilon, **search)
        found = _facts(plan)
        with weights_put_back(self.subject.model, plan):
            sparsity = _pruned(self.subject, plan, method, calibration)
            judged = self._judged()
        self.runs.add([{**run, "epsilon": epsilon, "sparsity": sparsity, **found, **judged}])

    def _judged(self) -> Row:
        """Return the loss of the model as it is now, on all segments and on each."""
        losses = self.subject.losses(self.subject.model)
        of_segments = {f"segment {place}": float(loss) for place, loss in enumerate(losses)}
        return {"loss": float(losses.mean()), **of_segments}

    def _epsilon(self, arm: str) -> float:
        """Return the epsilon of an arm: that of all arms, or its own; chosen by Wanda and the first seed."""
        calibration = self.subject.calibration(0)
        wanted = [{"epsilon": epsilon, "arm": arm} for epsilon in EPSILONS for arm in UNEVEN]
        for run in self.epsilons.missing(wanted):
            plan = plan_of(str(run["arm"]), self.layers, EPSILON_TARGET, float(run["epsilon"]))
            with weights_put_back(self.subject.model, plan):
                _pruned(self.subject, plan, "wanda", calibration)
                loss = _mean_loss(self.subject, calibration)
            self.epsilons.add([{"target": EPSILON_TARGET, **run, "loss": loss}])
        return best_epsilon(self.epsilons, [TUNED[arm]] if arm in TUNED else UNEVEN)


def _pruned(subject: Subject, plan: SparsityPlan, method: str, calibration: Calibration) -> float:
    """Prune the model; return the share of zeros that was achieved."""
    batches = None if method == "magnitude" else calibration.prune
    return prune(subject.model, plan, method, calibration=batches).sparsity


def _mean_loss(subject: Subject, calibration: Calibration) -> float:
    """Return the mean loss of the model as it is now, on calibration text that took no part in the pruning."""
    with torch.no_grad():
        return float(np.mean([model_loss(subject.model, batch) for batch in calibration.choose]))


def _facts(plan: SparsityPlan) -> Row:
    """Return how uneven a plan is, and what a search found."""
    compared = compare_with_depth(plan)
    row: Row = {"from uniform": compared.from_uniform, "correlation with depth": compared.correlation or 0.0}
    found = plan.options.get("search")
    if found:
        row |= {f"c {name}": value for name, value in found["coefficients"].items()}
        row |= {"evaluations": found["evaluations"]}
    return row
