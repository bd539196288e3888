"""Bring a study to its end: hand out runs, keep what they find, show how far it is.

The state of a study is the results that are in its folders, and nothing else: `recipes.study.plan` says from them
which runs are missing. Each finished run is written before the next one is asked about, so a study can be stopped
or killed at any moment and goes on there.
"""

from __future__ import annotations

import contextlib
import math
import re
from datetime import timedelta
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recipes.children import available_cores
from recipes.console import warn
from recipes.study.cells import Cell, Study
from recipes.study.plan import ArmPlan, Search, Tuning, plan_arm
from recipes.study.records import Job, Record, read_records, write_records
from recipes.study.settings import check_cell, keep_settings, locked
from recipes.study.workers import Workers

__all__ = ["run_study"]

Results = dict[str, dict[Job, Record]]
"""The finished runs, by name of the cell."""

_WITH_DIGITS = re.compile(r"\S*\d\S*")
"""Words with a digit in them, which differ between warnings that say the same of different layers and numbers."""


def run_study(study: Study, console: Console) -> Results:
    """Do every run that is not done yet.

    Args:
        study: The study.
        console: Where progress is shown.

    Returns:
        All finished runs of each cell.

    Raises:
        RecipeError: A setting, a folder or a run is at fault, or another process is at work in the folder.
    """
    for cell in study.cells:
        check_cell(cell)
    with contextlib.ExitStack() as stack:
        for cell in study.cells:
            stack.enter_context(locked(cell))
            keep_settings(cell)
        results = {cell.name: read_records(cell.folder) for cell in study.cells}
        _Progress(study, results, console).run()
    return results


class _Progress:
    """The state of a study that is going on.

    Args:
        study: The study.
        results: The finished runs of each cell; runs that finish are added.
        console: Where progress is shown.
    """

    def __init__(self, study: Study, results: Results, console: Console) -> None:
        self._cells = {cell.name: cell for cell in study.cells}
        self._count = study.workers or available_cores()
        self._results = results
        self._console = console
        self._said: set[tuple[str, ...]] = set()
        self._plans: dict[tuple[str, str], ArmPlan] = {}
        for cell in study.cells:
            for arm in cell.options.arms:
                self._plans[cell.name, arm] = self._plan(cell, arm)

    def _plan(self, cell: Cell, arm: str) -> ArmPlan:
        """Return what an arm needs, by the results so far.

        Args:
            cell: The cell, for its options and the arm's own learning rate.
            arm: One of its arms.
        """
        options = cell.options
        search = Search(arm, cell.lr(arm), options.grid, options.tune_seeds, options.extend)
        return plan_arm(search, options.seeds, self._results[cell.name])

    def _missing(self) -> list[tuple[str, Job]]:
        """Return the runs that can be started now, with the names of their cells."""
        missing = []
        for (name, _), plan in self._plans.items():
            missing += [(name, job) for job in plan.missing]
        return missing

    def run(self) -> None:
        """Work until no run is missing."""
        if not self._missing():
            return
        with Workers(self._count) as workers, _progress_bar(self._console) as bar:
            task = bar.add_task("runs", total=self._total(), completed=self._done(), left="")
            while True:
                self._hand_out(workers)
                if not workers.tasks:
                    return
                for (name, job), facts, messages in workers.finished(timeout=1.0):
                    self._keep(name, job, facts)
                    self._tell(name, job.arm, messages)
                bar.update(task, total=self._total(), completed=self._done(), left=self._left())

    def _hand_out(self, workers: Workers) -> None:
        """Give each idle process a run, as long as there are any."""
        going = workers.tasks
        waiting = [key for key in self._missing() if key not in going]
        for name, job in waiting[: workers.idle]:
            workers.submit((name, job), self._cells[name].settings(job))

    def _keep(self, name: str, job: Job, facts: dict[str, object]) -> None:
        """Write a finished run, plan its arm again, and print the learning rate where this run has decided it.

        Args:
            name: Name of the cell.
            job: The run.
            facts: What the run has found, the fields of `Record` that are not in `job`.
        """
        cell = self._cells[name]
        record = Record(experiment=name, **job._asdict(), **facts, config=cell.fingerprint(job.arm))  # type: ignore[arg-type]
        self._results[name][job] = record
        write_records(cell.folder, self._results[name].values())
        before = self._plans[name, job.arm].tuning
        plan = self._plan(cell, job.arm)
        self._plans[name, job.arm] = plan
        if before.best is None and plan.tuning.best is not None:
            self._console.print(f"{name} {job.arm}: {_tuned(plan.tuning)}", highlight=False, soft_wrap=True)

    def _tell(self, name: str, arm: str, messages: list[str]) -> None:
        """Show each warning once an arm, whatever layers and numbers it names.

        Args:
            name: Name of the cell.
            arm: The arm.
            messages: The callback's warnings in one run; hundreds of runs may give the same.
        """
        for message in messages:
            key = (name, arm, _WITH_DIGITS.sub("", message))
            if key in self._said:
                continue
            self._said.add(key)
            warn(self._console, f"{name} {arm}: {message}")

    def _total(self) -> int:
        """Return the number of runs in all, as far as is known: a search for a learning rate may grow."""
        return sum(plan.total for plan in self._plans.values())

    def _done(self) -> int:
        """Return the number of runs of the plans that are finished."""
        return sum(plan.done for plan in self._plans.values())

    def _left(self) -> str:
        """Return an estimate of the time left, in words; empty as long as no run is finished.

        It rests on the mean time of a run in each cell, or in all cells where the cell has no finished run yet.
        """
        finished = [record for records in self._results.values() for record in records.values()]
        if not finished:
            return ""
        seconds = 0.0
        for (name, _), plan in self._plans.items():
            known = self._results[name].values() or finished
            runs_left = plan.total - plan.done
            seconds += runs_left * mean(record.seconds for record in known)
        left = timedelta(seconds=round(seconds / self._count))
        return f"about {left} left"


def _progress_bar(console: Console) -> Progress:
    """Return a bar that counts runs, with the time passed and, in the field `left`, the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
    )


def _tuned(tuning: Tuning) -> str:
    """Say which learning rate was chosen, and the validation error (geometric mean) of each that was tried.

    Args:
        tuning: A search that is over.
    """
    tried = []
    for lr, score in zip(tuning.lrs, tuning.scores, strict=True):
        error = "diverged"
        if not math.isinf(score):
            error = f"{math.exp(score):.4g}"
        tried.append(f"{lr:g}: {error}")
    return f"lr {tuning.best:g} (validation error of each: {', '.join(tried)})"
