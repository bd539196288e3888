"""Does balancing help? The studies of all tasks together, from their published runs.

    python -m benchmarks.tasks

Nothing is trained. Reads the `results.csv` of the studies in `docs/results`, sorts their arms into methods, and
takes the tasks as a sample of tasks: what would a method do on another one like these? Writes `tasks.csv`, a row
for each method and task, `tasks.png` and the table of `README.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.published import BASELINE, RESULTS, published_runs
from benchmarks.results import GREEN, ORANGE, Value, markdown_table, publish, write_csv
from farms_tb.viewing.plots.style import new_figure
from recipes.study.effects import POOLED, Row, summarise
from recipes.study.figure_style import plain_axes, save
from recipes.study.pairs import FinalRuns, final_ratios, final_runs
from recipes.study.records import Job, Record
from recipes.study.statistics import TaskEffect, effect_over_tasks
from recipes.study.units import percent

METHODS = {
    "whole": "papers' maps,\nwhole matrices",
    "farms": "papers' maps,\nFARMS",
    "reversed": "papers' maps,\nreversed",
    "shuffled": "ratios on the\nwrong layers",
    "shrinkage": "shrunk effects\n(the default)",
    "small_alpha": "shrunk effects,\nreversed",
    "ends": "no alpha: first and\nlast layer x 5",
}
"""What arms of different studies have in common, and its title in the figure."""


@dataclass(frozen=True)
class Task:
    """The published runs of one cell.

    Attributes:
        name: what it is called on the page.
        folder: of its `results.csv`, below `docs/results`.
        cell: its name there.
        arms: the arm that stands for each method.
        shuffles: the method whose ratios are dealt to the wrong layers in "shuffled".
        searched: folder of the same arms at the rates of their own searches, where all have one rate in `folder`.
    """

    name: str
    folder: str
    cell: str
    arms: Mapping[str, str]
    shuffles: str = "whole"
    searched: str = ""


_WHOLE = {"whole": "full", "reversed": "full_reversed", "shuffled": "full_permuted"}
_SHRUNK = {"shrinkage": "shrinkage", "small_alpha": "small_alpha"}
_SMALL = {"whole": "full", "farms": "farms", "shuffled": "placebo"}
_LORA = {"whole": "model_balancing", "reversed": "reversed", "shuffled": "permuted"}
_DARCY = {
    "whole": "full_s1",
    "reversed": "full_s1_reversed",
    "shuffled": "full_s1_permuted",
    "shrinkage": "shrinkage",
}
_BLOCKS = {**_LORA, "shrinkage": "shrinkage"}
_LANGUAGE = {"farms": "farms", "reversed": "farms_reversed", "ends": "embedding_head_faster", **_SHRUNK}
_LANGUAGE["shuffled"] = "small_alpha_permuted"

TASKS = (
    Task("VGG-16, 50 digits", "study", "digits_vgg16_50", _SMALL, "farms"),
    Task("VGG-16, 100 digits", "study", "digits_vgg16_100", _SMALL, "farms"),
    Task("VGG-16, 300 digits", "study/digits_vgg16_300_one_rate", "digits_vgg16_300", _SMALL, "farms", "study"),
    Task(
        "ResNet-18, 50 digits", "study/digits_resnet18_50_one_rate", "digits_resnet18_50", _SMALL, "farms", "study"
    ),
    Task("ResNet-18, 100 digits", "direction/images_and_fields", "digits_resnet18_100", {**_WHOLE, **_SHRUNK}),
    Task("ResNet-18, 300 digits", "study", "digits_resnet18_300", _SMALL, "farms"),
    Task(
        "ResNet-18, 1,000 FashionMNIST",
        "controls/images/fashion",
        "fashion_resnet18_1000",
        {**_WHOLE, **_SHRUNK, "ends": "ends_faster"},
    ),
    Task(
        "transformer, 300 digits",
        "controls/images/digits_vit_one_rate",
        "digits_vit_300",
        {**_WHOLE, **_SHRUNK, "ends": "embedding_head_faster"},
        searched="controls/images/digits_vit",
    ),
    Task(
        "transformer, 1,000 FashionMNIST",
        "controls/images/fashion",
        "fashion_vit_1000",
        {**_WHOLE, **_SHRUNK, "ends": "embedding_head_faster"},
    ),
    Task("UNet, 50 Darcy flow", "study", "darcy_unet_50", _SMALL, "farms"),
    Task("FNO, 50 Darcy flow", "direction/images_and_fields", "darcy_fno_50", {**_WHOLE, **_SHRUNK}),
    Task(
        "FNO, 50 Darcy flow, published regime",
        "controls/darcy_flow/darcy_beta100",
        "darcy_beta100_fno_180",
        _DARCY,
    ),
    Task(
        "FNO, 225 Darcy flow, published regime",
        "controls/darcy_flow/darcy_beta100_40",
        "darcy_beta100_fno_40",
        {"whole": "full_s1", "reversed": "full_s1_reversed", "shuffled": "full_s1_reversed_permuted"},
        "reversed",
    ),
    Task(
        "FNO, 450 Darcy flow, half of the epochs",
        "controls/darcy_flow/darcy_beta100_20",
        "darcy_beta100_fno_20",
        {"whole": "full_s1", "reversed": "full_s1_reversed", "shuffled": "full_s1_permuted"},
    ),
    Task(
        "UNet, 225 Darcy flow, published regime",
        "controls/darcy_flow/darcy_beta100_unet",
        "darcy_beta100_unet_40",
        _DARCY,
    ),
    Task("MiniLM, 113 messages", "controls/fine_tuning/newsgroups", "newsgroups_minilm_1", _BLOCKS),
    Task(
        "MiniLM, 565 messages",
        "controls/fine_tuning/newsgroups_5_one_rate",
        "newsgroups_minilm_5",
        _BLOCKS,
        searched="controls/fine_tuning/newsgroups_5",
    ),
    Task(
        "MiniLM, 1,129 messages",
        "controls/fine_tuning/newsgroups_10",
        "newsgroups_minilm_10",
        {"whole": "model_balancing", "reversed": "reversed"},
    ),
    Task(
        "MiniLM with LoRA, 113 messages",
        "controls/fine_tuning/newsgroups_lora",
        "newsgroups_minilm_1_lora",
        _LORA,
    ),
    Task(
        "MiniLM with LoRA, 565 messages",
        "controls/fine_tuning/newsgroups_lora_5",
        "newsgroups_minilm_5_lora",
        _LORA,
    ),
    Task(
        "MiniLM with LoRA, 1,129 messages",
        "controls/fine_tuning/newsgroups_lora_10",
        "newsgroups_minilm_10_lora",
        {"whole": "model_balancing", "reversed": "reversed"},
    ),
    Task(
        "SmolLM2, 10,240 tokens",
        "controls/language_models/smollm2",
        "smollm2_wikipedia_short",
        _WHOLE,
    ),
    Task(
        "language model, 0.07 million",
        "controls/language_models/variations",
        "tiny_lm_mini",
        {"small_alpha": "small_alpha", "ends": "embedding_head_faster"},
    ),
    Task(
        "language model, 0.23 million",
        "controls/language_models/tiny_lm_small",
        "tiny_lm_small",
        _LANGUAGE,
        "small_alpha",
    ),
    Task("language model, 0.86 million", "direction/tiny_lm", "tiny_lm_400", _LANGUAGE, "small_alpha"),
)
"""Tasks that differ in network or data; those that differ in steps, decay and the like are left out."""

SEARCHED = tuple(replace(task, folder=task.searched or task.folder) for task in TASKS)
"""The same tasks, each arm at the rate of its own search."""

_ACTS = 0.05
"""Standard deviation of the ratios from which on a map is said to change the rates."""


def runs_of(task: Task, results: Path = RESULTS) -> dict[Job, Record]:
    """Return the runs of a task that are compared, with methods in place of arms.

    Args:
        task: the task.
        results: folder of all results.

    Raises:
        ValueError: an arm has no runs there.
    """
    method_of = {arm: method for method, arm in task.arms.items()} | {BASELINE: BASELINE}
    records = published_runs(task.folder, task.cell, results, method_of).values()
    runs = [replace(record, arm=method_of[record.arm]) for record in records if record.arm in method_of]
    return {run.job: run for run in runs}


def compare(tasks: Sequence[Task], results: Path = RESULTS) -> list[Row]:
    """Return the effect of each method on each task, and over the tasks, where the rows have `over_tasks`.

    Args:
        tasks: the tasks.
        results: folder of all results.
    """
    cells = {task.name: runs_of(task, results) for task in tasks}
    return [row for row in summarise(cells, [BASELINE, *METHODS], BASELINE) if row.arm != BASELINE]


def placement(tasks: Sequence[Task], results: Path = RESULTS, *, same_rate: bool = False) -> TaskEffect | None:
    """Return what it changes that ratios go to the layers that alpha says, and not to others.

    Args:
        tasks: the tasks; those without shuffled ratios are left out.
        results: folder of all results.
        same_rate: leave out the tasks in which the two have base rates of their own, too.

    Returns:
        The log ratio of the errors, right layers against wrong ones, over the tasks; None with fewer than two.
    """
    return _compared(tasks, lambda task: task.shuffles, "shuffled", results, same_rate)


def direction(tasks: Sequence[Task], results: Path = RESULTS, *, same_rate: bool = False) -> TaskEffect | None:
    """Return what it changes that layers with large alphas learn faster, and not those with small ones.

    Args:
        tasks: the tasks; those without a reversed map are left out.
        results: folder of all results.
        same_rate: leave out the tasks in which the two have base rates of their own, too.

    Returns:
        The log ratio of the errors, papers' direction against the other, over the tasks; None with fewer than two.
    """

    def reversed_map(task: Task) -> str:
        return "whole" if "whole" in task.arms else "farms"

    return _compared(tasks, reversed_map, "reversed", results, same_rate)


def _compared(
    tasks: Sequence[Task], method_of: Callable[[Task], str], other: str, results: Path, same_rate: bool
) -> TaskEffect | None:
    """Return how the error by each task's method differs from that by another one, over the tasks with both."""
    cells = []
    for task in tasks:
        runs, method = final_runs(runs_of(task, results)), method_of(task)
        if other in runs and not (same_rate and _rate(runs, method) != _rate(runs, other)):
            cells.append(final_ratios(runs, method, other, "test"))
    return effect_over_tasks(cells)


