"""The step: how much longer it takes with a learning rate for each layer.

    python -m benchmarks.step                     # about five minutes on one core
    python -m benchmarks.step --device cuda       # and whole training steps, of random images
    python -m benchmarks.step --networks "ResNet-18" --ratios 20

SGD (Nesterov momentum, weight decay), Adam and AdamW step on real networks and on one of 160 tiny layers, whose
steps are overhead alone: as by default (a loop over the tensors on the CPU, `foreach` on a GPU), by `foreach` and
fused. Against the plain step the same optimizer steps with a number of distinct ratios, and torch's own with as
many param groups. They take turns, each with parameters and state of its own: a step with ratios refuses to share
its parameters with an optimizer that has none. Gradients are shared.

Times are medians: of this process's processor time on one thread, on a GPU of wall-clock time.

Options that change what a ratio does are measured with AdamW on networks of blocks.

Writes `step.csv`, `step.png`, `options.csv`, with whole training steps `training.csv`, and the tables of
`README.md`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.machine import describe
from benchmarks.models import NETWORKS
from benchmarks.results import BLUE, GREEN, ORANGE, PURPLE, Value, markdown_table, publish, write_csv
from benchmarks.timing import Work, processor_seconds, rounds, wall_seconds
from farms_tb import TempBalance
from farms_tb.balancing.layerwise_step import LayerwiseStep
from farms_tb.viewing.plots.style import new_figure, styled

AIM = 1.10
TINY = "160 tiny layers"
LR = 1e-3
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "Adam": partial(torch.optim.Adam, lr=LR),
    "AdamW": partial(torch.optim.AdamW, lr=LR),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
WITH_BLOCKS = ("ResNet-18", "ViT-B/16")
"""Networks that repeat a block, with which the options of the balancer are measured."""
OPTIONS: dict[str, dict[str, Any]] = {
    "a ratio for each layer": {},
    "unit": {"unit": "block"},
    "fixed": {"fixed": {"*": 2.0}},
    "target, weight_decay": {"target": "weight_decay"},
    "target, both": {"target": "both"},
    "decay_follows_lr": {"decay_follows_lr": False},
}
"""Options that change what a ratio does."""
STEPS_AT_ONCE = 5
"""Training steps between two readings of the clock, so that a GPU may lag behind."""


def tiny() -> nn.Module:
    """Return linear layers of 32 x 32, each followed by a norm."""
    return nn.Sequential(*[part for _ in range(160) for part in (nn.Linear(32, 32), nn.LayerNorm(32))])


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (NETWORKS["ResNet-18"], (3, 32, 32)),
    "UNet": (NETWORKS["UNet"], (1, 64, 64)),
    "ViT-B/16": (NETWORKS["ViT-B/16"], (3, 224, 224)),
    TINY: (tiny, (32,)),
}
"""Each network, and the shape of its input."""


def make(name: str, device: str) -> nn.Module:
    """Return a network with gradients, which the steps leave almost as it is."""
    torch.manual_seed(0)
    net = CASES[name][0]().to(device)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return net


def copied(params: Sequence[Tensor]) -> list[Tensor]:
    """Return parameters of the same values and with the same gradients, for one optimizer alone."""
    copies = []
    for parameter in params:
        copy = nn.Parameter(parameter.detach().clone())
        copy.grad = parameter.grad
        copies.append(copy)
    return copies


def spread(params: Sequence[Tensor], count: int) -> list[float]:
    """Return a ratio for each parameter, `count` different ones, neighbours alike as in a layer."""
    return [0.5 + (index * count // len(params) + 0.5) / count for index in range(len(params))]


def counts(params: Sequence[Tensor], wanted: Sequence[int]) -> list[int]:
    """Return the numbers of ratios, of which there are no more than parameters."""
    return sorted({min(count, len(params)) for count in wanted})


def balanced(params: Sequence[Tensor], count: int, optimizer: Callable[..., Optimizer], **how: Any) -> Optimizer:
    """Return an optimizer that steps with `count` ratios."""
    ours = optimizer(params, **how)
    LayerwiseStep(ours).ratios = {id(p): ratio for p, ratio in zip(params, spread(params, count), strict=True)}
    return ours


def grouped(params: Sequence[Tensor], count: int, optimizer: Callable[..., Optimizer], **how: Any) -> Optimizer:
    """Return torch's own, with a param group for each ratio."""
    by_ratio: dict[float, list[Tensor]] = {}
    for parameter, ratio in zip(params, spread(params, count), strict=True):
        by_ratio.setdefault(ratio, []).append(parameter)
    return optimizer([{"params": members, "lr": LR * ratio} for ratio, members in by_ratio.items()], **how)


