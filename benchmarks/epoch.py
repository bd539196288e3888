"""A whole epoch: how much longer it takes with the callback, and how much of that is the pass and the step.

    python -m benchmarks.epoch                        # both tasks, a few minutes on two cores
    python -m benchmarks.epoch --device cuda
    python -m benchmarks.epoch --tasks darcy_unet --rounds 9

The tasks:

- `darcy_unet`, the default recipe: UNet on Darcy flow, whole epochs with validation, on as many threads as the
  recipe asks for. The data are made on first use;
- `cifar100_resnet18`, the FARMS paper's: ResNet-18 on images of CIFAR's shape and number, of random pixels. On a
  GPU whole epochs with validation. On the CPU, where an epoch takes a quarter of an hour, a few batches of it,
  from which the epoch is extrapolated: the time of all its batches, without validation.

The same training runs with and without the callback, either of them first in turn, from the same seed, through
Lightning's Trainer. Of each the first epoch warms up and is left out. The default recipe trains with all that it
has: checkpoints, pictures, CSV file and W&B, offline. ResNet-18 logs to a CSV file alone. The callback measures in
every epoch.

The share of the pass is the time that the callback takes at the start of an epoch, that of the step what
`optimizer.step` takes longer with a ratio for each layer, timed against a plain one on a network with gradients.

Writes `epoch.csv`, `rounds.csv`, `epoch.png` and the table of `README.md`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from torch.optim import Optimizer

from benchmarks.machine import describe
from benchmarks.models import settings
from benchmarks.results import BLUE, GREEN, ORANGE, Value, markdown_table, publish, write_csv
from benchmarks.timing import rounds, synchronise, wall_seconds
from farms_tb import TempBalance
from farms_tb.viewing.plots.style import new_figure, styled
from recipes.config import build, build_balancer
from recipes.console import quiet_lightning
from recipes.data.images import ImageData, Images
from recipes.loggers import RunFolderWandbLogger
from recipes.parts import build_parts
from recipes.run import build_run

AIMS = {("darcy_unet", "cpu"): 0.03, ("cifar100_resnet18", "cuda"): 0.01}
"""Shares of an epoch that the callback may take, by task and kind of device."""

STEPS = 30


class RandomImages(ImageData):
    """Random pixels in the shape and the number of CIFAR-100."""

    size = 50_000

    def prepare_data(self) -> None:
        """Nothing to download."""

    def make_splits(self) -> dict[str, Images]:
        """Draw the images; there are none to test."""
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = (
            torch.randint(top, (self.size, *shape), generator=generator, dtype=dtype)
            for top, shape, dtype in ((256, self.sample_shape, torch.uint8), (self.num_classes, (), torch.int64))
        )
        train, val = torch.arange(self.size).split([self.size - self.val_size, self.val_size])
        return {
            "train": Images(images, labels, train, with_places=True),
            "val": Images(images, labels, val),
        }


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        cfg: settings of the recipe.
        data: makes its data.
        epochs: epochs of one training, the first of which warms up.
        batches: training batches of an epoch that are run; None for all, and validation after them.
        whole: whether the recipe's own loggers and callbacks take part.
    """

    cfg: DictConfig
    data: Callable[[], LightningDataModule]
    epochs: int
    batches: int | None = None
    whole: bool = False


def darcy_unet(device: str) -> Task:
    """Return the default recipe."""
    cfg = settings()
    return Task(cfg, lambda: build(cfg, "data"), epochs=8, whole=True)


def cifar100_resnet18(device: str) -> Task:
    """Return the FARMS paper's ResNet-18, on random images."""
    cfg = settings("experiment=farms/cifar100_resnet18")
    on_cpu = torch.device(device).type == "cpu"
    return Task(
        cfg, lambda: RandomImages(".", "cifar100"), epochs=2 if on_cpu else 4, batches=2 if on_cpu else None
    )


TASKS: dict[str, Callable[[str], Task]] = {"darcy_unet": darcy_unet, "cifar100_resnet18": cifar100_resnet18}