def _rate(runs: FinalRuns, method: str) -> float:
    """Return the base rate that the runs of a method have."""
    return next(iter(runs[method].values())).lr


def where_it_acts(method: str, tasks: Sequence[Task], results: Path = RESULTS) -> TaskEffect | None:
    """Return what a map changes over those tasks in which it gives layers different rates.

    Args:
        method: the map.
        tasks: the tasks.
        results: folder of all results.
    """
    cells = []
    for task in tasks:
        runs = final_runs(runs_of(task, results))
        if method in runs and fmean(run.ratio_sd for run in runs[method].values()) > _ACTS:
            cells.append(final_ratios(runs, method, BASELINE, "test"))
    return effect_over_tasks(cells)


def flat(row: Row) -> dict[str, Value]:
    """Return the row of the CSV file; effects are log ratios of the errors."""
    assert row.effect is not None
    low, high = row.effect.low, row.effect.high
    return {
        "method": row.arm,
        "task": row.cell,
        "lr": row.lr,
        "seeds": row.effect.pairs,
        "effect": row.effect.mean,
        "low": low,
        "high": high,
    }


def table(rows: Sequence[Row]) -> str:
    """Return what is known of each method: its mean over tasks, and how often it helps and does harm.

    Args:
        rows: as from `compare`.
    """
    lines = []
    for method, title in METHODS.items():
        pooled = _over_tasks(rows, method)
        effects = [row.effect for row in rows if row.arm == method and row.cell != POOLED and row.effect]
        if pooled:
            lines.append(
                {
                    "method": title.replace("\n", " "),
                    "tasks": str(pooled.cells),
                    "change of the error": in_words(pooled),
                    "deviation between tasks": f"{100 * pooled.tau:.1f} %",
                    "better": str(sum(effect.high < 0 for effect in effects)),
                    "worse": str(sum(effect.low > 0 for effect in effects)),
                }
            )
    return markdown_table(lines)


