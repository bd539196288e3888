"""Draw and save the pictures that compare several runs: all that there is data for, or some.

`save_comparison` is what `farms-tb plot RUN RUN ...` calls, and `left_out` says what it does not draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from farms_tb.viewing.plots.everything import FOLDER, check_wanted, save_pictures
from farms_tb.viewing.plots.runs import (
    Runs,
    alphas_of,
    check_number_of_runs,
    logged_by,
    plot_alpha_by_layer,
    plot_mean_alpha,
    plot_metrics,
    plot_ratio_spread,
    plot_runs_by_depth,
    ratios_of,
    records_with,
)
from farms_tb.viewing.plots.style import PathLike
from farms_tb.viewing.several_runs import in_every_run, in_some_runs, listed


class _Picture(NamedTuple):
    """One picture that compares runs.

    Attributes:
        draw: takes the runs and a path.
        data: returns what is drawn, by run and then by layer or metric, of the runs that have it.
        called: what the data are called in a sentence.
        of: what each value is of, in the plural.
        common: whether there is nothing to draw unless all runs have some of these in common.
    """

    draw: Callable[..., object]
    data: Callable[[Runs], Mapping[str, Mapping[str, Any]]]
    called: str
    of: str = "layers"
    common: bool = True


_PICTURES = {
    "alpha_mean": _Picture(plot_mean_alpha, alphas_of, "logged alphas", common=False),
    "alpha_by_layer": _Picture(plot_alpha_by_layer, alphas_of, "logged alphas"),
    "lr_ratio_spread": _Picture(plot_ratio_spread, ratios_of, "logged learning-rate ratios", common=False),
    "metrics": _Picture(plot_metrics, logged_by, "other metrics in metrics.csv", of="metrics"),
    "alpha_by_depth": _Picture(plot_runs_by_depth, partial(records_with, quantity="alpha"), "measured weights"),
    "effect_by_depth": _Picture(
        partial(plot_runs_by_depth, quantity="effect"),
        partial(records_with, quantity="effect"),
        "permutation nulls (--null)",
    ),
}

COMPARISONS = tuple(_PICTURES)
"""Names of the pictures that compare runs."""


def save_comparison(
    runs: Runs,
    output_dir: PathLike = FOLDER,
    *,
    title: str = "",
    suffix: str = ".png",
    pictures: Sequence[str] | None = None,
) -> list[Path]:
    """Draw every picture that compares runs, or some of them: all runs in one frame.

    `alpha_mean`, `alpha_by_layer`, `lr_ratio_spread` and `metrics` from what at least two of the runs have logged;
    `alpha_by_depth` from their last checkpoints or from files of weights, and with permutation nulls
    `effect_by_depth`. They show the layers and metrics that all runs have; `left_out(runs)` says what is not.

    Args:
        runs: the runs by the names that the legend shows, as
            `farms_tb.viewing.several_runs.read_runs` returns them.
        output_dir: where the pictures go; made if it does not exist.
        title: a heading for all, shown as it is.
        suffix: the format: `".png"` (300 dpi), `".pdf"`, `".svg"` or any that matplotlib writes.
        pictures: the names of those to draw; None for all that can be drawn.

    Returns:
        The pictures made.

    Raises:
        ValueError: there is no such picture or no data for it, or none can be drawn; matplotlib does not know the
            format; or there are more than 28 runs.
        ImportError: matplotlib is not installed.
    """
    check_wanted(pictures, suffix, COMPARISONS)
    check_number_of_runs(len(runs))
    drawable = [name for name in COMPARISONS if _can_be_drawn(name, runs)]
    chosen = drawable if pictures is None else pictures
    if not chosen:
        raise ValueError(f"the runs have nothing to compare. {' '.join(left_out(runs))}")
    for name in chosen:
        if name not in drawable:
            reasons = " ".join(left_out(runs)) or f"None has {_PICTURES[name].called}."
            raise ValueError(f"the runs have no data to compare for the picture {name!r}. {reasons}")
    wanted = {name: partial(_PICTURES[name].draw, runs, title=title) for name in chosen}
    return save_pictures(wanted, Path(output_dir), suffix)


def left_out(runs: Runs) -> list[str]:
    """Return a sentence for each thing that pictures of several runs do not show, though some run has it."""
    sentences = []
    for picture in _PICTURES.values():
        data = picture.data(runs)
        lacking = [name for name in runs if name not in data]
        if data and lacking:
            sentences.append(f"Without {picture.called}, and left out of pictures of these: {listed(lacking)}.")
        not_common = in_some_runs(data)
        if len(data) < 2 or not not_common:
            continue
        if in_every_run(data):
            sentence = f"Left out are {picture.of} that only some of the runs have: {listed(not_common)}."
        else:
            sentence = f"The runs have no {picture.of} in common, only some of them have {listed(not_common)}."
        sentences.append(sentence)
    return list(dict.fromkeys(sentences))


def _can_be_drawn(name: str, runs: Runs) -> bool:
    """Return whether two runs or more have the data of a picture, and in common what it compares."""
    picture = _PICTURES[name]
    data = picture.data(runs)
    return len(data) > 1 and (not picture.common or bool(in_every_run(data)))
