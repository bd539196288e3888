"""Plots of predictions next to the truth, as a paper would show them, and of how the error grows with time.

Predictions are drawn in the colours that span the truth: one that runs away saturates, and the rest stays visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from farms_tb.viewing.plots.style import (
    COLOURS,
    MARKERS,
    PathLike,
    depth_colours,
    new_figure,
    save,
    spread,
    styled,
)
from recipes.metrics import relative_l2_by_sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

__all__ = ["channel_names", "plot_error_growth", "plot_fields", "plot_flow_1d", "plot_flow_2d"]

FLOW_CHANNELS = ("density", "pressure", "Vx", "Vy")
TIMES = 4
"""Frames that are shown of a flow."""

DIVERGING = "PuOr_r"  # errors: zero is white
COEFFICIENT = "cividis"


def channel_names(channels: int, dimension: int) -> tuple[str, ...]:
    """Name the channels of a compressible flow; anything else gets numbers.

    Args:
        channels: Number of channels.
        dimension: Dimensions of space. A flow has density, pressure and as many velocities as dimensions.
    """
    if channels == dimension + 2:
        return FLOW_CHANNELS[:channels]
    return tuple(f"channel {index}" for index in range(1, channels + 1))


@styled
def plot_fields(
    inputs: Tensor, targets: Tensor, predictions: Tensor, path: PathLike | None = None, *, title: str = ""
) -> Figure:
    """Draw samples in rows: input, truth, prediction and error, each column in one colour scale.

    Args:
        inputs: Coefficients (N, X, Y).
        targets: Solutions (N, X, Y).
        predictions: Predicted solutions (N, X, Y).
        path: Where to save the picture, in the format of the file's ending.
        title: A heading.

    Returns:
        The figure.
    """
    errors = predictions - targets
    figure = new_figure(7.2, 0.9 + 1.75 * len(targets))
    grid = figure.subplots(len(targets), 4, squeeze=False)
    scores = relative_l2_by_sample(predictions[:, None], targets[:, None])
    for row, score in enumerate(scores.tolist()):
        images = [
            _show(grid[row, 0], inputs[row], COEFFICIENT, inputs),
            _show(grid[row, 1], targets[row], COLOURS, targets),
            _show(grid[row, 2], predictions[row], COLOURS, targets),
            _show(grid[row, 3], errors[row], DIVERGING, errors),
        ]
        grid[row, 3].set_xlabel(f"relative L2 {score:.2g}", fontsize="small")
    for axes, heading in zip(grid[0], ("coefficient", "truth", "prediction", "prediction - truth"), strict=True):
        axes.set_title(heading, loc="center")
    for image, columns in ((images[0], grid[:, :1]), (images[1], grid[:, 1:3]), (images[3], grid[:, 3:])):
        _bar(figure, image, columns, location="bottom")
    _head(figure, title)
    return save(figure, path)


def _head(figure: Figure | SubFigure, title: str) -> None:
    """Write a heading at the left, if there is one."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")


def _show(axes: Axes, field: Tensor, colours: str, scale: Tensor, **options: Any) -> AxesImage:
    """Draw a field in colours that span the values of another, diverging ones with zero in the middle.

    Args:
        axes: Where to draw.
        field: The field, (horizontal, vertical).
        colours: Name of the colour map.
        scale: Values of any shape that the colours span. A network that diverged predicts NaN and infinity, which
            are left out.
        options: More arguments of `Axes.imshow`.

    Returns:
        The image, for a colour bar.
    """
    finite = scale[torch.isfinite(scale)]
    low = 0.0
    high = 1.0
    if len(finite):
        low = float(finite.min())
        high = float(finite.max())
    if colours == DIVERGING:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return axes.imshow(
        field.numpy().T, cmap=colours, vmin=low, vmax=high, origin="lower", interpolation="nearest", **options
    )


def _bar(figure: Figure | SubFigure, image: AxesImage, axes: np.ndarray, location: str) -> None:
    """Draw one colour bar for several axes.

    Args:
        figure: The figure, or the part of it, that the axes belong to.
        image: One of the images, which all have the same colours.
        axes: The axes, an array of any shape.
        location: "right" of them, or at their "bottom".
    """
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    form = ScalarFormatter()
    form.set_powerlimits((-3, 4))
    bar = figure.colorbar(
        image,
        ax=list(axes.flat),
        location=location,
        ticks=MaxNLocator(4),
        format=form,
        aspect=25,
        pad=0.015,
        fraction=0.05,
    )
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)


