"""Tables and pictures of the diagnosis, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.diagnosis.generalisation import DEPTHS, SUMMARIES
from benchmarks.diagnosis.held_back import FACTORS
from benchmarks.diagnosis.measures import MEASURES
from benchmarks.diagnosis.networks import NETWORKS
from benchmarks.intervals import Array, Interval, bootstrap
from benchmarks.results import BLUE, GREEN, ORANGE, PURPLE, markdown_table
from benchmarks.rows import Row
from farms_tb.viewing.plots.style import FAINT, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "difference_table",
    "draw_generalisation",
    "draw_held_back",
    "draw_real",
    "generalisation_table",
    "held_back_table",
    "real_table",
    "warning_table",
]

COLOURS = (BLUE, GREEN, ORANGE, PURPLE)


def held_back_table(rows: Sequence[Row]) -> str:
    """Return the share of the other layers that each measure ranks as better trained, all networks together."""
    lines = []
    for name, measure in MEASURES.items():
        shares = {_factor(factor): _shown(_mean(_scores(rows, name, factor))) for factor in FACTORS}
        lines.append({"measure": measure.label, **shares})
    return markdown_table(lines)


def difference_table(rows: Sequence[Row]) -> str:
    """Return how much more of the other layers the effect ranks rightly than each other measure, paired."""
    lines = []
    for name, measure in MEASURES.items():
        if name == "effect":
            continue
        cells = {}
        for factor in FACTORS:
            pairs = zip(_scores(rows, "effect", factor), _scores(rows, name, factor), strict=True)
            cells[_factor(factor)] = _shown(_mean([own - other for own, other in pairs]), sign=True)
        lines.append({f"{MEASURES['effect'].label} minus": measure.label, **cells})
    return markdown_table(lines)


def warning_table(rows: Sequence[Row]) -> str:
    """Return how often WeightWatcher warns of the layer that was held back, and of the others."""
    names = {"ww_warns": "the layer held back", "ww_warns_others": "the other layers"}
    return markdown_table(
        [
            {"warned of": label, **{_factor(f): _shown(_mean(_scores(rows, name, f))) for f in FACTORS}}
            for name, label in names.items()
        ]
    )


def _scores(rows: Sequence[Row], name: str, factor: float, network: str = "") -> list[Array]:
    """Return the column of each network, `(seeds,)`; of one network where it is named."""
    chosen = [network] if network else list(NETWORKS)
    return [
        np.array([float(row[name]) for row in rows if (row["network"], row["factor"]) == (kind, factor)])
        for kind in chosen
    ]


def _mean(samples: Sequence[Array]) -> Interval:
    """Return the mean of the networks' means; its interval is over seeds."""
    return bootstrap(samples, lambda *drawn: float(np.mean([sample.mean() for sample in drawn])))


def _factor(factor: float) -> str:
    return f"lr x {factor:g}" if factor else "frozen"


def _shown(interval: Interval, sign: bool = False) -> str:
    """Return a number and its interval as text."""
    if not np.isfinite(interval).all():
        return "not measured"
    value, low, high = (f"{number:{'+' if sign else ''}.2f}" for number in interval)
    return f"{value} ({low} to {high})"


@styled
def draw_held_back(path: Path, rows: Sequence[Row]) -> None:
    """Draw the share of the other layers that each measure ranks rightly, a panel for each network."""
    figure = new_figure(9.0, 3.9)
    panels = figure.subplots(1, len(NETWORKS), sharey=True)
    places = np.arange(len(MEASURES))
    for axes, network in zip(panels, NETWORKS, strict=True):
        for position, (factor, colour) in enumerate(zip(FACTORS, COLOURS, strict=True)):
            found = [_mean(_scores(rows, name, factor, network)) for name in MEASURES]
            _draw_intervals(axes, found, places + 0.17 * (position - 1.5), colour, _factor(factor))
        axes.axvline(0.5, color=FAINT, linestyle=":")
        axes.set_title(network)
    panels[1].set_xlabel("share of the other layers ranked as better trained")
    panels[0].set_yticks(places, [measure.label for measure in MEASURES.values()])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FACTORS))
    save(figure, path)


def _draw_intervals(axes: Axes, found: Sequence[Interval], places: Array, colour: str, label: str) -> None:
    """Draw values with their intervals, from left to right, at heights of their own."""
    values, low, high = np.array(found).T
    # A percentile interval may leave out the value itself by rounding.
    errors = np.maximum([values - low, high - values], 0)
    axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, markersize=3.5, linewidth=1, label=label)