def summary(rows: Sequence[Row]) -> str:
    """Return what the page says: all methods, some on a part of the tasks, and all at the rates of the searches.

    Args:
        rows: as from `compare` of `TASKS`.
    """
    others = compare([task for task in TASKS if not task.name.startswith("language model")])
    without_lora = compare([task for task in TASKS if "LoRA" not in task.name])
    parts = {
        "Ratios on the layers that alpha says, against the same on the wrong layers": placement(TASKS),
        "Of these, where the two have the same base rate": placement(TASKS, same_rate=True),
        "Papers' maps, in their direction against the same reversed": direction(TASKS),
        "Of these, too, where the two have the same base rate": direction(TASKS, same_rate=True),
        "Shrunk effects, where they change the rates at all": where_it_acts("shrinkage", TASKS),
        "Papers' maps, FARMS, without the language models": _over_tasks(others, "farms"),
        "Papers' maps, whole matrices, without LoRA": _over_tasks(without_lora, "whole"),
    }
    paragraphs = [table(rows)]
    paragraphs += [f"{what}: {in_words(found)}, {found.cells} tasks." for what, found in parts.items() if found]
    paragraphs += ["With the rates of the searches in all tasks:", table(compare(SEARCHED))]
    return "\n\n".join(paragraphs)


def _over_tasks(rows: Sequence[Row], method: str) -> TaskEffect | None:
    """Return the mean of a method over tasks; None with fewer than two."""
    return next((row.over_tasks for row in rows if row.arm == method and row.over_tasks), None)