class Clock(Callback):
    """Note the time at the start of every epoch and at the end of training.

    Before the balancing callback among the trainer's, it bounds the epochs; behind it, it ends each measurement.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def _note(self) -> None:
        synchronise(self.device)
        self.times.append(time.perf_counter())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self._note()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last epoch."""
        self._note()


@dataclass(frozen=True)
class Training:
    """Seconds of the epochs of one training but the first, and of the callback at the start of each."""

    epochs: list[float]
    passes: list[float]


def make_module(task: Task) -> LightningModule:
    """Return the module, from one seed."""
    return build_parts(task.cfg).model


def train(task: Task, balanced: bool, device: str) -> Training:
    """Train with or without the callback."""
    before, after = Clock(device), Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        if task.whole:
            _train_recipe(task, balanced, folder, before, after)
        else:
            callback = [build_balancer(task.cfg)] if balanced else []
            trainer = Trainer(
                max_epochs=task.epochs,
                accelerator="gpu" if torch.device(device).type == "cuda" else "cpu",
                devices=1,
                callbacks=[before, *callback, after],
                logger=CSVLogger(folder),
                limit_train_batches=task.batches,
                limit_val_batches=None if task.batches is None else 0,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(make_module(task), datamodule=task.data())
    epochs = [end - start for start, end in zip(before.times, before.times[1:], strict=False)]
    passes = [end - start for start, end in zip(before.times[:-1], after.times, strict=False)]
    return Training(epochs[1:], passes[1:])


def _train_recipe(task: Task, balanced: bool, folder: str, before: Clock, after: Clock) -> None:
    """Train as `python -m recipes.train` does, in a folder."""
    cfg = task.cfg.copy()
    cfg.paths.run_dir, cfg.trainer.max_epochs = folder, task.epochs
    if not balanced:
        cfg.balancing, cfg.arm = {"arm": "off"}, "off"
    run = build_run(cfg)
    own, others = run.trainer.callbacks[: int(balanced)], run.trainer.callbacks[int(balanced) :]  # type: ignore[attr-defined]
    run.trainer.callbacks = [before, *own, after, *others]  # type: ignore[attr-defined]
    run.trainer.fit(run.model, datamodule=run.data)
    for logger in run.trainer.loggers:
        if isinstance(logger, RunFolderWandbLogger):
            logger.close()


def step_seconds(task: Task, device: str) -> tuple[float, float]:
    """Return median seconds of a plain step, and how much longer one with a ratio for each layer takes."""
    optimizers = []
    for balanced in (False, True):
        module = make_module(task).to(device)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer: Optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[assignment,call-overload,index]
        balancer = TempBalance(module, optimizer, assign_func="tb_linear_map") if balanced else None
        optimizers.append((optimizer, balancer))
    plain, ours = rounds([pair[0].step for pair in optimizers], STEPS, lambda step: wall_seconds(step, device))
    longer = statistics.median(b - a for a, b in zip(plain, ours, strict=True))
    return statistics.median(plain), longer


def measure(name: str, device: str, number: int) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """Return what the callback costs a task, and what was measured in each round."""
    task = TASKS[name](device)
    data = task.data()
    data.prepare_data()
    data.setup("fit")
    batches = len(data.train_dataloader())
    threads = torch.get_num_threads()
    torch.set_num_threads(task.cfg.threads or threads)
    found: list[dict[str, Value]] = []
    passes: list[float] = []
    for index in range(number):
        # The machine may be faster at one time than at another: neither is always the first.
        order = ("plain", "callback") if index % 2 else ("callback", "plain")
        arms = {arm: train(task, arm == "callback", device) for arm in order}
        passes += arms["callback"].passes
        plain, ours = (statistics.median(arms[arm].epochs) for arm in ("plain", "callback"))
        found.append(
            {"task": name, "round": index + 1, "plain": plain, "callback": ours, "overhead": ours / plain - 1}
        )
        print(
            f"{name:>18}, round {index + 1} of {number}: {plain:.2f} s an epoch, {ours:.2f} s with the callback",
            flush=True,
        )
    step, longer = step_seconds(task, device)
    epoch = statistics.median(float(row["plain"]) for row in found) * batches / (task.batches or batches)
    measured = statistics.median(passes)
    row: dict[str, Value] = {
        "task": name,
        "threads": torch.get_num_threads(),
        "batches": batches,
        "batches_run": task.batches or batches,
        "epoch": epoch,
        "pass": measured,
        "step": step,
        "step_longer": longer,
        "pass_share": measured / epoch,
        "step_share": batches * longer / epoch,
    }
    if task.batches is None:
        row["overhead"] = statistics.median(float(one["overhead"]) for one in found)
    torch.set_num_threads(threads)
    return row, found


def table(rows: Sequence[Mapping[str, Value]], kind: str) -> str:
    """Return the table of the page."""
    shown = []
    for row in rows:
        whole = row["batches"] == row["batches_run"]
        part = "" if whole else f", from {row['batches_run']} of {row['batches']} batches"
        aim = AIMS.get((str(row["task"]), kind))
        shown.append(
            {
                "task": f"`{row['task']}`",
                "threads": str(row["threads"]),
                "an epoch": f"{float(row['epoch']):.1f} s{part}",
                "the pass": f"{1e3 * float(row['pass']):.0f} ms",
                "its share": f"{100 * float(row['pass_share']):.2f} %",
                "a step longer by": f"{1e3 * float(row['step_longer']):.2f} of {1e3 * float(row['step']):.1f} ms",
                "its share of the epoch": f"{100 * float(row['step_share']):.2f} %",
                "whole epochs longer by": f"{100 * float(row['overhead']):+.1f} %" if whole else "",
                "aim": "" if aim is None else f"below {100 * aim:.0f} %",
            }
        )
    return markdown_table(shown)


@styled
def draw(path: Path, rows: Sequence[Mapping[str, Value]], found: Sequence[Mapping[str, Value]], kind: str) -> None:
    """Draw the shares of pass and step, and what each round measured of whole epochs."""
    figure = new_figure(6.6, 1.2 + 0.6 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        shares = {"pass": 100 * float(row["pass_share"]), "step": 100 * max(0.0, float(row["step_share"]))}
        axes.barh(place, shares["pass"], 0.45, color=BLUE, label="the pass" if not place else "_")
        axes.barh(place, shares["step"], 0.45, shares["pass"], color=GREEN, label="the step" if not place else "_")
        if "overhead" in row:
            measured = [100 * float(one["overhead"]) for one in found if one["task"] == row["task"]]
            label = "whole epochs, each round" if not axes.get_lines() else "_"
            axes.plot(measured, [place] * len(measured), "o", color="0.25", markersize=4, alpha=0.7, label=label)
        aim = AIMS.get((str(row["task"]), kind))
        if aim is not None:
            axes.plot([100 * aim] * 2, [place - 0.38, place + 0.38], color=ORANGE, linestyle="--", label="aim")
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [str(row["task"]) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="% of the epoch without the callback", title="How much longer an epoch takes")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description="What an epoch costs more")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="trainings with the callback, and as many without")
    parser.add_argument("--out", type=Path, default=Path("docs/results/epoch"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_lightning(logging.WARNING)
    kind = torch.device(options.device).type
    machine = describe(options.device, "lightning")
    print(machine)
    rows: list[dict[str, Value]] = []
    found: list[dict[str, Value]] = []
    for name in options.tasks:
        row, measured = measure(name, options.device, options.rounds)
        rows.append(row)
        found += measured
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "epoch.csv", rows)
    write_csv(options.out / "rounds.csv", found)
    draw(options.out / "epoch.png", rows, found, kind)
    picture = "![How much longer an epoch takes](epoch.png)"
    publish(options.out, f"{picture}\n\n{table(rows, kind)}\n\n```\n{machine}\n```")
    print(f"\n{table(rows, kind)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
