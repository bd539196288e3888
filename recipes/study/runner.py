"""Bring a study to its end: hand out runs, keep what they find, show how far it is.

The state of a study is the results that are in its folders, and nothing else: `recipes.study.plan` says from them
which runs are missing. Each finished run is written before the next one is asked about, so a study can be stopped
or killed at any moment and goes on there.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from statistics import mean
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table

from farms_tb.weights.names import counted
from recipes.console import progress_bar, warn
from recipes.engine import Engine, Outcome
from recipes.errors import RecipeError
from recipes.study.cells import Cell, Study
from recipes.study.engines import make_engine
from recipes.study.one_run import run_quietly
from recipes.study.plan import ArmPlan, Search, Tuning, plan_arm
from recipes.study.programs import load_program
from recipes.study.records import Job, Record, read_records, write_records
from recipes.study.settings import check_settings, keep_settings, locked

__all__ = ["arm_plan", "check_cell", "run_study", "show_plan"]

Results = dict[str, dict[Job, Record]]
"""The finished runs, by name of the cell."""

TRIES = 3
"""A run whose process dies is tried so many times."""

_WITH_DIGITS = re.compile(r"\S*\d\S*")
"""Words with a digit in them, which differ between warnings that say the same of different layers and numbers."""


def run_study(study: Study, console: Console) -> Results:
    """Do every run that is not done yet; return all finished runs of each cell.

    Raises:
        RecipeError: A setting, a folder or a run is at fault, or another process is at work in the folder.
    """
    made_by = {cell.name: check_cell(cell) for cell in study.cells}
    with contextlib.ExitStack() as stack:
        for cell in study.cells:
            stack.enter_context(locked(cell))
        for cell in study.cells:  # once all folders are this command's
            check_settings(cell)
        for cell in study.cells:
            keep_settings(cell, made_by[cell.name])
        results = {cell.name: read_records(cell.folder) for cell in study.cells}
        _Progress(study, results, console).run()
    return results


def check_cell(cell: Cell) -> dict[str, Any]:
    """Build every arm once, and throw it away: a mistake shows before time is spent.

    Returns:
        By arm, what its data file says of how it was made; None for other data.

    Raises:
        RecipeError: A part refuses its settings, or two parts do not fit.
    """
    program = load_program(cell.options.program)
    return {arm: program.build_once(cfg) for arm, cfg in cell.arms.items()}


def arm_plan(cell: Cell, arm: str, finished: Mapping[Job, Record]) -> ArmPlan:
    """Return what an arm of a cell needs, by the runs that are finished."""
    options = cell.options
    search = Search(arm, cell.lr(arm), options.grid_of(arm), options.tune_seeds, options.extend)
    return plan_arm(search, options.seeds, finished)


def show_plan(study: Study, console: Console) -> None:
    """Print what is left to do and, by the runs that are finished, what it will cost; begin nothing.

    Raises:
        RecipeError: The study would be refused, as a folder holds results of other settings.
    """
    table = Table("cell", "arm", "runs", "done", "core-hours left")
    left, unknown = 0.0, False
    for cell in study.cells:
        check_settings(cell)
        records = read_records(cell.folder)
        for arm in cell.options.arms:
            plan = arm_plan(cell, arm, records)
            known = [record.seconds for job, record in records.items() if job.arm == arm]
            known = known or [record.seconds for record in records.values()]
            cost = "unknown: no run is finished"
            if known:
                hours = (plan.total - plan.done) * mean(known) / 3600
                left += hours
                cost = f"{hours:.2f}"
            unknown = unknown or not known
            table.add_row(escape(cell.name), escape(arm), str(plan.total), str(plan.done), cost)
    console.print(table)
    if left or not unknown:
        more = ", and those of the arms whose cost is unknown" if unknown else ""
        console.print(f"{left:.2f} core-hours left{more}, if no search for a learning rate grows")


class _Progress:
    """The state of a study that is going on.

    Args:
        study: The study.
        results: The finished runs of each cell; runs that finish are added.
        console: Where progress is shown.
    """

    def __init__(self, study: Study, results: Results, console: Console) -> None:
        self._cells = {cell.name: cell for cell in study.cells}
        self._study = study
        self._begun, self._slots, self._finished = 0.0, 1, 0
        self._failures: dict[tuple[str, Job], Outcome] = {}
        self._deaths: Counter[tuple[str, Job]] = Counter()
        self._results = results
        self._console = console
        self._said: set[tuple[str, ...]] = set()
        self._plans: dict[tuple[str, str], ArmPlan] = {}
        for cell in study.cells:
            for arm in cell.options.arms:
                self._plans[cell.name, arm] = arm_plan(cell, arm, results[cell.name])

    def _missing(self) -> list[tuple[str, Job]]:
        """Return the runs that can be started now, with the names of their cells.

        Searches come first, then one seed after the other of all arms and cells, so that a study that ends early
        has pairs. No process waits: those that the searches have no run for begin with final runs of arms whose
        rate is found, and these arms are ahead until the others have caught up.
        """
        missing: list[tuple[str, Job]] = []
        # An error in one run of an arm comes in all of them; that a process died says nothing of the others.
        broken = {(name, job.arm) for (name, job), outcome in self._failures.items() if not outcome.died}
        for (name, arm), plan in self._plans.items():
            if (name, arm) not in broken:
                missing += [(name, job) for job in plan.missing if (name, job) not in self._failures]
        return sorted(missing, key=lambda key: (key[1].phase == "final", key[1].seed))

    def run(self) -> None:
        """Work until no run is missing that can be done.

        Raises:
            RecipeError: Runs failed; those that do not depend on them are done.
        """
        if self._missing():
            time_left = TextColumn("{task.fields[left]}")
            with make_engine(self._study) as engine, progress_bar(self._console, time_left) as bar:
                self._begun = time.monotonic()
                task = bar.add_task("runs", total=self._total(), completed=self._done(), left="")
                while self._hand_out(engine):
                    for outcome in engine.finished(timeout=1.0):
                        self._take(outcome)
                    self._slots = engine.slots  # nodes come and go
                    bar.update(task, total=self._total(), completed=self._done(), left=self._left())
        self._raise_failures()
        left = self._total() - self._done()
        if left:
            stopped = f"stopped by study.minutes={self._study.resources.minutes}"
            warn(self._console, f"{stopped}: {counted(left, 'run')} left; repeat to go on")

    def _hand_out(self, engine: Engine) -> bool:
        """Begin as many runs as there is room for, and return whether any is going on."""
        going = engine.tasks
        waiting = []
        if not self._time_is_up():
            waiting = [key for key in self._missing() if key not in going]
        for name, job in waiting[: max(0, engine.slots - len(going))]:
            cell = self._cells[name]
            engine.submit((name, job), run_quietly, (cell.settings(job), cell.options.evaluations))
        return bool(engine.tasks)

    def _time_is_up(self) -> bool:
        """Return whether no run is to be begun any more."""
        minutes = self._study.resources.minutes
        return minutes is not None and time.monotonic() - self._begun > 60 * minutes

    def _take(self, outcome: Outcome) -> None:
        """Keep what a run has found, or note that it failed."""
        name, job = cast(tuple[str, Job], outcome.task)
        if not outcome.failure:
            facts, messages = outcome.result
            self._keep(name, job, facts)
            self._tell(name, job.arm, messages)
            return
        self._deaths[name, job] += 1
        if outcome.died and self._deaths[name, job] < TRIES and not self._time_is_up():
            warn(self._console, f"{name} {job}: {outcome.failure}; it is tried again")
            return
        self._failures[name, job] = outcome

    def _raise_failures(self) -> None:
        """Name the runs that failed, at the end."""
        if not self._failures:
            return
        (key, outcome), *rest = self._failures.items()
        for other, its in rest:
            warn(self._console, f"the run {other} failed: {its.failure}")
        more = f", and {len(rest)} more, named above" if rest else ""
        others = "Runs that do not depend on it are done"
        if self._time_is_up():
            others = "Other runs are left, as study.minutes has passed"
        raise RecipeError(
            f"the run {key} failed{more}: {outcome.failure}. {others}; repeat the command to try again"
        )

    def _keep(self, name: str, job: Job, facts: dict[str, object]) -> None:
        """Write a finished run, plan its arm again, and print the learning rate where this run has decided it."""
        cell = self._cells[name]
        record = Record(experiment=name, **job._asdict(), **facts, config=cell.fingerprint(job.arm))  # type: ignore[arg-type]
        self._results[name][job] = record
        self._finished += 1
        write_records(cell.folder, self._results[name].values())
        before = self._plans[name, job.arm].tuning
        plan = arm_plan(cell, job.arm, self._results[name])
        self._plans[name, job.arm] = plan
        if before.best is None and plan.tuning.best is not None:
            found = escape(f"{name} {job.arm}: {_tuned(plan.tuning)}")
            self._console.print(found, highlight=False, soft_wrap=True)

    def _tell(self, name: str, arm: str, messages: list[str]) -> None:
        """Show each of the callback's warnings once an arm, whatever layers and numbers it names."""
        for message in messages:
            key = (name, arm, _WITH_DIGITS.sub("", message))
            if key not in self._said:  # hundreds of runs may give the same
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
        left = timedelta(seconds=round(seconds / self._slots))
        rate = 3600 * self._finished / (time.monotonic() - self._begun)
        return f"{rate:.3g} runs an hour, about {left} left"


def _tuned(tuning: Tuning) -> str:
    """Say which learning rate was chosen, and the validation error (geometric mean) of each that was tried."""
    errors = ["diverged" if math.isinf(score) else f"{math.exp(score):.4g}" for score in tuning.scores]
    tried = [f"{lr:g}: {error}" for lr, error in zip(tuning.lrs, errors, strict=True)]
    return f"lr {tuning.best:g} (validation error of each: {', '.join(tried)})"
