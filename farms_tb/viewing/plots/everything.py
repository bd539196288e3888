"""Draw and save the pictures of a run folder: all that it has the data for, or some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from farms_tb.viewing.names import file_name
from farms_tb.viewing.plots.curves import plot_alpha_curves, plot_ratio_curves, plot_ratio_map
from farms_tb.viewing.plots.layers import (
    plot_alpha_by_depth,
    plot_esd,
    plot_esds,
    plot_full_against_farms,
    with_histogram,
)
from farms_tb.viewing.plots.style import PathLike, check_format, plain
from farms_tb.viewing.run_folder import RunFolder, read_run_folder

FOLDER = "figures"
"""Where the pictures of a run go, in its folder."""

PICTURES = ("alpha", "lr_ratio", "lr_ratio_map", "alpha_by_depth", "full_against_farms", "esd")
"""Names of the pictures of a run."""


def check_wanted(pictures: Sequence[str] | None, suffix: str) -> None:
    """Raise a ValueError where there is no such picture, or no such format."""
    check_format(suffix)
    unknown = [name for name in pictures or () if name not in PICTURES]
    if unknown:
        raise ValueError(f"there is no picture {unknown[0]!r}: there are {', '.join(PICTURES)}")


def save_all(
    run_folder: PathLike | RunFolder,
    output_dir: PathLike | None = None,
    *,
    title: str | None = None,
    suffix: str = ".png",
    pictures: Sequence[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Draw every picture that a run folder has the data for, or some of them.

    `alpha`, `lr_ratio`, `lr_ratio_map` from what was logged; `alpha_by_depth`, `full_against_farms`, `esd` from
    the newest checkpoint. Those that cannot be drawn are left out: `read_run_folder(folder).missing` says why.

    Args:
        run_folder: the folder of a run, finished or not, a file of weights, or what `read_run_folder` made of it.
        output_dir: where the pictures go; made if it does not exist. None for `figures` in the run folder.
        title: a heading for all; None for the run's name.
        suffix: the format: `".png"` (300 dpi), `".pdf"`, `".svg"` or any that matplotlib writes.
        pictures: the names of those to draw; None for all that can be drawn.
        layers: names of layers whose spectra are also drawn, one picture each.

    Returns:
        The pictures made.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder, there is no such picture or layer or no data for it, or
            matplotlib does not know the format; or `figures` is a link to another folder.
        ImportError: matplotlib is not installed.
    """
    check_wanted(pictures, suffix)
    run = run_folder if isinstance(run_folder, RunFolder) else read_run_folder(run_folder)
    heading = plain(run.title) if title is None else title
    folder = _own_folder(run.path / FOLDER) if output_dir is None else Path(output_dir)
    drawable = _drawable(run, heading)
    chosen = list(drawable if pictures is None else pictures)
    absent = [name for name in (*chosen, *(("esd",) if layers else ())) if name not in drawable]
    if absent:
        reasons = " ".join(run.missing) or "The table of the layers says why: farms-tb analyze."
        raise ValueError(f"{run.path} has no data for the picture {absent[0]!r}. {reasons}")
    wanted = {name: drawable[name] for name in chosen} | _spectra(run, layers)
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, draw in wanted.items():
        saved.append(folder / f"{name}{suffix}")
        draw(saved[-1])
    return saved


def _spectra(run: RunFolder, layers: Sequence[str]) -> dict[str, Callable[[Path], object]]:
    """Return what draws each of these layers' spectra, after a check that all are there."""
    if run.farms is None or not layers:
        return {}
    with_histogram(run.farms, layers)
    return {f"esd_{file_name(layer)}": partial(plot_esd, run.farms, layer) for layer in layers}


def _own_folder(folder: Path) -> Path:
    """Return the folder for a run's pictures, unless a link in somebody's run would lead them elsewhere."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {folder.readlink()}: pass the folder to write to (--output)")
    return folder


def _drawable(run: RunFolder, title: str) -> dict[str, Callable[[Path], object]]:
    """Return what draws each picture that there is data for."""
    history, farms, full = run.history, run.farms, run.full
    found: dict[str, Callable[[Path], object]] = {}
    if history.alpha:
        found["alpha"] = lambda path: plot_alpha_curves(history, path, title=title)
    if history.ratio:
        found["lr_ratio"] = lambda path: plot_ratio_curves(history, path, title=title)
        found["lr_ratio_map"] = lambda path: plot_ratio_map(history, path, title=title)
    if farms is None or full is None:
        return found
    alphas = [{name for name, alpha in report.alphas.items() if alpha is not None} for report in (farms, full)]
    if alphas[0]:
        found["alpha_by_depth"] = lambda path: plot_alpha_by_depth(farms, path, title=title)
    if alphas[0] & alphas[1]:
        found["full_against_farms"] = lambda path: plot_full_against_farms(farms, full, path, title=title)
    if any(record.histogram is not None for record in farms.layers.values()):
        found["esd"] = lambda path: plot_esds(farms, path, title=title)
    return found
