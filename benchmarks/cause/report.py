"""Tables and pictures of the causes: means over seeds, with 95 % intervals where runs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.cause.bytes import GROUPS
from benchmarks.cause.runs import SETTINGS, TYPES
from benchmarks.cause.steps import FACTORS, MOMENTS
from benchmarks.intervals import Array
from benchmarks.results import BLUE, GREEN, ORANGE, PURPLE, markdown_table
from benchmarks.rows import Row
from farms_tb.viewing.plots.style import FAINT, new_figure, save, styled

__all__ = ["agreement", "change", "page"]

COLOURS = dict(zip(TYPES, (ORANGE, PURPLE, BLUE, GREEN, FAINT), strict=True))
BASELINE = "AdamW"
LEAST = min(FACTORS) / 2
"""What a best multiple of 0 counts as where multiples are averaged in their logarithms."""

DRAWN = ("AdamW", "AdamW, both faster", "LLR", "SGD", "high rate")
"""Settings whose steps are drawn; the table has all."""

SHOWN = {
    "signal": "signal of the gradient",
    "relative_step": "relative size of a step",
    "best_factor": "best multiple of the step",
    "effect": "effect (alpha - null)",
    "ratio": "learning-rate ratio",
}
"""Columns that are drawn and in the table, and what they are called."""


def page(out: Path, steps: Sequence[Row], ends: Sequence[Row]) -> str:
    """Draw the pictures and return the sections of the page.

    Args:
        out: where the pictures go.
        steps: a row for each setting, seed, moment and type of matrix.
        ends: a row for each setting, seed, role and group of bytes.

    Returns:
        Markdown. What there are no rows for is left out: the bytes without a training of the baseline, the picture
        of the steps without a setting that is drawn.
    """
    settings = [name for name in SETTINGS if any(row["setting"] == name for row in steps)]
    sections = []
    if settings:
        sections += [
            f"## Steps\n\n{_explanation()}",
            steps_table(steps, settings),
            "Rank correlation (Kendall's tau over the five types) of the best multiple with alpha, mean over\n"
            "moments and seeds, and its smallest and largest value over seeds:",
            agreement_table(steps, settings),
        ]
    if drawn := [name for name in settings if name in DRAWN]:
        draw_steps(out / "steps.png", steps, drawn)
        sections.append(
            "![Signal, size of the step, best multiple and effect of each type over the steps](steps.png)"
        )
    if seeds := len({row["seed"] for row in ends if row["setting"] == BASELINE}):
        compared = [name for name in settings if name.startswith(f"{BASELINE},") or name == "LLR"]
        draw_bytes(out / "bytes.png", ends, compared)
        sections += [
            f"## Bytes\n\nTest loss in nats, and its change against {BASELINE}: {seeds} seeds, paired (95 %).",
            bytes_table(ends, compared, "input"),
            bytes_table(ends, compared, "target"),
            "![Change of the loss by how often a byte occurs in a batch](bytes.png)",
        ]
    return "\n\n".join(sections)


def _explanation() -> str:
    """Return what the columns of the table of steps are."""
    moments = ", ".join(str(moment) for moment in MOMENTS)
    multiples = ", ".join(f"{factor:g}" for factor in FACTORS)
    return (
        f"Means over seeds and over the moments after {moments} steps (geometric ones of the sizes of\n"
        "steps and of best multiples). *Signal*: share of a batch's squared\n"
        f"gradient that is the mean gradient's, 1 without noise. *Best multiple*: of 0, {multiples} times the\n"
        "step, the one after which the loss is lowest if this type alone moves (0 counted as\n"
        f"{LEAST:g}). *Effect*: alpha minus that of the same entries shuffled."
    )


def steps_table(rows: Sequence[Row], settings: Sequence[str]) -> str:
    """Return what was seen of each type in each setting.

    Args:
        rows: those of the steps.
        settings: their names, in the order of the table.
    """
    lines = []
    for setting in settings:
        for kind in TYPES:
            chosen = [row for row in rows if (row["setting"], row["type"]) == (setting, kind)]
            line = {"setting": setting, "matrices": kind}
            line["seeds"] = str(len({row["seed"] for row in chosen}))
            line |= {label: f"{_mean(chosen, name):.2g}" for name, label in SHOWN.items() if name != "effect"}
            line["gain of a step, nats"] = f"{_mean(chosen, 'gain_1'):.1e}"
            line |= {name: f"{_mean(chosen, name):+.2f}" for name in ("alpha", "effect")}
            lines.append({**line, "alpha": line["alpha"].lstrip("+")})
    return markdown_table(lines)


def agreement_table(rows: Sequence[Row], settings: Sequence[str]) -> str:
    """Return how far the types that could go further are those with large alphas, as the papers' direction has it.

    Args:
        rows: those of the steps.
        settings: their names, in the order of the table.
    """
    lines = []
    for setting in settings:
        chosen = [row for row in rows if row["setting"] == setting]
        seeds = sorted({float(row["seed"]) for row in chosen})
        taus = [agreement([row for row in chosen if row["seed"] == seed]) for seed in seeds]
        value = f"{np.mean(taus):+.2f} ({min(taus):+.2f} to {max(taus):+.2f})"
        lines.append({"setting": setting, "seeds": str(len(seeds)), "tau": value})
    return markdown_table(lines)


def agreement(rows: Sequence[Row]) -> float:
    """Return Kendall's tau-b of alpha and best multiple over the types, the mean over the moments.

    Args:
        rows: those of the steps of one training. A moment at which all best multiples are equal counts as 0.
    """
    taus = []
    for moment in {row["step"] for row in rows}:
        here = [row for row in rows if row["step"] == moment]
        alphas, multiples = ([float(row[name]) for row in here] for name in ("alpha", "best_factor"))
        taus.append(0.0 if len(set(multiples)) == 1 else float(stats.kendalltau(alphas, multiples).statistic))
    return float(np.mean(taus))


def bytes_table(rows: Sequence[Row], compared: Sequence[str], role: str) -> str:
    """Return the change of the loss against the baseline, for each group of bytes.

    Args:
        rows: those of the bytes.
        compared: settings that are compared with it.
        role: "input" or "target".
    """
    lines = []
    for group in GROUPS:
        base = [row for row in rows if (row["setting"], row["role"], row["group"]) == (BASELINE, role, group)]
        if not base:
            continue
        line = {
            f"times in a batch, {role} byte": group,
            "share": f"{100 * float(base[0]['share']):.0f} %",
            BASELINE: f"{np.mean([float(row['loss']) for row in base]):.3f}",
        }
        for setting in compared:
            if found := change(rows, setting, role, group):
                line[setting] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*found)
        lines.append(line)
    return markdown_table(lines)


def change(rows: Sequence[Row], setting: str, role: str, group: str) -> tuple[float, float, float] | None:
    """Return the mean change of the loss against the baseline, and its t-interval over the seeds that both have.

    Args:
        rows: those of the bytes.
        setting: what is compared with the baseline.
        role: "input" or "target".
        group: of the bytes.

    Returns:
        Change, lower and upper end, nats; None where there are fewer than two seeds.
    """
    losses = [
        {row["seed"]: float(row["loss"]) for row in rows if (row["setting"], row["role"], row["group"]) == key}
        for key in ((setting, role, group), (BASELINE, role, group))
    ]
    both = losses[0].keys() & losses[1].keys()
    if len(both) < 2:
        return None
    differences = np.array([losses[0][seed] - losses[1][seed] for seed in both])
    mean = float(differences.mean())
    reach = float(stats.t.ppf(0.975, len(both) - 1) * differences.std(ddof=1) / np.sqrt(len(both)))
    return mean, mean - reach, mean + reach


def _mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of a column; geometric for sizes and multiples, a multiple of 0 counting as `LEAST`."""
    values: Array = np.array([float(row[name]) for row in rows])
    if name == "best_factor":
        values = np.maximum(values, LEAST)
    if name in ("relative_step", "best_factor"):
        return float(np.exp(np.log(values).mean()))
    return float(np.nanmean(values))


