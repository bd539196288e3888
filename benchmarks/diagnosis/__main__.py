"""What alpha and its rivals say of layers whose state is known, and of networks whose test error is.

    python -m benchmarks.diagnosis                 # about 40 minutes on one idle core; goes on where it stopped
    python -m benchmarks.diagnosis --parts real    # one part
    python -m benchmarks.diagnosis --report        # tables and pictures again, from the CSV files

Three parts:

- `held_back`: one layer of a network was frozen, or trained with a fraction of the learning rate. Which measure
  ranks it as the least trained?
- `generalisation`: MLPs of several widths, decays, label noises, data sizes and depths. Which summary of the
  layers goes with the test error?
- `real`: the layers of real models (`make real`).

WeightWatcher is compared where it can be imported, for example after
`pip install --no-deps --target FOLDER weightwatcher powerlaw` and with `PYTHONPATH=FOLDER`.

Writes a CSV file and a picture for each part, and the tables of `README.md`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.diagnosis import generalisation, held_back, real, report
from benchmarks.diagnosis.measures import weightwatcher_version
from benchmarks.machine import describe
from benchmarks.results import Value, publish
from benchmarks.rows import Row, Rows

PARTS = ("held_back", "generalisation", "real")


def _run(rows: Rows, wanted: Sequence[Mapping[str, Value]], measure: Callable[..., None]) -> None:
    """Measure what has no row yet."""
    missing = list(rows.missing(wanted))
    for position, run in enumerate(missing, start=1):
        measure(run, rows)
        print(f"{rows.path.stem}: {position} of {len(missing)}", flush=True)


def _measure(part: str, rows: Rows, options: argparse.Namespace) -> None:
    """Measure one part as far as it is missing."""
    if part == "held_back":
        _run(rows, held_back.runs(options.seeds), held_back.measure)
    elif part == "generalisation":
        _run(rows, generalisation.runs(options.nets), generalisation.measure)
    else:
        runs = [{"model": model} for model in real.MODELS]
        _run(rows, runs, lambda run, rows: rows.add(real.layers_of(run["model"], real.MODELS[run["model"]]())))


def _held_back_page(out: Path, rows: Sequence[Row]) -> str:
    """Draw the part and return its section of the page."""
    report.draw_held_back(out / "held_back.png", rows)
    counts = {name: len({row["seed"] for row in rows if row["network"] == name}) for name in held_back.NETWORKS}
    seeds = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        "## One layer held back\n\nShare of the other layers ranked as better trained, mean over the networks "
        f"(seeds: {seeds}):\n\n{report.held_back_table(rows)}\n\n"
        "![Share of the other layers ranked as better trained, by network and measure](held_back.png)\n\n"
        f"Paired differences, over the same networks and seeds:\n\n{report.difference_table(rows)}\n\n"
        f"Share of layers that WeightWatcher calls under-trained:\n\n{report.warning_table(rows)}"
    )


def _generalisation_page(out: Path, rows: Sequence[Row]) -> str:
    """Draw the part and return its section of the page."""
    report.draw_generalisation(out / "generalisation.png", rows)
    return (
        f"## Which network generalises\n\nKendall's tau with the test error, {len(rows)} networks:\n\n"
        f"{report.generalisation_table(rows)}\n\n"
        "![Kendall's tau of each summary, and the mean effect against the test error](generalisation.png)"
    )


def _real_page(out: Path, rows: Sequence[Row]) -> str:
    """Draw the part and return its section of the page."""
    report.draw_real(out / "real.png", rows, real.KNOWN)
    return (
        f"## Real models\n\n{report.real_table(rows, real.KNOWN)}\n\n"
        "![Effect of each layer of the real models](real.png)"
    )


PAGES = {"held_back": _held_back_page, "generalisation": _generalisation_page, "real": _real_page}
KEYS = {"held_back": held_back.KEYS, "generalisation": generalisation.KEYS, "real": ("model",)}


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnosis", description="What the metrics say")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each network and factor of held_back")
    parser.add_argument("--nets", type=int, default=30, help="networks of each depth of generalisation")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/results/diagnosis"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for part in PARTS:
        rows = Rows(options.out / f"{part}.csv", KEYS[part])
        if part in options.parts and not options.report:
            _measure(part, rows, options)
        if rows:
            sections.append(PAGES[part](options.out, rows))
    version = weightwatcher_version() or "not installed"
    sections.append(f"```\n{describe('cpu', 'numpy')}\nWeightWatcher {version}\n```")
    publish(options.out, "\n\n".join(sections))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