def _taus(rows: Sequence[Row], name: str) -> dict[str, Interval]:
    """Return Kendall's tau of a summary with the test error: at each depth, their mean, and across depths."""
    groups = [
        np.array([[float(row[name]), float(row["test_error"])] for row in rows if row["depth"] == depth])
        for depth in DEPTHS
    ]
    found = {f"depth {depth}": bootstrap([group], _tau) for depth, group in zip(DEPTHS, groups, strict=True)}
    found["fixed depth"] = bootstrap(groups, lambda *drawn: float(np.mean([_tau(group) for group in drawn])))
    found["across depths"] = bootstrap(groups, lambda *drawn: _tau(np.concatenate(drawn)))
    return found


def _tau(pairs: Array) -> float:
    """Return Kendall's tau-b of two columns, `(N, 2)`: how far they agree on the order of all pairs of rows."""
    first, second = (np.sign(column[:, None] - column) for column in pairs.T)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def generalisation_table(rows: Sequence[Row]) -> str:
    """Return Kendall's tau of each summary with the test error."""
    lines = []
    for name, label in SUMMARIES.items():
        lines.append(
            {"summary": label, **{where: _shown(tau, sign=True) for where, tau in _taus(rows, name).items()}}
        )
    return markdown_table(lines)


@styled
def draw_generalisation(path: Path, rows: Sequence[Row]) -> None:
    """Draw Kendall's tau of each summary, at fixed depth and across depths, and one summary against the error."""
    figure = new_figure(9.0, 3.9)
    taus, points = figure.subplots(1, 2, width_ratios=[1.2, 1])
    places = np.arange(len(SUMMARIES))
    for where, colour, shift in (("fixed depth", BLUE, -0.13), ("across depths", ORANGE, 0.13)):
        found = [_taus(rows, name)[where] for name in SUMMARIES]
        _draw_intervals(taus, found, places + shift, colour, where)
    taus.axvline(0, color=FAINT, linestyle=":")
    taus.set_yticks(places, list(SUMMARIES.values()), fontsize="x-small")
    taus.invert_yaxis()
    taus.set(xlabel="Kendall's tau with the test error")
    taus.legend(loc="upper right")
    for depth, colour in zip(DEPTHS, COLOURS, strict=False):
        chosen = [row for row in rows if row["depth"] == depth]
        x, y = ([float(row[name]) for row in chosen] for name in ("effect", "test_error"))
        points.plot(x, y, "o", color=colour, markersize=3.5, label=f"{depth} layers")
    points.set(xlabel="mean effect", ylabel="test error", title="one point a network")
    points.legend()
    save(figure, path)


def real_table(rows: Sequence[Row], known: Mapping[str, str]) -> str:
    """Return a row for each real model.

    Args:
        rows: one a layer.
        known: what is known of each model.
    """
    lines = []
    for model, words in known.items():
        chosen = [row for row in rows if row["model"] == model]
        if not chosen:
            continue
        effects = [float(row["effect"]) for row in chosen]
        verdicts = [str(row["verdict"]) for row in chosen]
        lines.append(
            {
                "model": model,
                "matrices": str(len(chosen)),
                "mean FARMS alpha": f"{np.mean([float(row['alpha']) for row in chosen]):.2f}",
                "effect: mean, range": f"{np.mean(effects):.2f}, {min(effects):.2f} to {max(effects):.2f}",
                "verdicts": ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(sorted(verdicts))),
                "what is known": words,
            }
        )
    return markdown_table(lines)


@styled
def draw_real(path: Path, rows: Sequence[Row], known: Mapping[str, str]) -> None:
    """Draw the effect and the alpha of the whole matrix of each layer, in the order of the file."""
    models = [model for model in known if any(row["model"] == model for row in rows)]
    figure = new_figure(9.0, 2.2 * len(models) + 0.4)
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axes, model in zip(panels, models, strict=True):
        chosen = [row for row in rows if row["model"] == model]
        x = np.arange(len(chosen))
        axes.plot(x, [float(row["whole_alpha"]) - float(row["null"]) for row in chosen], ".", color=FAINT)
        random = np.array([row["verdict"] == "random" for row in chosen])
        effects = np.array([float(row["effect"]) for row in chosen])
        axes.plot(x[~random], effects[~random], "o", color=BLUE, markersize=3)
        axes.plot(x[random], effects[random], "s", color=ORANGE, markersize=6)
        axes.axhline(0, color=FAINT, linestyle=":")
        axes.set(title=f"{model}: alpha - permutation null", ylabel="effect", xlabel="layer")
    labels = ["whole matrix", "FARMS", "FARMS, verdict random"]
    figure.legend(panels[0].lines[:3], labels, loc="outside lower center", ncols=3)
    save(figure, path)