@styled
def draw_steps(path: Path, rows: Sequence[Row], settings: Sequence[str]) -> None:
    """Draw each type's means over the seeds: quantities below each other, settings side by side."""
    figure = new_figure(1.7 * len(settings) + 1.2, 9.0)
    panels = figure.subplots(len(SHOWN), len(settings), sharex=True, sharey="row", squeeze=False)
    for line, (name, label) in zip(panels, SHOWN.items(), strict=True):
        line[0].set_ylabel(label)
        for axes, setting in zip(line, settings, strict=True):
            for kind, colour in COLOURS.items():
                chosen = [row for row in rows if (row["setting"], row["type"]) == (setting, kind)]
                moments = sorted({float(row["step"]) for row in chosen})
                means = [_mean([row for row in chosen if row["step"] == moment], name) for moment in moments]
                axes.plot(moments, means, "o-", color=colour, label=kind)
            if name in ("relative_step", "best_factor"):
                axes.set_yscale("log")
            if name == "best_factor":
                axes.axhline(1, color=FAINT, linestyle=":")
    for axes, setting in zip(panels[0], settings, strict=True):
        axes.set_title(setting)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save(figure, path)


@styled
def draw_bytes(path: Path, rows: Sequence[Row], compared: Sequence[str]) -> None:
    """Draw the change of the loss of each group of bytes: input bytes on the left, target bytes on the right."""
    figure = new_figure(9.0, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(GROUPS))
    for axes, role in zip(panels, ("input", "target"), strict=True):
        for position, (setting, colour) in enumerate(zip(compared, (ORANGE, PURPLE, BLUE, GREEN), strict=False)):
            found = [change(rows, setting, role, group) for group in GROUPS]
            kept = [(place, *one) for place, one in zip(places, found, strict=True) if one]
            if not kept:
                continue
            x, mean, low, high = np.array(kept).T
            shift = 0.14 * (position - (len(compared) - 1) / 2)
            errors = [mean - low, high - mean]
            axes.errorbar(x + shift, mean, yerr=errors, fmt="o", color=colour, markersize=3.5, label=setting)
        axes.axhline(0, color=FAINT, linestyle=":")
        axes.set_xticks(places, GROUPS)
        axes.set(title=f"{role} byte", xlabel="times in a batch")
    panels[0].set_ylabel(f"change of the test loss against {BASELINE}, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(compared))
    save(figure, path)
