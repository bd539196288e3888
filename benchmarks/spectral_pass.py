"""The spectral pass: what measuring a model costs, here, in the research code's way and with WeightWatcher.

    python -m benchmarks.spectral_pass                        # some minutes on two cores
    python -m benchmarks.spectral_pass --device cuda
    python -m benchmarks.spectral_pass --networks ResNet-18 --times 3

The ways to measure a model:

- `analyze`: `farms_tb.analyze` with its defaults, so with every metric of a report; on the CPU with all threads
  that torch uses, and with one;
- `windows`: one `torch.linalg.svdvals` for each FARMS window, layer by layer in a loop, then the median fit;
- `whole`: the same for whole weight matrices;
- `update`: `windows` and `whole`, as the research code does both at each update;
- `entries`: the share of `analyze` that goes into dead rows, dead columns and norms of whole matrices;
- `WeightWatcher`: `WeightWatcher(model).analyze()` with its defaults, where the package is installed. It fits by
  another method and on the CPU alone.

Times are medians of wall-clock times. The ways take turns, and a ratio is the median of those within a round, so
that what else the machine does hits both sides. The weights are random; *heavy tails* stand for trained ones,
whose eigenvalues take more accurate solvers.

Writes `pass.csv`, `pass.png` and the tables of `README.md`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe
from benchmarks.models import NETWORKS
from benchmarks.references import reference_pass, weightwatcher_pass
from benchmarks.results import BLUE, GREEN, ORANGE, PURPLE, Value, markdown_table, publish, write_csv
from benchmarks.timing import Work, rounds, wall_seconds
from farms_tb import MatrixStack, analyze
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.whole_matrix import entry_metrics
from farms_tb.viewing.plots.style import FAINT, new_figure, styled
from farms_tb.weights.layers import find_layers, read_layers

TARGET = 4
"""The aim on two CPU cores: one pass is this many times faster than an update in the research code's way."""

# Name, colour and marker of each way; without a marker it is not drawn.
WAYS = {
    "analyze": ("analyze", BLUE, "o"),
    "one_thread": ("analyze, one thread", PURPLE, "s"),
    "update": ("research code: an update", ORANGE, "D"),
    "windows": ("one SVD a window", ORANGE, ""),
    "whole": ("one SVD a whole matrix", FAINT, "v"),
    "weightwatcher": ("WeightWatcher", GREEN, "^"),
    "entries": ("dead rows and norms, a part of analyze", FAINT, ""),
}


@dataclass(frozen=True)
class Case:
    """A network, and the options to measure it with."""

    make: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    weightwatcher: bool = True


CASES = {
    # It knows no complex layers.
    **{name: Case(make, weightwatcher="FNO" not in name) for name, make in NETWORKS.items()},
    # A layer of a language model. WeightWatcher would take minutes.
    "4096 x 11008": Case(lambda: nn.Linear(4096, 11008), {"window": 2000, "window_step": 2000}, False),
}


def ways_of(case: Case, device: str) -> dict[str, Work]:
    """Return the ways to measure a network, by name."""
    torch.manual_seed(0)
    model = case.make().to(device)
    threads = torch.get_num_threads()
    weightwatcher = weightwatcher_pass() if case.weightwatcher else None

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        try:
            analyze(model, **case.options)
        finally:
            torch.set_num_threads(threads)

    ways: dict[str, Work] = {"analyze": lambda: analyze(model, **case.options)}
    if torch.device(device).type == "cpu" and threads > 1:
        ways["one_thread"] = on_one_thread
    stacks = [stack for _, stack in read_layers(find_layers(model)) if isinstance(stack, MatrixStack)]
    ways["entries"] = lambda: [entry_metrics(stack, 1.0) for stack in stacks]
    ways["windows"] = lambda: reference_pass(model, SpectrumOptions(**case.options))
    ways["whole"] = lambda: reference_pass(model, SpectrumOptions(esd="full"))
    if weightwatcher is not None and torch.device(device).type == "cpu":
        ways["weightwatcher"] = lambda: weightwatcher(model)
    return ways


def measure(name: str, device: str, times: int, limit: float) -> dict[str, Value]:
    """Return what measuring one network costs: medians in seconds, and ratios to `analyze`."""
    case = CASES[name]
    ways = ways_of(case, device)
    found = dict(
        zip(ways, rounds(list(ways.values()), times, lambda w: wall_seconds(w, device), limit), strict=True)
    )
    found["update"] = [sum(pair) for pair in zip(found["windows"], found["whole"], strict=True)]
    with torch.device("meta"):
        shapes = case.make()
    plan = analyze(shapes, **case.options)
    row: dict[str, Value] = {
        "network": name,
        "layers": len(plan.layers),
        "eigenvalues": sum(record.num_eigenvalues for record in plan.layers.values()),
        "rounds": len(found["analyze"]),
    }
    for way in WAYS:
        if way in found:
            row[way] = statistics.median(found[way])
            pairs = zip(found[way], found["analyze"], strict=True)
            row[f"{way}_ratio"] = statistics.median(taken / ours for taken, ours in pairs)
    return row