def in_words(found: TaskEffect) -> str:
    """Return a mean over tasks, in per cent, with its interval."""
    return f"{percent(found.mean):+.1f} % ({percent(found.low):+.1f} to {percent(found.high):+.1f} %)"


def draw(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Draw the change of each task's error by each method, a panel a method.

    Args:
        rows: as from `compare`.
        names: of the tasks, downwards.
        path: of the picture.
    """
    figure = new_figure(14, 5.4)
    panels = figure.subplots(1, len(METHODS), sharex=True, sharey=True)
    for (method, title), axes in zip(METHODS.items(), panels, strict=True):
        own = {row.cell: row for row in rows if row.arm == method}
        _draw_method(axes, own, names)
        axes.set_title(title, fontsize=9)
    panels[0].set_yticks(range(len(names) + 1), [*names, "tasks like these"])
    panels[0].set_ylim(len(names) + 0.6, -0.6)
    panels[0].set_xticks(range(-25, 51, 25))
    figure.supxlabel(
        "change of the test error against tuned training, % (95 % interval); left is better", fontsize=9
    )
    save(figure, path)


def _draw_method(axes: Any, own: Mapping[str, Row], names: Sequence[str]) -> None:
    """Draw the tasks of one method, and its mean over tasks in the row below them."""
    shown = [(place, own[name].effect) for place, name in enumerate(names) if name in own]
    shown.append((len(names), own[POOLED].over_tasks if POOLED in own else None))
    for place, interval in shown:
        if interval is not None:
            mean, low, high = (percent(value) for value in (interval.mean, interval.low, interval.high))
            colour = "0.45"
            if high < 0:
                colour = GREEN
            elif low > 0:
                colour = ORANGE
            marker = "D" if place == len(names) else "o"
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt=marker, markersize=4, color=colour)
    axes.axvline(0.0, color="0.3", linewidth=0.8, zorder=0.5)
    axes.axhspan(len(names) - 0.5, len(names) + 0.6, color="0.95", zorder=0)
    plain_axes(axes, "x")
    axes.tick_params(axis="y", length=0)


def main() -> None:
    """Compare, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description="Does balancing help?")
    parser.add_argument("--out", type=Path, default=RESULTS / "tasks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = compare(TASKS)
    write_csv(options.out / "tasks.csv", [flat(row) for row in rows if row.cell != POOLED])
    draw(rows, [task.name for task in TASKS], options.out / "tasks.png")
    text = summary(rows)
    publish(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
