"""What the Trainer tells during a run, kept in the run folder: curves in `metrics.csv`, rates of the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from recipes.callbacks import LastStepRates
from recipes.console import make_console
from recipes.loggers import METRICS_FILE, RunFolderCSVLogger

__all__ = ["CLOCKS", "MetricsCallback", "RatesCallback", "epochs_begun"]

CLOCKS = ("_runtime", "_per_second", "_preparation_time")
"""Endings of the names of metrics that differ from run to run."""


def epochs_begun(epoch: float | None) -> int:
    """Return how many epochs a training has begun; the last one may be cut short by `training.max_steps`.

    Args:
        epoch: as the Trainer counts, 2.3 after a third of the third epoch; None before it trains.
    """
    return math.ceil((epoch or 0) - 1e-6)  # rounding may put the end of an epoch just above it


class MetricsCallback(TrainerCallback):
    """Write what the Trainer logs to `metrics.csv`, under the names that the other recipes use, and print scores.

    A resumed run begins with the rows that its checkpoint has, so that no row is lost or written twice.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows = RunFolderCSVLogger(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the rows up to the checkpoint again; a new run begins with none.

        The Trainer looks for the best checkpoint where it was written. Of a run folder that was moved since, newer
        versions forget it, older ones delete it as one that is not the best: it is in the folder of this run.
        """
        name = f"checkpoint-{getattr(state, 'best_global_step', None)}"
        if state.best_model_checkpoint is not None:
            name = Path(state.best_model_checkpoint).name
        best = Path(args.output_dir, name)
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        (self._folder / METRICS_FILE).unlink(missing_ok=True)
        self._rows = RunFolderCSVLogger(self._folder)
        for row in state.log_history:
            self._add(row, row["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a row."""
        if logs:
            self._add(logs, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the validation scores."""
        scores = {_column(name): value for name, value in (metrics or {}).items()}
        line = "   ".join(f"{name} {value:.4g}" for name, value in scores.items() if name.startswith("val/"))
        make_console().print(f"epoch {state.epoch:.3g}: {line}")

    def _add(self, logs: Mapping[str, Any], step: int) -> None:
        """Write a row, which is numbered by the optimizer steps done."""
        row = {_column(name): value for name, value in logs.items() if name != "step"}
        row = {name: value for name, value in row.items() if name}
        if not row.keys() - {"epoch"}:
            return
        self._rows.log_metrics(row, step=step)
        self._rows.save()


def _column(name: str) -> str:
    """Return the column of one of the Trainer's metrics; empty for times, and for the summary of the whole run."""
    if name.endswith(CLOCKS) or name in ("total_flos", "train_loss"):
        return ""
    if name.startswith("eval_"):
        return "val/" + name.removeprefix("eval_")
    if name in ("loss", "grad_norm", "learning_rate"):
        return f"train/{name}"
    return name


class RatesCallback(TrainerCallback, ExportableState):
    """Remember the learning rate and the layers' ratios of the last step, in checkpoints too.

    Args:
        balancer: the balancing callback; None where there is none.
    """

    def __init__(self, balancer: Any) -> None:
        self.last = LastStepRates(balancer)
        self._balancer = balancer

    def state(self) -> dict[str, Any]:
        """Return the rates for `trainer_state.json`: a run that is resumed after its last step takes none."""
        return {"args": {}, "attributes": {"saved": self.last.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the rates from the checkpoint, if the run is resumed from one that has them."""
        # The Trainer's next save asks for the entry, which checkpoints of earlier versions lack.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self.last.load_state_dict(saved["attributes"]["saved"])

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note what the coming step will use; the balancing callback comes first, and has measured."""
        self.last.lr = float(optimizer.param_groups[0]["lr"])
        if self._balancer is not None:
            self.last.ratios = dict(self._balancer.ratios)