def tables(rows: Sequence[Mapping[str, Value]]) -> str:
    """Return the tables of the page: the times, and how they compare."""
    ways = [way for way in WAYS if any(way in row for row in rows)]
    times = [
        {"network": str(row["network"]), "layers": str(row["layers"]), "eigenvalues": str(row["eigenvalues"])}
        | {WAYS[way][0]: f"{1e3 * float(row[way]):.0f}" if way in row else "" for way in ways}
        for row in rows
    ]
    ratios = [
        {"network": str(row["network"]), "rounds": str(row["rounds"])}
        | {
            WAYS[way][0]: f"{row[f'{way}_ratio']:.1f}" if way in row else ""
            for way in ways
            if way not in ("analyze", "entries")
        }
        for row in rows
    ]
    return (
        f"Milliseconds:\n\n{markdown_table(times)}\n\n"
        f"How many times as long as `analyze`, medians of the ratios within a round:\n\n{markdown_table(ratios)}"
    )


@styled
def draw(path: Path, rows: Sequence[Mapping[str, Value]], device: str) -> None:
    """Draw the times of each way, and how many times slower than ours they are, a line for each network."""
    figure = new_figure(8.6, 0.8 + 0.34 * len(rows))
    times, ratios = figure.subplots(1, 2, sharey=True)
    drawn = [way for way, look in WAYS.items() if look[2] and any(way in row for row in rows)]
    labelled = {way: next(place for place, row in enumerate(rows) if way in row) for way in drawn}
    for place, row in enumerate(rows):
        shown = {way: look for way, look in WAYS.items() if way in row and look[2]}
        taken = {way: 1e3 * float(row[way]) for way in shown}
        times.plot([min(taken.values()), max(taken.values())], [place, place], color="0.88", linewidth=3, zorder=1)
        for way, (name, colour, marker) in shown.items():
            label = name if place == labelled[way] else "_"
            times.plot(taken[way], place, marker, color=colour, markersize=6, label=label, linestyle="")
        ratio = float(row["update_ratio"])
        ratios.barh(place, ratio, height=0.6, color=BLUE)
        ratios.text(ratio, place, f" {ratio:.1f}", va="center", color=BLUE, fontsize=8)
    times.set_xscale("log")
    times.set_yticks(range(len(rows)), [str(row["network"]) for row in rows])
    times.invert_yaxis()
    times.set(xlabel="milliseconds", title="One measurement of a network")
    figure.legend(loc="outside lower center", ncols=len(labelled))
    ratios.set(xlabel="update of the research code / analyze", title="How much faster")
    ratios.set_xlim(0, 1.15 * max(TARGET, *(float(row["update_ratio"]) for row in rows)))
    if torch.device(device).type == "cpu":
        ratios.axvline(TARGET, color=ORANGE, linestyle="--", linewidth=1)
        ratios.text(TARGET, -0.55, "aim", color=ORANGE, ha="center", va="bottom", fontsize=8)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral_pass", description="What a pass costs")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=int, default=7, help="rounds, of which medians are taken")
    parser.add_argument(
        "--limit", type=float, default=30.0, help="seconds for a network, after which no round begins"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/pass"))
    options = parser.parse_args()
    packages = ["weightwatcher"] if weightwatcher_pass() is not None else []
    machine = describe(options.device, *packages)
    print(machine)
    rows = []
    for name in options.networks:
        rows.append(measure(name, options.device, options.times, options.limit))
        row = rows[-1]
        print(
            f"{name:>14}  {1e3 * float(row['analyze']):8.1f} ms, an update of the research code takes "
            f"{row['update_ratio']:.1f} times as long ({row['rounds']} rounds)",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "pass.csv", rows)
    draw(options.out / "pass.png", rows, options.device)
    slowest = min(rows, key=lambda row: float(row["update_ratio"]))
    headline = (
        f"One measurement is {slowest['update_ratio']:.1f} ({slowest['network']}) to "
        f"{max(float(row['update_ratio']) for row in rows):.1f} times faster than an update of the research code."
    )
    picture = "![Times of one measurement of each network](pass.png)"
    publish(options.out, f"{headline}\n\n{picture}\n\n{tables(rows)}\n\n```\n{machine}\n```")
    print(f"\n{headline}\n\n{tables(rows)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
