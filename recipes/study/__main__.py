"""Does layer-wise balancing help on a task? `python -m recipes.study experiment=...`.

Trains several arms on the same seeds, each arm with a base learning rate tuned on validation data, and compares
their test errors with the baseline's, seed by seed:

    python -m recipes.study experiment=study/digits_resnet18_50          one cell
    python -m recipes.study experiment=study/darcy_fno,study/darcy_unet  several, each alone and pooled
    python -m recipes.study study=small                                  the cells of conf/study/small.yaml
    python -m recipes.study study=small study.seeds=5 trainer.max_epochs=20
    python -m recipes.study --dry-run study=small                        what is left to do, no training
    python -m recipes.study --report study=small                         tables and figures again, no training

Arms are the files of `conf/balancing`: off, monitor, full, farms, shrinkage, placebo (FARMS's ratios, wrong
layers), and so on, yours among them; and any of your own by name and settings (`study.variants`).
`conf/study.yaml` holds and explains the settings. Every other setting goes to each run as it would to
`python -m recipes.train`, or with `study.program=finetune` to `python -m recipes.finetune`.

A study that was stopped, or killed, goes on where it was when the command is repeated: `results.csv` in the cell's
folder has a row for every finished run, and is whole at any moment. More seeds and more arms may join later; any
other change of settings is refused. On CPUs neither the number of processes nor the engine changes the results:
`study.engine=ray` runs a study on a Ray cluster. A run whose process dies is tried again, twice; one that fails is
named at the end. After an error, its arm is left out of the cell.

How it is done:

- Runs of one seed share data, initial network and order of batches; with `study.vary_data` each seed has a data
  split of its own, so that the intervals cover other data too.
- The learning rate of an arm is the one with the smallest mean log validation error over seeds that are used for
  nothing else; see `recipes.study.plan.tune`. Where data are few (digits), validation images of one split are test
  images of another; every arm gains the same from that.
- Final weights are tested, not those of the best epoch.
- The effect is the mean log ratio of test errors, with a t-interval; see `recipes.study.statistics`. Its p-value
  is corrected over the arms of a cell (Holm).
- Rules of scoring, sensitivity to the rate, ratios and the effect over tasks are reported too; docs/study.md
  explains each table.
- A run that diverged is out when a learning rate is chosen; as a final run it counts with the error of a network
  that has learnt nothing: 1 - 1 / classes, ln(classes) for a loss, or 1 for nRMSE and relative L2.

With fewer than five seeds a study proves nothing, and its report says so.

Exits with status 2 and one sentence when a setting, a folder or a run is at fault.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from itertools import chain

from rich.console import Console
from rich.markup import escape

from recipes.command import user_errors
from recipes.console import make_console, quiet_lightning, warn
from recipes.errors import RecipeError
from recipes.old_names import current_overrides
from recipes.study.cells import Study, load_study
from recipes.study.findings import find, show, write
from recipes.study.pairs import Records
from recipes.study.records import RESULTS_FILE, read_records
from recipes.study.runner import run_study, show_plan
from recipes.study.settings import SETTINGS_FILE, check_settings

__all__ = ["main"]


def _report(study: Study, results: dict[str, Records], console: Console) -> None:
    """Print what was found, and write it into the folder of the study, or into that of its only cell."""
    arms = list(dict.fromkeys(chain.from_iterable(cell.options.arms for cell in study.cells)))
    first = study.cells[0]
    baseline = first.options.baseline
    own_lrs = {cell.name: cell.lr(baseline) for cell in study.cells}
    folder = study.folder
    if len(study.cells) == 1:
        folder = first.folder
    findings = find(results, own_lrs, arms, baseline)
    show(findings, console)
    written = write(findings, folder)
    if written:
        console.print(f"in {escape(str(folder))}: {', '.join(written)}; results.csv in each cell's folder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; show the user's mistakes without a traceback.

    Args:
        arguments: The arguments; None for those of the command.
    """
    parser = argparse.ArgumentParser(
        "python -m recipes.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print the tables and draw the figures of what is there, train nothing",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs that are left and what they cost, train nothing"
    )
    parser.add_argument("overrides", nargs="*", help="settings, as name=value")
    options = parser.parse_intermixed_args(arguments)
    overrides, notes = current_overrides(options.overrides)
    quiet_lightning(logging.ERROR)
    console = make_console()
    for note in notes:
        warn(console, f"warning: {note}")
    with user_errors():
        try:
            if options.dry_run:
                show_plan(load_study(overrides), console)
            else:
                _run(overrides, options.report, console)
        except KeyboardInterrupt:
            command = shlex.join(["python", "-m", "recipes.study", *(arguments or sys.argv[1:])])
            warn(console, f"stopped; to go on, repeat {command}")
            raise


def _run(overrides: Sequence[str], report_only: bool, console: Console) -> None:
    """Do what is missing, unless only a report is asked for, and report."""
    study = load_study(overrides)
    if report_only:
        results: dict[str, Records] = {cell.name: read_records(cell.folder) for cell in study.cells}
        if not any(results.values()):
            looked_at = ", ".join(str(cell.folder / RESULTS_FILE) for cell in study.cells)
            raise RecipeError(f"there is nothing to report: no finished run in {looked_at}. Check study.folder")
        _warn_of_other_settings(study, console)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = dict(run_study(study, console))
    _report(study, results, console)


def _warn_of_other_settings(study: Study, console: Console) -> None:
    """Say where a report is of runs with other settings than the command's, as far as those are noted."""
    for cell in study.cells:
        try:
            if (cell.folder / SETTINGS_FILE).exists():
                check_settings(cell)
        except RecipeError as error:
            warn(console, f"warning: {error}")


if __name__ == "__main__":
    main()
