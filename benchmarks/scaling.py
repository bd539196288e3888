"""How the cost of a pass grows: with the number of windows, with threads, with processes.

    python -m benchmarks.scaling                      # two minutes on two cores
    python -m benchmarks.scaling --device cuda        # the windows alone: threads and processes are the CPU's

Three parts.

Windows: a linear layer measured with ever denser grids of windows, and convolutions of ever more kernel positions,
so ever more matrices of one size. Processor time of one thread (on a GPU wall-clock time); the slope of the times
over the numbers, both as logarithms, is 1 where the cost is proportional to the number of windows.

Threads: a pass over ResNet-18 on one thread, two, and so on up to the cores of the machine, in turn.

Processes: a pass over ResNet-18 shared by one, two and four gloo processes of one thread each, and the processor
time that each of them takes. Processor time, because more processes than cores wait for each other.

Writes `windows.csv`, `threads.csv`, `processes.csv`, `scaling.png` and the tables of `README.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from benchmarks.machine import describe
from benchmarks.results import BLUE, GREEN, ORANGE, Value, markdown_table, publish, write_csv
from benchmarks.timing import processor_seconds, rounds, wall_seconds
from farms_tb import TempBalance, analyze
from farms_tb.viewing.plots.style import FAINT, new_figure, styled
from recipes.models.resnet import SmallImageResNet

GRIDS = (12, 16, 24, 32, 48, 64)
"""Start positions of windows along each dimension of the linear layer."""

STACKS = (128, 256, 512, 1024, 2048, 4096)
"""Kernel positions of the convolutions."""


def grid(number: int, device: str) -> tuple[int, Callable[[], object]]:
    """Return how many windows of 100 x 100 a grid lays over a linear layer, and what measures them."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024, device=device)
    return number**2, lambda: analyze(layer, windows_per_dim=number)


def stack(number: int, device: str) -> tuple[int, Callable[[], object]]:
    """Return how many matrices of 64 x 64 a convolution holds, and what measures them."""
    torch.manual_seed(0)
    layer = nn.Conv1d(64, 64, number, device=device)
    return number, lambda: analyze(layer)


def windows(device: str, times: int) -> list[dict[str, Value]]:
    """Measure layers of more and more windows."""
    rows: list[dict[str, Value]] = []
    # On the CPU, one thread's processor time: other work disturbs it little.
    on_cpu = torch.device(device).type == "cpu"
    seconds = processor_seconds if on_cpu else lambda way: wall_seconds(way, device)
    series = {
        "linear layer, windows of 100 x 100": (grid, GRIDS),
        "convolution, matrices of 64 x 64": (stack, STACKS),
    }
    for name, (make, numbers) in series.items():
        counts, ways = zip(*(make(number, device) for number in numbers), strict=True)
        found = rounds(ways, times, seconds)
        rows += [
            {"series": name, "windows": count, "seconds": statistics.median(taken)}
            for count, taken in zip(counts, found, strict=True)
        ]
        print(f"{name}: cost grows as windows^{slope(rows, name):.2f}", flush=True)
    return rows


def slope(rows: Sequence[Mapping[str, Value]], series: str) -> float:
    """Return the slope of log seconds over log windows."""
    x, y = np.log([[float(row[key]) for row in rows if row["series"] == series] for key in ("windows", "seconds")])
    return float(np.polyfit(x, y, 1)[0])


def resnet(width: int) -> nn.Module:
    """Return a ResNet-18 whose first stage has so many features; 64 in the papers."""
    torch.manual_seed(0)
    return SmallImageResNet(18, out_channels=100, width=width)


def threads(most: int, times: int, width: int) -> list[dict[str, Value]]:
    """Measure a network on one thread up to `most`."""
    model = resnet(width)
    before = torch.get_num_threads()

    def on(number: int) -> None:
        torch.set_num_threads(number)
        analyze(model)

    numbers = range(1, most + 1)
    ways = [lambda number=number: on(number) for number in numbers]
    try:
        found = rounds(ways, times, wall_seconds)
    finally:
        torch.set_num_threads(before)
    rows: list[dict[str, Value]] = [
        {
            "threads": number,
            "seconds": statistics.median(taken),
            "speed_up": statistics.median(alone / here for alone, here in zip(found[0], taken, strict=True)),
        }
        for number, taken in zip(numbers, found, strict=True)
    ]
    for row in rows:
        print(f"{row['threads']} threads: {1e3 * float(row['seconds']):.0f} ms", flush=True)
    return rows


def processes(numbers: Sequence[int], times: int, width: int) -> list[dict[str, Value]]:
    """Measure a network on several processes; one row a process."""
    rows: list[dict[str, Value]] = []
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            spawn(one_process, (number, times, width, folder), nprocs=number)
            taken = [float(Path(folder, f"{rank}").read_text()) for rank in range(number)]
        rows += [{"processes": number, "rank": rank, "seconds": each} for rank, each in enumerate(taken)]
        shown = ", ".join(f"{1e3 * each:.0f}" for each in taken)
        print(f"{number} processes: {shown} ms of processor time", flush=True)
    return rows


