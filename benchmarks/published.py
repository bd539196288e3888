"""The runs of the studies in `docs/results`."""

from __future__ import annotations

from pathlib import Path

from recipes.study.records import RESULTS_FILE, Job, Record, read_file

BASELINE = "off"
"""The arm without balancing, which all others are compared with."""

RESULTS = Path("docs/results")


def published_runs(folder: str, cell: str, results: Path = RESULTS) -> dict[Job, Record]:
    """Return the runs of a cell that are compared.

    Args:
        folder: of its `results.csv`, below `results`.
        cell: its name there.
        results: folder of all results.
    """
    records = read_file(results / folder / RESULTS_FILE)
    return {record.job: record for record in records if record.experiment == cell and record.phase == "final"}
