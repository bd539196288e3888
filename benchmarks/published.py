"""The runs of the studies in `docs/results`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from recipes.study.records import RESULTS_FILE, Job, Record, read_file

BASELINE = "off"
"""The arm without balancing, which all others are compared with."""

RESULTS = Path("docs/results")


def published_runs(
    folder: str, cell: str, results: Path = RESULTS, arms: Collection[str] = ()
) -> dict[Job, Record]:
    """Return the runs of a cell that are compared.

    Args:
        folder: of its `results.csv`, below `results`.
        cell: its name there.
        results: folder of all results.
        arms: those that are needed.

    Raises:
        ValueError: an arm that is needed has no runs there.
    """
    records = read_file(results / folder / RESULTS_FILE)
    runs = {record.job: record for record in records if record.experiment == cell and record.phase == "final"}
    missing = sorted(set(arms) - {job.arm for job in runs})
    if missing:
        raise ValueError(f"{folder} has no final runs of {cell} for {', '.join(missing)}")
    return runs


def published_search(folder: str, cell: str, results: Path = RESULTS) -> dict[Job, Record]:
    """Return the runs of a cell that tried learning rates.

    Args:
        folder: of its `results.csv`, below `results`.
        cell: its name there.
        results: folder of all results.
    """
    records = read_file(results / folder / RESULTS_FILE)
    return {record.job: record for record in records if record.experiment == cell and record.phase == "tune"}