@styled
def plot_flow_1d(truth: Tensor, prediction: Tensor, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw a 1D flow, a row for each channel: truth, prediction and error in space and time, and profiles.

    Args:
        truth: Frames that were to be forecast, (T, C, X).
        prediction: The forecast, (T, C, X).
        path: Where to save the picture, in the format of the file's ending.
        title: A heading.

    Returns:
        The figure.
    """
    steps, channels, _ = truth.shape
    names = channel_names(channels, 1)
    figure = new_figure(10.0, 0.8 + 1.7 * channels)
    grid = figure.subplots(channels, 4, squeeze=False, width_ratios=(1, 1, 1, 1.35))
    chosen = spread(steps, 3)
    colours = depth_colours([str(index) for index in chosen])
    for row, name in enumerate(names):
        true = truth[:, row]
        predicted = prediction[:, row]
        error = predicted - true
        # Half a step either side, so that ticks stand in the middle of the cells.
        place = {"aspect": "auto", "extent": (0.5, steps + 0.5, 0, truth.shape[2])}
        image = _show(grid[row, 0], true, COLOURS, true, **place)
        _show(grid[row, 1], predicted, COLOURS, true, **place)
        error_image = _show(grid[row, 2], error, DIVERGING, error, **place)
        _bar(figure, image, grid[row, :2], location="right")
        _bar(figure, error_image, grid[row, 2:3], location="right")
        grid[row, 0].set_ylabel(f"{name}\ngrid point")
        for index in chosen:
            colour = colours[str(index)]
            grid[row, 3].plot(true[index], color=colour, label=f"step {index + 1}")
            grid[row, 3].plot(predicted[index], color=colour, linestyle=(0, (2, 1.5)), linewidth=1.8)
    headings = ("truth", "prediction", "prediction - truth", "truth (solid), prediction (dashed)")
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading)
    for axes in grid[-1, :3]:
        axes.set_xticks([index + 1 for index in spread(steps, 4)])
        axes.set_xlabel("forecast step")
    for axes in grid[:, 0]:
        axes.set_yticks([0, truth.shape[2]])
    grid[-1, 3].set_xlabel("grid point")
    grid[-1, 3].legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    _head(figure, title)
    return save(figure, path)


@styled
def plot_flow_2d(truth: Tensor, prediction: Tensor, path: PathLike | None = None, *, title: str = "") -> Figure:
    """Draw a 2D flow, a block for each channel: truth, prediction and error in rows, times in columns.

    Args:
        truth: Frames that were to be forecast, (T, C, X, Y).
        prediction: The forecast, (T, C, X, Y).
        path: Where to save the picture, in the format of the file's ending.
        title: A heading.

    Returns:
        The figure.
    """
    channels = truth.shape[1]
    chosen = spread(len(truth), TIMES)
    rows, columns = (channels + 1) // 2, min(channels, 2)
    figure = new_figure((0.9 + 1.15 * len(chosen)) * columns, 0.3 + 4.1 * rows)
    blocks = np.atleast_1d(figure.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.03)).ravel()
    for block, channel, name in zip(blocks, range(channels), channel_names(channels, 2), strict=False):
        steps = [index + 1 for index in chosen]
        _plot_frames(block, name, steps, truth[chosen, channel], prediction[chosen, channel])
    _head(figure, title)
    return save(figure, path)


def _plot_frames(block: SubFigure, name: str, steps: Sequence[int], truth: Tensor, prediction: Tensor) -> None:
    """Draw frames of one channel in three rows: truth, prediction and error.

    Args:
        block: The part of the figure to draw in.
        name: Name of the channel, as a heading.
        steps: Number of each frame, counted from 1, as a heading of its column.
        truth: Frames that were to be forecast, (T, X, Y).
        prediction: The forecast, (T, X, Y).
    """
    error = prediction - truth
    grid = block.subplots(3, len(steps), squeeze=False)
    for column, step in enumerate(steps):
        images = [
            _show(grid[0, column], truth[column], COLOURS, truth),
            _show(grid[1, column], prediction[column], COLOURS, truth),
            _show(grid[2, column], error[column], DIVERGING, error),
        ]
        grid[0, column].set_title(f"step {step}", loc="center", fontsize="small")
    for axes, label in zip(grid[:, 0], ("truth", "prediction", "error"), strict=True):
        axes.set_ylabel(label, fontsize="small")
    _bar(block, images[0], grid[:2], location="right")
    _bar(block, images[2], grid[2:], location="right")
    _head(block, name)


@styled
def plot_error_growth(
    errors: Tensor, baseline: Tensor, path: PathLike | None = None, *, names: Sequence[str], title: str = ""
) -> Figure:
    """Draw the error of each channel against time, and dashed that of the forecast that nothing changes.

    Args:
        errors: nRMSE (T, C).
        baseline: nRMSE of the last known frame, (T, C).
        path: Where to save the picture, in the format of the file's ending.
        names: Names of the channels.
        title: A heading.

    Returns:
        The figure.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(5.6, 3.4)
    axes = figure.add_subplot()
    steps = range(1, len(errors) + 1)
    colours = depth_colours(names)
    for channel, (name, marker) in enumerate(zip(names, MARKERS * len(names), strict=False)):
        axes.plot(steps, errors[:, channel], color=colours[name], marker=marker, label=name)
        axes.plot(steps, baseline[:, channel], color=colours[name], linestyle="--", linewidth=0.9)
    axes.plot([], [], color="0.3", linestyle="--", linewidth=0.9, label="last known frame")
    if errors.min() > 0 and baseline.min() > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("forecast step")
    axes.set_ylabel("nRMSE, mean over the test set")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)
