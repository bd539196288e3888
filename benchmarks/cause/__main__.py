"""Why embedding and head of a small language model gain from a larger learning rate.

    make real                                      # the text
    python -m benchmarks.cause                     # half an hour on one idle core; goes on where it stopped
    python -m benchmarks.cause --seeds 1 --settings AdamW SGD
    python -m benchmarks.cause --report            # tables and pictures again, from the CSV files

A byte-level LLaMA of 0.23 million parameters is trained with AdamW and with SGD, plainly, with embedding and head
at five times the learning rate of the rest, and by LLR; one of 0.86 million at too high a rate, plainly and
balanced by shrunk effects. Two things are looked at:

- `steps`: at some steps, for each type of matrix: alpha, the noise of the gradient, the size of the step, and by
  how much the loss would fall if this type alone made a multiple of its step.
- `bytes`: the loss on the test text at the end, by how often a byte occurs in a training batch.

Writes a CSV file and a picture of each, and the tables of `README.md`. The study `tiny_lm_cause` has the
trainings in which one thing is changed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cause import report
from benchmarks.cause.bytes import loss_by_frequency
from benchmarks.cause.runs import SETTINGS, train
from benchmarks.cause.steps import MOMENTS, Steps
from benchmarks.machine import describe
from benchmarks.results import publish
from benchmarks.rows import Rows


def measure(setting: str, seed: int, more: Sequence[str], moments: Sequence[int], steps: Rows, ends: Rows) -> None:
    """Train once, and add the rows of what was seen.

    Args:
        setting: one of `SETTINGS`.
        seed: of the training.
        more: further settings of the training.
        moments: steps done before those that are looked at.
        steps: gets a row for each moment and type of matrix.
        ends: gets a row for each group of bytes.
    """
    watch = Steps(seed, moments)
    losses = loss_by_frequency(train(setting, seed, *more, callback=watch))
    run = {"setting": setting, "seed": float(seed)}
    steps.add([run | row for row in watch.rows])
    ends.add([run | row for row in losses])


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cause", description="Why some layers gain")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting")
    parser.add_argument("--moments", nargs="+", type=int, default=MOMENTS, metavar="STEP")
    parser.add_argument("--override", nargs="*", default=[], help="further settings of the trainings")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/results/cause"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    steps, ends = (Rows(options.out / f"{name}.csv", ("setting", "seed")) for name in ("steps", "bytes"))
    wanted = [{"setting": s, "seed": float(n + 1)} for n in range(options.seeds) for s in options.settings]
    missing = [] if options.report else list(ends.missing(wanted))
    for position, run in enumerate(missing, start=1):
        print(f"{position} of {len(missing)}: {run['setting']}, seed {run['seed']:.0f}", flush=True)
        measure(str(run["setting"]), int(run["seed"]), options.override, options.moments, steps, ends)
    page = report.page(options.out, steps, ends)
    page += f"\n\n```\n{describe('cpu', 'lightning', 'transformers')}\n```"
    publish(options.out, page)
    print(page)


if __name__ == "__main__":
    main()