def one_process(rank: int, number: int, times: int, width: int, folder: str) -> None:
    """Measure a network together with the other processes, and write down the processor time of this one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of random layers
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=number)
    model = nn.parallel.DistributedDataParallel(resnet(width))
    balancer = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), assign_func="tb_linear_map")
    (taken,) = rounds([balancer.step], times, processor_seconds)
    Path(folder, f"{rank}").write_text(str(statistics.median(taken)))
    dist.destroy_process_group()


def tables(parts: Mapping[str, Sequence[Mapping[str, Value]]]) -> str:
    """Return the tables of the page."""
    text = []
    by_series: dict[str, list[Mapping[str, Value]]] = {}
    for row in parts["windows"]:
        by_series.setdefault(str(row["series"]), []).append(row)
    growth = [
        {
            "layer": name,
            "windows": f"{rows[0]['windows']} to {rows[-1]['windows']}",
            "milliseconds": f"{1e3 * float(rows[0]['seconds']):.1f} to {1e3 * float(rows[-1]['seconds']):.0f}",
            "slope": f"{slope(rows, name):.2f}",
        }
        for name, rows in by_series.items()
    ]
    text.append(markdown_table(growth))
    if parts.get("threads"):
        speeds = [
            {
                "threads": str(row["threads"]),
                "ResNet-18, ms": f"{1e3 * float(row['seconds']):.0f}",
                "times as fast as one": f"{float(row['speed_up']):.2f}",
            }
            for row in parts["threads"]
        ]
        text.append(markdown_table(speeds))
    if parts.get("processes"):
        shared = [
            {
                "processes": str(number),
                "processor time of each, ms": ", ".join(f"{1e3 * each:.0f}" for each in taken),
                "longest / one process": f"{max(taken) / alone:.2f}",
            }
            for number, taken, alone in _by_number(parts["processes"])
        ]
        text.append(markdown_table(shared))
    return "\n\n".join(text)


def _by_number(rows: Sequence[Mapping[str, Value]]) -> list[tuple[int, list[float], float]]:
    """Return each number of processes, their times, and the time of one alone."""
    taken: dict[int, list[float]] = {}
    for row in rows:
        taken.setdefault(int(row["processes"]), []).append(float(row["seconds"]))
    alone = max(taken[min(taken)])
    return [(number, times, alone) for number, times in taken.items()]


@styled
def draw(path: Path, parts: Mapping[str, Sequence[Mapping[str, Value]]]) -> None:
    """Draw cost over windows, speed over threads, and processor time over processes."""
    shown = [name for name in ("windows", "threads", "processes") if parts.get(name)]
    figure = new_figure(3.3 * len(shown) + 0.6, 3.0)
    axes = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True))
    series = dict.fromkeys(str(row["series"]) for row in parts["windows"])
    for name, colour, marker in zip(series, (BLUE, ORANGE), "os", strict=True):
        points = [row for row in parts["windows"] if row["series"] == name]
        x, y = (np.array([float(row[key]) for row in points]) for key in ("windows", "seconds"))
        line = np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x)))
        axes["windows"].loglog(x, 1e3 * line, color=colour, linewidth=0.8)
        label = f"{name}\nslope {slope(parts['windows'], name):.2f}"
        axes["windows"].loglog(x, 1e3 * y, marker, color=colour, label=label)
    ticks = [int(row["windows"]) for row in points[::2]]
    axes["windows"].set_xticks(ticks, [str(tick) for tick in ticks])
    axes["windows"].set_xticks([], minor=True)
    axes["windows"].set(xlabel="windows", ylabel="milliseconds", title="Windows")
    axes["windows"].legend(loc="upper left")
    axes["windows"].set_ylim(top=axes["windows"].get_ylim()[1] * 8)
    if "threads" in axes:
        numbers = [int(row["threads"]) for row in parts["threads"]]
        axes["threads"].plot(numbers, numbers, "--", color=FAINT, label="ideal")
        axes["threads"].plot(numbers, [float(row["speed_up"]) for row in parts["threads"]], "o-", color=BLUE)
        axes["threads"].set(xlabel="threads", ylabel="times as fast as one thread", title="Threads, ResNet-18")
        axes["threads"].set_xticks(numbers)
        axes["threads"].set_ylim(bottom=0)
        axes["threads"].legend(loc="upper left")
    if "processes" in axes:
        found = _by_number(parts["processes"])
        for place, (number, taken, alone) in enumerate(found):
            at = place + (np.arange(number) - (number - 1) / 2) * 0.8 / number
            axes["processes"].bar(at, [1e3 * each for each in taken], 0.72 / number, color=GREEN)
            label = "ideal" if not place else "_"
            axes["processes"].plot(
                [place - 0.45, place + 0.45], [1e3 * alone / number] * 2, "--", color="0.3", label=label
            )
        axes["processes"].set_xticks(range(len(found)), [str(number) for number, *_ in found])
        axes["processes"].set(xlabel="processes", ylabel="ms of processor time", title="Each process, ResNet-18")
        axes["processes"].legend(loc="upper right")
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="How the cost of a pass grows"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="up to so many")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=64, help="features of the ResNet-18's first stage")
    parser.add_argument("--times", type=int, default=7, help="rounds, of which medians are taken")
    parser.add_argument("--out", type=Path, default=Path("docs/results/scaling"))
    options = parser.parse_args()
    machine = describe(options.device)
    print(machine)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {"windows": windows(options.device, options.times)}
    torch.set_num_threads(before)
    if torch.device(options.device).type == "cpu":
        parts["threads"] = threads(options.threads, options.times, options.width)
        parts["processes"] = processes(options.processes, options.times, options.width)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_csv(options.out / f"{name}.csv", rows)
    draw(options.out / "scaling.png", parts)
    picture = "![Cost over windows, threads and processes](scaling.png)"
    publish(options.out, f"{picture}\n\n{tables(parts)}\n\n```\n{machine}\n```")
    print(f"\n{tables(parts)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
