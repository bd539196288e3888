"""A picture of the first samples of a data file, to see at a glance that it holds what was meant."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_preview"]

Extent = tuple[float, float, float, float]

LABELS = {
    "nu": "coefficient a",
    "tensor": "solution u",
    "density": "density",
    "pressure": "pressure",
    "Vx": "velocity",
}
COLOURS = {"nu": "cividis", "Vx": "RdBu_r"}


def draw_preview(file: Path, picture: Path, count: int = 4) -> None:
    """Draw the first samples, one a column: Darcy's coefficient and solution, or a flow's fields over x and t.

    Args:
        file: A data file in PDEBench's layout, made here or downloaded.
        picture: Where the picture goes, in the format of its ending.
        count: Samples drawn, fewer where the file has fewer.
    """
    with h5py.File(file, "r") as data:
        upwards = "t" if "t-coordinate" in data else "y"
        fields = {name: data[name][:count] for name in LABELS if name in data}
        across, up = data["x-coordinate"][:], data[f"{upwards}-coordinate"][:]
    columns, *shape = next(iter(fields.values())).shape
    if upwards == "t":
        up = up[: shape[0]]  # the files list one time more than there are frames
    extent = (*_ends(across), *_ends(up))
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.3 * len(fields) + 0.5), layout="constrained")
    grid = figure.subplots(len(fields), columns, squeeze=False, sharex=True, sharey=True)
    for (name, samples), axes in zip(fields.items(), grid, strict=True):
        axes[0].set_ylabel(f"{LABELS[name]}\n{upwards}")
        for axis, sample in zip(axes, samples, strict=True):
            values = sample
            if upwards == "y":  # (X, Y) or (1, X, Y): x is drawn to the right
                values = sample.reshape(sample.shape[-2:]).T
            _draw_field(figure, axis, values, name, extent)
    for index in range(columns):
        grid[0, index].set_title(f"sample {index}", fontsize=9)
        grid[-1, index].set_xlabel("x")
    figure.suptitle(file.name, fontsize=10)
    figure.savefig(picture, dpi=110)


def _ends(centres: np.ndarray) -> tuple[float, float]:
    """Outer edges of equal cells, given their centres."""
    half = (centres[1] - centres[0]) / 2
    return float(centres[0] - half), float(centres[-1] + half)


def _draw_field(figure: Figure, axis: Axes, values: np.ndarray, name: str, extent: Extent) -> None:
    """Draw one field, (vertical, horizontal), with its colour bar; velocity in two colours that meet at zero."""
    limits = {}
    if name == "Vx":
        limit = np.abs(values).max()
        limits = {"vmin": -limit, "vmax": limit}
    colours = COLOURS.get(name, "viridis")
    image = axis.imshow(values, origin="lower", extent=extent, aspect="auto", cmap=colours, **limits)
    bar = figure.colorbar(image, ax=axis, fraction=0.06, pad=0.03)
    for labelled in (bar.ax, axis):
        labelled.tick_params(labelsize=7)
