"""Load: many layers, many updates, a model too large for memory. What grows, and how fast?

    python -m benchmarks.load                     # about five minutes on one core
    python -m benchmarks.load --updates 1000      # a shorter run

Three parts. Models of up to 2000 layers: the time to find the layers, to measure them and to write a log row, and
a step with as many ratios as layers, a plain step, and torch's own with as many param groups. 10 000
updates (a training step, a measurement, new ratios, a log row, the state for a checkpoint): memory, and time
against that of runs that have just begun. A model of two billion parameters on the meta device: its plan.

Times are medians of this process's processor time, on one thread, so that other work disturbs them little.

Writes `scaling.csv`, `run.csv` and `load.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.machine import describe, resident_bytes
from benchmarks.results import write_csv
from benchmarks.step import LR, balanced, copied, grouped
from benchmarks.timing import Work, rounds
from farms_tb import TempBalance, analyze
from farms_tb.training.metrics import measurement_row, summary_row
from farms_tb.weights.layers import find_layers

WIDTH = 32
BLOCK = 100
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=LR),
}


def make_net(layers: int) -> nn.Sequential:
    """Return linear layers, each followed by a norm, with gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))])
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return net


def medians(functions: Sequence[Work], times: int) -> list[float]:
    """Return the median processor time of each function."""
    return [statistics.median(taken) for taken in rounds(functions, times)]


def scaling_row(layers: int, times: int) -> dict[str, float]:
    """Measure everything that depends on the number of layers."""
    net = make_net(layers)
    balancer = TempBalance(net, OPTIMIZERS["SGD"](net.parameters()), assign_func="tb_linear_map")
    inner = balancer._balancer

    def log_row() -> dict[str, float]:
        return measurement_row(balancer.report, balancer.ratios, inner.layer_lrs(), summary_row(inner.summary))

    work = [lambda: find_layers(net), lambda: inner.measure(), balancer.step, log_row, balancer.state_dict]
    names = ("find_layers", "measure", "update", "log_row", "state_dict")
    row: dict[str, float] = {"layers": layers, **dict(zip(names, medians(work, times), strict=True))}
    row["keys"] = len(log_row())
    row["state_bytes"] = len(json.dumps(balancer.state_dict()))
    balancer.detach()
    for name, make in OPTIMIZERS.items():
        row.update({f"{key}_{name}": value for key, value in step_times(layers, make, times).items()})
    return row


def step_times(layers: int, make: Callable[..., Optimizer], times: int) -> dict[str, float]:
    """Time a plain step, one with a ratio for each layer, and one of torch's own with a param group for each."""
    params = list(make_net(layers).parameters())
    optimizers = (
        make(copied(params)),
        balanced(copied(params), layers, make),
        grouped(copied(params), layers, make),
    )
    steps = [optimizer.step for optimizer in optimizers]
    return dict(zip(("step", "balanced_step", "torch_groups_step"), medians(steps, 3 * times), strict=True))


