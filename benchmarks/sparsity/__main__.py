"""Does an allocation by alpha beat the uniform one, and a straight line in depth that needs no alpha?

    python -m benchmarks.sparsity                      # about two hours on one core; goes on where it stopped
    python -m benchmarks.sparsity --parts encoder      # one part
    python -m benchmarks.sparsity --report             # tables and pictures again, from the CSV files

Two models are pruned to the same achieved sparsity by every arm, and the cost is measured:

- `language`: SmolLM2-135M, judged by the perplexity of Wikipedia articles;
- `encoder`: all-MiniLM-L6-v2, judged by how far its sentence vectors turn away from the dense model's;
- `speed`: seconds and memory of plans and of pruning, see `benchmarks.sparsity.speed`.

Needs `make real`. Writes three CSV files for each model (alphas, choice of epsilon, runs), a picture, and the
tables of `README.md`. Each run is on the disk as soon as it is done.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.results import publish
from benchmarks.rows import Rows
from benchmarks.sparsity import report, speed
from benchmarks.sparsity.study import EPSILON_KEYS, KEYS, METHODS, TARGETS, Study, runs
from benchmarks.sparsity.subjects import SUBJECTS

PARTS = [*SUBJECTS, "speed"]
TITLES = {"language": "SmolLM2-135M", "encoder": "all-MiniLM-L6-v2"}


def _measure(part: str, out: Path, options: argparse.Namespace) -> None:
    """Run what has no row yet, of the targets and methods that were asked for."""
    study = Study(
        SUBJECTS[part](), Rows(out / f"{part}_alphas.csv", ("layer",)), _epsilons(part, out), _runs(part, out)
    )
    study.measure_alphas()
    study.measure_dense()
    wanted = [run for run in runs(part) if run["target"] in options.targets and run["method"] in options.methods]
    missing = list(study.runs.missing(wanted))
    for position, run in enumerate(missing, start=1):
        study.measure(run)
        print(f"{part}: {position} of {len(missing)} {run} loss {study.runs[-1]['loss']:.4f}", flush=True)


def _runs(part: str, out: Path) -> Rows:
    """Return the rows of the runs so far."""
    return Rows(out / f"{part}.csv", KEYS)


def _epsilons(part: str, out: Path) -> Rows:
    """Return the rows of the choice of epsilon so far."""
    return Rows(out / f"{part}_epsilon.csv", EPSILON_KEYS)


def _page(part: str, out: Path) -> str:
    """Draw a part and return its section of the page."""
    rows, epsilons, score = _runs(part, out), _epsilons(part, out), report.SCORES[part]
    report.draw(out / f"{part}.png", rows, score)
    sections = [
        f"## {TITLES[part]}",
        f"![{score.compared}, each arm against uniform, by method and target]({part}.png)",
        f"The {score.name} on calibration text at a target of 0.7 (Wanda, first seed), by whose mean epsilon is "
        f"chosen for everything below:\n\n{report.epsilon_table(epsilons, score)}",
    ]
    for method, (name, _) in report.METHODS.items():
        if not any(row["method"] == method for row in rows):
            continue
        sections += [
            f"### {name}",
            f"The {score.name}, by target:\n\n{report.loss_table(rows, method, score)}",
            f"The {score.compared}, with 95 % intervals; bold where better than the reference:",
            *(
                report.paired_table(rows, method, score, label)
                for label in ("uniform", "line in depth", report.OWN_LINE)
            ),
        ]
    last = {
        "Wanda, each calibration seed by itself": report.seed_table(rows, score),
        "What the searches found": report.search_table(rows),
    }
    sections += [f"### {title}\n\n{table}" for title, table in last.items() if table]
    return "\n\n".join(filter(None, sections))


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description="Allocations compared")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="sparsities", metavar="TARGET")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/results/sparsity"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for part in SUBJECTS:
        if part in options.parts and not options.report:
            _measure(part, options.out, options)
        if any(row["method"] in report.METHODS for row in _runs(part, options.out)):
            sections.append(_page(part, options.out))
    costs = Rows(options.out / "speed.csv", speed.KEYS)
    if "speed" in options.parts and not options.report:
        speed.measure_speed(costs)
    if costs:
        sections.append(f"## Cost\n\n{speed.speed_table(costs)}")
    sections.append(f"```\n{describe('cpu', 'transformers')}\n```")
    publish(options.out, "\n\n".join(sections))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