def measure(name: str, device: str, wanted: Sequence[int], times: int, limit: float) -> list[dict[str, Value]]:
    """Time the steps of one network: a row for each optimizer, implementation and number of ratios."""
    params = list(make(name, device).parameters())
    rows: list[dict[str, Value]] = []
    for optimizer, build in OPTIMIZERS.items():
        for implementation, how in IMPLEMENTATIONS.items():
            steps: list[Work] = [build(copied(params), **how).step]
            for count in counts(params, wanted):
                steps.append(balanced(copied(params), count, build, **how).step)
                steps.append(grouped(copied(params), count, build, **how).step)
            plain, *others = timed(steps, device, times, limit)
            for place, count in enumerate(counts(params, wanted)):
                ours, torchs = others[2 * place : 2 * place + 2]
                rows.append(
                    {
                        "network": name,
                        "optimizer": optimizer,
                        "implementation": implementation,
                        "ratios": count,
                        "plain": plain,
                        "ours": ours,
                        "torch_groups": torchs,
                        "ours_ratio": ours / plain,
                        "torch_ratio": torchs / plain,
                    }
                )
    return rows


def measure_training(
    name: str, device: str, batch: int, wanted: Sequence[int], times: int, limit: float
) -> list[dict[str, Value]]:
    """Time whole training steps of one network, forward, backward and step, on random inputs."""
    inputs = torch.randn(batch, *CASES[name][1], device=device)

    def train(net: nn.Module, optimizer: Optimizer) -> None:
        for _ in range(STEPS_AT_ONCE):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

    # With and without ratios: see the module's docstring.
    plain_net, net = make(name, device), make(name, device)
    params = list(net.parameters())
    found = counts(params, wanted)
    rows: list[dict[str, Value]] = []
    for optimizer, build in OPTIMIZERS.items():
        for implementation in ("default", "fused"):
            how = IMPLEMENTATIONS[implementation]
            ways = [partial(train, plain_net, build(plain_net.parameters(), **how))]
            ways += [partial(train, net, balanced(params, count, build, **how)) for count in found]
            plain, *ours = timed(ways, device, times, limit)
            for count, seconds in zip(found, ours, strict=True):
                row = {"network": name, "optimizer": optimizer, "implementation": implementation, "ratios": count}
                taken = {"plain": plain / STEPS_AT_ONCE, "ours": seconds / STEPS_AT_ONCE}
                rows.append({**row, **taken, "ours_ratio": seconds / plain})
    return rows


def measure_options(name: str, device: str, times: int, limit: float) -> list[dict[str, Value]]:
    """Time the steps of AdamW on one network with some options of the balancer: a row for each."""
    net = make(name, device)
    steps: list[Work] = [OPTIMIZERS["AdamW"](copied(list(net.parameters()))).step]
    for options in OPTIONS.values():
        own = make(name, device)
        optimizer = OPTIMIZERS["AdamW"](own.parameters())
        TempBalance(own, optimizer, assign_func="tb_linear_map", **options).step()
        steps.append(optimizer.step)
    plain, *found = timed(steps, device, times, limit)
    rows: list[dict[str, Value]] = []
    for option, seconds in zip(OPTIONS, found, strict=True):
        rows.append({"network": name, "option": option, "ms": 1e3 * seconds, "plain": seconds / plain})
    return rows


def options_table(rows: Sequence[Mapping[str, Value]]) -> str:
    """Return the ratios to the plain step of each network."""
    lines = []
    for option in OPTIONS:
        line = {"AdamW with": option}
        for row in rows:
            if row["option"] == option:
                line[str(row["network"])] = f"{row['plain']:.2f}"
        lines.append(line)
    return markdown_table(lines)


def timed(ways: Sequence[Work], device: str, times: int, limit: float) -> list[float]:
    """Return the median time of each way. Called once first: an optimizer begins its state at the first step."""
    for way in ways:
        way()
    on_cpu = torch.device(device).type == "cpu"
    seconds = processor_seconds if on_cpu else partial(wall_seconds, device=device)
    return [statistics.median(column) for column in rounds(ways, times, seconds, limit)]


def table(rows: Sequence[Mapping[str, Value]]) -> str:
    """Return the ratios to the plain step, and in brackets those of torch's own param groups."""
    places = dict.fromkeys((row["network"], row["implementation"], row["ratios"]) for row in rows)
    lines = []
    for network, implementation, count in places:
        line = {"network": str(network), "implementation": str(implementation), "ratios": str(count)}
        for row in rows:
            if (row["network"], row["implementation"], row["ratios"]) == (network, implementation, count):
                own = f" ({row['torch_ratio']:.2f})" if "torch_ratio" in row else ""
                line[str(row["optimizer"])] = f"{row['ours_ratio']:.2f}{own}"
                line[f"{row['optimizer']}, plain"] = f"{1e3 * float(row['plain']):.3g} ms"
        lines.append(line)
    return markdown_table(lines)


