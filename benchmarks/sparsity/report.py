"""Tables and pictures of the study, with 95 % intervals over the articles, paired: the same ones for all arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.intervals import Array, Interval
from benchmarks.results import BLUE, GREEN, ORANGE, markdown_table
from benchmarks.rows import Row
from benchmarks.sparsity.arms import SEARCHES, SHUFFLES
from benchmarks.sparsity.study import EPSILONS, best_epsilon
from farms_tb.sparsity.perplexity import PerplexityComparison
from farms_tb.viewing.plots.style import FAINT, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "GROUPS",
    "OWN_LINE",
    "SCORES",
    "Score",
    "draw",
    "epsilon_table",
    "loss_table",
    "paired_table",
    "search_table",
    "seed_table",
]

OWN_LINE = "line in depth, its own epsilon"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "uniform": ("uniform",),
    "line in depth": ("line",),
    OWN_LINE: ("line, own epsilon",),
    "whole-matrix alpha": ("whole",),
    "FARMS alpha": ("FARMS",),
    "FARMS alpha, shrunk": ("shrinkage",),
    "FARMS alpha, shrunk, its own epsilon": ("shrinkage, own epsilon",),
    "FARMS alpha, shuffled": SHUFFLES,
    "search": ("search",),
    "search, three times the text": ("long search",),
}
"""The arms of each line of a table; the mean over three permutations is one."""

METHODS = {"wanda": ("Wanda", BLUE), "magnitude": ("magnitude", ORANGE), "sparsegpt": ("SparseGPT", GREEN)}


@dataclass(frozen=True)
class Score:
    """How the loss of a model is shown.

    Attributes:
        name: of the score.
        compared: what two arms are compared by.
        is_log: whether the loss is the logarithm of the score: then arms are compared by their ratio, else by
            their difference.
    """

    name: str
    compared: str
    is_log: bool

    @property
    def equal(self) -> float:
        """What the comparison of two equal arms gives."""
        return 1.0 if self.is_log else 0.0

    def value(self, loss: float) -> float:
        """Return the score of a loss, or the comparison of a difference of losses."""
        return float(np.exp(loss)) if self.is_log else loss


SCORES: Mapping[str, Score] = {
    "language": Score("perplexity", "ratio of perplexities", is_log=True),
    "encoder": Score("1 - cosine", "difference of 1 - cosine", is_log=False),
}


def epsilon_table(rows: Sequence[Row], score: Score) -> str:
    """Return the score of the uneven arms on calibration text for each epsilon, and what is chosen by their mean.

    Args:
        rows: of the file of epsilons.
        score: how losses are shown.
    """
    best = best_epsilon(rows)
    lines = []
    for epsilon in EPSILONS:
        losses = {str(row["arm"]): float(row["loss"]) for row in rows if row["epsilon"] == epsilon}
        cells = {arm: _number(score.value(loss)) for arm, loss in losses.items()}
        mean = _number(score.value(float(np.mean(list(losses.values())))))
        chosen = " (chosen)" if epsilon == best else ""
        lines.append({"epsilon": f"{epsilon:g}{chosen}", **cells, "mean": mean})
    return markdown_table(lines)


def loss_table(rows: Sequence[Row], method: str, score: Score) -> str:
    """Return the score of each arm at each target, the mean over calibration seeds and permutations.

    Args:
        rows: of the runs.
        method: how the model was pruned.
        score: how losses are shown.
    """
    lines = []
    for label in _labels(rows, method):
        cells = {}
        for target in _targets(rows, method):
            losses = _losses(rows, method, target, GROUPS[label])
            cells[f"{target:g}"] = _number(score.value(float(losses.mean()))) if losses.size else "not measured"
        lines.append({"arm": label, **cells})
    return markdown_table(lines)


def paired_table(rows: Sequence[Row], method: str, score: Score, reference: str) -> str:
    """Return each arm compared with one of them, article by article.

    Args:
        rows: of the runs.
        method: how the model was pruned.
        score: how losses are shown.
        reference: a key of `GROUPS`; the table is empty where it was not run.
    """
    lines = []
    labels = _labels(rows, method)
    for label in labels if reference in labels else ():
        if label == reference:
            continue
        cells = {}
        for target in _targets(rows, method):
            found = compared(rows, (method, target), score, (label, reference))
            cells[f"{target:g}"] = "not measured" if found is None else _shown(found, score)
        lines.append({f"compared with: {reference}": label, **cells})
    return markdown_table(lines)


def seed_table(rows: Sequence[Row], score: Score) -> str:
    """Return each arm compared with the uniform one by Wanda, for each calibration seed by itself.

    Args:
        rows: of the runs.
        score: how losses are shown.
    """
    lines = []
    for label in _labels(rows, "wanda"):
        if label == "uniform":
            continue
        targets = _targets(rows, "wanda")
        cells = {f"{target:g}": _by_seed(rows, ("wanda", target), score, label) for target in targets}
        lines.append({"compared with: uniform": label, **cells})
    return markdown_table(lines)


def _by_seed(rows: Sequence[Row], cell: tuple[str, float], score: Score, label: str) -> str:
    """Return how an arm compares with the uniform one for each seed, as text."""
    found = []
    for seed in sorted({float(row["seed"]) for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        comparison = compared(of_seed, cell, score, (label, "uniform"))
        if comparison is not None:
            found.append(_number(comparison[0]))
    return " and ".join(found) or "not measured"


def compared(rows: Sequence[Row], cell: tuple[str, float], score: Score, pair: tuple[str, str]) -> Interval | None:
    """Compare two arms over the articles, their losses averaged over calibration seeds and permutations.

    Args:
        rows: of the runs.
        cell: method and target.
        score: how losses are shown.
        pair: keys of `GROUPS`, the second one the reference.

    Returns:
        The comparison with the interval of a paired t test; None where a run of either is missing.
    """
    arms, references = (GROUPS[label] for label in pair)
    seeds = _seeds(rows, cell, arms) & _seeds(rows, cell, references)
    if not seeds:
        return None
    own, others = (_losses(rows, *cell, names, seeds).mean(0) for names in (arms, references))
    found = PerplexityComparison(own - others)
    return score.value(found.difference), *map(score.value, found.interval)


def search_table(rows: Sequence[Row]) -> str:
    """Return the coefficients that each search found, and the number of its candidates."""
    lines = []
    for row in rows:
        if row["arm"] not in SEARCHES:
            continue
        found = {name: float(row.get(f"c {name}", "nan")) for name in ("line", "alpha", "shrinkage")}
        lines.append(
            {
                "arm": str(row["arm"]),
                "method": METHODS[str(row["method"])][0],
                "target": f"{row['target']:g}",
                "seed": f"{row['seed']:g}",
                **{name: _coefficient(value) for name, value in found.items()},
                "candidates": f"{row['evaluations']:g}",
            }
        )
    return markdown_table(lines)


def _coefficient(value: float) -> str:
    """Return a coefficient as text; nothing for a direction that there was none of."""
    if math.isnan(value):
        return ""
    return f"{value:+.3f}" if value else "0"


@styled
def draw(path: Path, rows: Sequence[Row], score: Score) -> None:
    """Draw each arm compared with the uniform one: a row of panels for each method, a panel for each target."""
    measured = [method for method in METHODS if _targets(rows, method)]
    columns = max(len(_targets(rows, method)) for method in measured)
    figure = new_figure(9.6, 2.2 * len(measured) + 0.4)
    panels = figure.subplots(len(measured), columns, sharey=True, squeeze=False)
    labels = [label for label in _labels(rows) if label != "uniform"]
    for method, row in zip(measured, panels, strict=True):
        for axes, target in zip(row, _targets(rows, method), strict=False):
            found = [compared(rows, (method, target), score, (label, "uniform")) for label in labels]
            _draw_panel(axes, found, score, METHODS[method][1])
            axes.set_title(f"{METHODS[method][0]}, {target:g}")
        for axes in row[len(_targets(rows, method)) :]:
            axes.set_visible(False)
    panels[0, 0].set_yticks(range(len(labels)), labels)
    panels[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(
        f"{score.compared}, arm against uniform: left of the dotted line is better", fontsize="medium"
    )
    save(figure, path)


def _draw_panel(axes: Axes, found: Sequence[Interval | None], score: Score, colour: str) -> None:
    """Draw comparisons with their intervals, one below the other; those that are missing leave a gap."""
    for place, interval in enumerate(found):
        if interval is not None:
            value, low, high = interval
            error = [[value - low], [high - value]]
            axes.errorbar([value], [place], xerr=error, fmt="o", color=colour, markersize=3.5, linewidth=1)
    axes.axvline(score.equal, color=FAINT, linestyle=":")
    axes.locator_params(axis="x", nbins=2)


def _labels(rows: Sequence[Row], method: str | None = None) -> list[str]:
    """Return the groups of arms that there are rows of; of one method where it is named."""
    arms = {row["arm"] for row in rows if method is None or row["method"] == method}
    return [label for label, members in GROUPS.items() if arms & set(members)]


def _targets(rows: Sequence[Row], method: str) -> list[float]:
    """Return the targets that there are rows of, of one method, in order."""
    return sorted({float(row["target"]) for row in rows if row["method"] == method})


def _seeds(rows: Sequence[Row], cell: tuple[str, float], arms: Sequence[str]) -> set[float]:
    """Return the calibration seeds for which all these arms were run."""
    chosen = [row for row in rows if (row["method"], row["target"]) == cell]
    found = [{float(row["seed"]) for row in chosen if row["arm"] == arm} for arm in arms]
    return set.intersection(*found)


def _losses(
    rows: Sequence[Row], method: str, target: float, arms: Sequence[str], seeds: set[float] | None = None
) -> Array:
    """Return the losses of the runs of some arms on each segment, `(runs, segments)`.

    Args:
        rows: of the runs.
        method: how the model was pruned.
        target: the sparsity.
        arms: their names.
        seeds: calibration seeds; None for all of which every arm has a run.
    """
    kept = _seeds(rows, (method, target), arms) if seeds is None else seeds
    chosen = [
        row
        for row in rows
        if (row["method"], row["target"]) == (method, target) and row["arm"] in arms and row["seed"] in kept
    ]
    return np.array([[float(row[name]) for name in row if str(name).startswith("segment ")] for row in chosen])


def _number(value: float) -> str:
    """Return a number with three digits, large ones without a power of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _shown(interval: Interval, score: Score) -> str:
    """Return a comparison and its interval as text, in bold where the interval lies on the better side."""
    value, low, high = interval
    if score.is_log:
        text = f"{value:.3g} ({low:.3g} to {high:.3g})"
    else:
        text = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if high < score.equal else text