def begin_run() -> Callable[[], None]:
    """Begin to train and to balance; return what makes one update."""
    net = make_net(6)
    # So slow that an update has the same work to do at the end: no gradient becomes denormal, no weight singular.
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9999)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    inputs = torch.randn(16, WIDTH)

    def update() -> None:
        optimizer.zero_grad()
        net(inputs).sub(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()
        balancer.step()
        inner = balancer._balancer
        measurement_row(balancer.report, balancer.ratios, inner.layer_lrs(), summary_row(inner.summary))
        balancer.state_dict()

    return update


def long_run(updates: int) -> list[dict[str, float]]:
    """Return median times of an update, and resident memory, for each block of the run."""
    update = begin_run()
    rows = []
    for block in range(updates // BLOCK):
        # What the machine does meanwhile, it does to a run that has just begun as well.
        taken, new_run = medians([update, begin_run()], BLOCK - 1)
        rows.append(
            {
                "updates": (block + 1) * BLOCK,
                "seconds": taken,
                "new_run_seconds": new_run,
                "ratio": taken / new_run,
                "resident_bytes": resident_bytes(),
            }
        )
    return rows


def slope(rows: Sequence[dict[str, float]], key: str) -> tuple[float, float]:
    """Return the growth of a straight line over the whole run, and its standard error, as shares of the median.

    The first tenth of the run, when memory pools fill, is left out.
    """
    settled = rows[len(rows) // 10 :]
    x = np.array([row["updates"] for row in settled]) / rows[-1]["updates"]
    y = np.array([row[key] for row in settled]) / statistics.median(row[key] for row in settled)
    fit, residuals, *_ = np.polyfit(x, y, 1, full=True)
    variance = float(residuals[0]) / max(1, len(x) - 2) if len(residuals) else 0.0
    return float(fit[0]), float(np.sqrt(variance / ((x - x.mean()) ** 2).sum()))


def plan() -> dict[str, float]:
    """Plan the measurement of two billion parameters on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(
            *[part for _ in range(24) for part in (nn.Linear(4096, 11008), nn.GELU(), nn.Linear(11008, 4096))]
        )
    before, start = resident_bytes(), time.process_time()
    report = analyze(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(report.layers),
        "eigenvalues": sum(record.num_eigenvalues for record in report.layers.values()),
        "seconds": time.process_time() - start,
        "resident_bytes": resident_bytes() - before,
    }


def draw(path: Path, scaling: Sequence[dict[str, float]], run: Sequence[dict[str, float]]) -> None:
    """Draw cost over layers, and time and memory over the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    layers = [row["layers"] for row in scaling]
    labels = {"measure": "measurement", "find_layers": "find the layers", "log_row": "one log row"}
    labels |= {"balanced_step_AdamW": "step, a ratio for each layer", "step_AdamW": "plain step (AdamW)"}
    for key, label in labels.items():
        axes[0].loglog(layers, [1e3 * row[key] for row in scaling], "o-", label=label, markersize=3)
    axes[0].set_ylim(top=3e4)
    axes[0].set(xlabel="layers", ylabel="milliseconds", title="Cost of many layers")
    axes[0].set_xticks(layers, labels=list(map(str, layers)), minor=False)
    axes[0].set_xticks([], minor=True)
    axes[0].legend(fontsize=7)
    updates = [row["updates"] for row in run]
    axes[1].plot(updates, [1e3 * row["seconds"] for row in run], label="an update")
    axes[1].plot(updates, [1e3 * row["new_run_seconds"] for row in run], label="one of a run that has just begun")
    axes[1].set(xlabel="updates", ylabel="milliseconds", title="Time", ylim=(0, None))
    axes[1].legend(fontsize=7)
    memory = [row["resident_bytes"] / 2**20 for row in run]
    axes[2].plot(updates, memory)
    axes[2].set(xlabel="updates", ylabel="MiB", title="Resident memory", ylim=(0, 1.2 * max(memory)))
    figure.savefig(path, dpi=120)


def print_results(
    scaling: Sequence[dict[str, float]], run: Sequence[dict[str, float]], planned: dict[str, float]
) -> None:
    """Print the tables."""
    print("\nMany layers: medians in ms of processor time; steps as ratios to the plain step")
    keys = ("find_layers", "measure", "update", "log_row", "state_dict")
    print(f"{'layers':>7}" + "".join(f"{key:>13}" for key in keys) + f"{'keys':>7}{'state kB':>10}")
    for row in scaling:
        times = "".join(f"{1e3 * row[key]:13.2f}" for key in keys)
        print(f"{row['layers']:7}{times}{row['keys']:7}{row['state_bytes'] / 1e3:10.0f}")
    for name in OPTIMIZERS:
        print(f"\n{name:>7}{'plain ms':>12}{'a ratio each':>15}{'torch, a group each':>22}")
        for row in scaling:
            plain = row[f"step_{name}"]
            ours, theirs = row[f"balanced_step_{name}"] / plain, row[f"torch_groups_step_{name}"] / plain
            print(f"{row['layers']:7}{1e3 * plain:12.2f}{ours:15.2f}{theirs:22.2f}")
    print(
        f"\n{run[-1]['updates']} updates: first and last block, and the slope over the run with its standard error"
    )
    columns = (
        ("seconds", "ms", 1e3),
        ("new_run_seconds", "ms", 1e3),
        ("ratio", "", 1.0),
        ("resident_bytes", "MiB", 2**-20),
    )
    for key, unit, scale in columns:
        growth, error = slope(run, key)
        ends = f"{run[0][key] * scale:.2f} -> {run[-1][key] * scale:.2f} {unit}"
        print(f"{key:>15}  {ends:<24} {100 * growth:+.2f}% +- {100 * error:.2f}%")
    print(
        f"\nMeta device: {planned['parameters'] / 1e9:.2f} billion parameters, {planned['layers']} layers, "
        f"{planned['eigenvalues']} eigenvalues planned in {1e3 * planned['seconds']:.0f} ms "
        f"and {planned['resident_bytes'] / 2**20:.1f} MiB"
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description="What many layers and updates cost"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[125, 250, 500, 1000, 2000])
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--out", type=Path, default=Path("docs/results/load"))
    options = parser.parse_args()
    if options.updates < BLOCK:
        parser.error(f"--updates must be at least {BLOCK}, those of one block, got {options.updates}")
    torch.set_num_threads(1)
    print(describe())
    # First, so that the pools of freed memory that the large models leave hide no growth.
    run = long_run(options.updates)
    scaling = [scaling_row(layers, options.times) for layers in options.layers]
    planned = plan()
    print_results(scaling, run, planned)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "scaling.csv", scaling)
    write_csv(options.out / "run.csv", run)
    draw(options.out / "load.png", scaling, run)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
