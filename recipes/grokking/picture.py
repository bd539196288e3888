"""Draw runs of `experiment=grokking_mlp`: accuracy and alpha against the steps, a column a run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farms_tb.viewing.plots.style import FAINT, PathLike, depth_colours, heading, new_figure, plain, save, styled
from recipes.errors import RecipeError
from recipes.grokking.task import TRAPS
from recipes.loggers import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curves", "draw_runs", "read_run"]

ALPHA = "farms/alpha/"
RANDOM_ALPHA = 2.11
"""FARMS alpha of a large random matrix."""

Points = dict[int, float]
"""A number by step."""


@dataclass(frozen=True)
class Curves:
    """What one run has logged, by step.

    Attributes:
        title: what the run is, for the picture.
        train_accuracy: on the training images.
        held_out_accuracy: on the validation images, which choose nothing here.
        weight_norm: Euclidean norm of all parameters.
        alphas: FARMS alpha by layer.
        traps: outliers of the shuffled matrix, by layer.
    """

    title: str
    train_accuracy: Points
    held_out_accuracy: Points
    weight_norm: Points
    alphas: Mapping[str, Points]
    traps: Mapping[str, Points]

    def rows(self) -> list[dict[str, float | str]]:
        """Return one row for each step at which the layers were measured, for a CSV file."""
        steps = sorted(next(iter(self.alphas.values())))
        found: list[dict[str, float | str]] = []
        for step in steps:
            row: dict[str, float | str] = {"run": self.title, "step": step}
            for name in ("train_accuracy", "held_out_accuracy", "weight_norm"):
                row[name] = getattr(self, name).get(step, math.nan)
            for name, curves in (("alpha", self.alphas), ("traps", self.traps)):
                row |= {f"{name} {layer}": points.get(step, math.nan) for layer, points in curves.items()}
            found.append(row)
        return found


def read_run(folder: str | Path, title: str) -> Curves:
    """Read the metrics of a run folder.

    Args:
        folder: the run folder.
        title: what the run is.

    Raises:
        RecipeError: there are no metrics, or they are of a run that measured no layers or another experiment.
    """
    path = Path(folder) / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
        # A last line without an end is half a line of a run that was stopped.
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        columns = rows[0] if rows else {}
        return _curves(rows, columns, title)
    except OSError as error:
        raise RecipeError(
            f"{path} can't be read ({error}); give a folder of a run of experiment=grokking_mlp"
        ) from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RecipeError(
            f"{path} is damaged, or of another experiment ({error}); give a run of experiment=grokking_mlp"
        ) from error


def _curves(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str], title: str) -> Curves:
    """Return the curves of a run.

    Raises:
        ValueError: A column is missing, or a cell holds no number.
    """
    alphas, traps = (
        {name.removeprefix(start): _points(rows, name) for name in columns if name.startswith(start)}
        for start in (ALPHA, TRAPS)
    )
    if not alphas or "train/accuracy" not in columns:
        raise ValueError("it lacks alphas or train/accuracy")
    train, held_out, norm = (_points(rows, name) for name in ("train/accuracy", "val/accuracy", "weight_norm"))
    return Curves(title, train, held_out, norm, alphas, traps)


def _points(rows: Sequence[Mapping[str, str]], column: str) -> Points:
    """Return the values of a column by the number of steps that were done.

    Lightning counts steps from 0: what is logged at the end of an epoch bears the number of its last step. The
    layers are measured before a step.
    """
    done = 0 if column.startswith(ALPHA) else 1
    return {int(row["step"]) + done: float(row[column]) for row in rows if row.get(column)}


@styled
def draw_runs(runs: Sequence[Curves], path: PathLike | None = None) -> Figure:
    """Draw accuracies and weight norm above, alphas and traps below.

    Args:
        runs: the runs, one a column.
        path: the file to write; None to write none.
    """
    figure = new_figure(1.2 + 3.0 * len(runs), 6.6)
    grid = figure.subplots(
        4, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=[1, 0.6, 1.2, 0.6]
    )
    for run, (accuracies, norm, alphas, traps) in zip(runs, grid.T, strict=True):
        accuracies.set_title(heading(run.title))
        _draw(accuracies, run.train_accuracy, color=FAINT, label="training images")
        _draw(accuracies, run.held_out_accuracy, color="#D55E00", label="held-out images")
        _draw(norm, run.weight_norm, color="black")
        alphas.axhline(RANDOM_ALPHA, color=FAINT, linestyle=":", label="random matrix")
        for layer, colour in depth_colours(list(run.alphas)).items():
            _draw(alphas, run.alphas[layer], color=colour, label=plain(layer.removeprefix("net.")))
            _draw(traps, run.traps.get(layer, {}), color=colour)
        traps.set(xscale="log", xlabel="optimizer steps")
    for axes, label in zip(grid[:, 0], ("accuracy", "weight norm", "FARMS alpha", "traps"), strict=True):
        axes.set_ylabel(label)
    grid[0, 0].legend(loc="lower right")
    grid[2, 0].legend(loc="lower left")
    return save(figure, path)


def _draw(axes: Axes, points: Points, **look: Any) -> None:
    """Draw one curve; step 0 has no place on a logarithmic axis."""
    steps = sorted(step for step in points if step > 0)
    axes.plot(steps, [points[step] for step in steps], **look)