@styled
def draw(path: Path, rows: Sequence[Mapping[str, Value]], ticks: Sequence[int]) -> None:
    """Draw the time of a step over the number of ratios, relative to the plain step."""
    figure = new_figure(9.0, 7.2)
    axes = figure.subplots(len(IMPLEMENTATIONS), len(OPTIMIZERS), sharex=True, sharey=True, squeeze=False)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    colours = dict(zip(networks, (BLUE, GREEN, PURPLE, ORANGE), strict=False))
    for line, implementation in zip(axes, IMPLEMENTATIONS, strict=True):
        for axis, optimizer in zip(line, OPTIMIZERS, strict=True):
            axis.axhline(1, color="0.75", linewidth=0.8)
            axis.axhline(AIM, color="0.5", linestyle=":", linewidth=1)
            for network, colour in colours.items():
                own = [row for row in rows if (row["network"], row["optimizer"]) == (network, optimizer)]
                own = [row for row in own if row["implementation"] == implementation]
                x = [float(row["ratios"]) for row in own]
                ours, torchs = ([float(row[key]) for row in own] for key in ("ours_ratio", "torch_ratio"))
                axis.plot(x, torchs, "--", color=colour, linewidth=1, alpha=0.7)
                axis.plot(x, ours, "o-", color=colour, markersize=4)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_yscale("log")
            axis.set_title(f"{optimizer}, {implementation}")
    axes[0, 0].set_xticks(ticks, labels=list(map(str, ticks)))
    axes[0, 0].set_yticks([0.5, 0.7, 1, 1.5, 2, 3], labels=["0.5", "0.7", "1", "1.5", "2", "3"])
    axes[0, 0].minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("distinct ratios")
    for axis in axes[:, 0]:
        axis.set_ylabel("time / plain step")
    handles = [Line2D([], [], color=colour, label=str(network)) for network, colour in colours.items()]
    handles += [
        Line2D([], [], color="0.3", marker="o", markersize=4, label="layer-wise ratios"),
        Line2D([], [], color="0.3", linestyle="--", label="torch's param groups"),
        Line2D([], [], color="0.5", linestyle=":", label="aim"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=160)


def headline(rows: Sequence[Mapping[str, Value]]) -> str:
    """Say the worst of the default implementations."""
    default = [row for row in rows if row["implementation"] == "default"]
    worst = max(default, key=lambda row: float(row["ours_ratio"]))
    return (
        f"By default a step takes at most {worst['ours_ratio']:.2f} times as long with ratios as without "
        f"({worst['optimizer']}, {worst['network']}, {worst['ratios']} distinct ratios)."
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="What layer-wise steps cost")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 20, 62, 160])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batch",
        type=int,
        help="inputs of a whole training step; 0: none (default: 64 on a GPU, none on the CPU)",
    )
    parser.add_argument("--times", type=int, default=31, help="rounds, of which medians are taken")
    parser.add_argument("--limit", type=float, default=8.0, help="seconds, after which no round begins")
    parser.add_argument("--out", type=Path, default=Path("docs/results/step"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe(options.device)
    print(machine)
    on_cpu = torch.device(options.device).type == "cpu"
    batch = (0 if on_cpu else 64) if options.batch is None else options.batch
    rows: list[dict[str, Value]] = []
    training: list[dict[str, Value]] = []
    by_option: list[dict[str, Value]] = []
    for name in options.networks:
        rows += measure(name, options.device, options.ratios, options.times, options.limit)
        worst = max((row for row in rows if row["network"] == name), key=lambda row: float(row["ours_ratio"]))
        print(
            f"{name:>16}  at most {worst['ours_ratio']:.2f} times the plain step "
            f"({worst['optimizer']}, {worst['implementation']}, {worst['ratios']} ratios)",
            flush=True,
        )
        if name in WITH_BLOCKS:
            by_option += measure_options(name, options.device, options.times, options.limit)
        if batch:
            training += measure_training(name, options.device, batch, options.ratios, options.times, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "step.csv", rows)
    draw(options.out / "step.png", rows, options.ratios)
    parts = [headline(rows), "![Time of a step over the number of ratios](step.png)", table(rows)]
    if by_option:
        write_csv(options.out / "options.csv", by_option)
        parts += ["How many times as long as the plain step:", options_table(by_option)]
    if training:
        write_csv(options.out / "training.csv", training)
        parts += [f"Whole training steps, of {batch} inputs:", table(training)]
    publish(options.out, "\n\n".join([*parts, f"```\n{machine}\n```"]))
    print("\n\n".join(["", *parts, f"written to {options.out}"]))


if __name__ == "__main__":
    main()
