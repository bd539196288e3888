"""Every picture that a run folder has the figures for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from farms_tb.plots.curves import plot_alpha_curves, plot_ratio_curves, plot_ratio_map
from farms_tb.plots.layers import plot_alpha_by_depth, plot_esds, plot_full_against_farms
from farms_tb.plots.style import PathLike
from farms_tb.run_folder import RunFolder, read_run_folder


def save_all(
    run_folder: PathLike | RunFolder,
    output_dir: PathLike | None = None,
    *,
    title: str | None = None,
    suffix: str = ".png",
) -> list[Path]:
    """Draw every picture that a run folder has the figures for.

    `alpha`, `lr_ratio`, `lr_ratio_map` from what was logged; `alpha_by_depth`, `full_against_farms`, `esd` from
    the newest checkpoint. Those that cannot be drawn are left out: `read_run_folder(folder).missing` says why.

    Args:
        run_folder: the folder of a run, finished or not, or what `read_run_folder` made of it.
        output_dir: where the pictures go; made where it is not there. None for `figures` in the run folder.
        title: a heading for all; None for the folder's name.
        suffix: the format: `".png"` (300 dpi), `".pdf"`, `".svg"` or any that matplotlib writes.

    Returns:
        The pictures made.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder, or matplotlib does not know the format.
        ImportError: matplotlib is not installed.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else read_run_folder(run_folder)
    heading = run.path.resolve().name if title is None else title
    folder = run.path / "figures" if output_dir is None else Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, draw in _drawable(run, heading).items():
        saved.append(folder / f"{name}{suffix}")
        draw(saved[-1])
    return saved


def _drawable(run: RunFolder, title: str) -> dict[str, Callable[[Path], object]]:
    """Return what draws each picture whose figures are there."""
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
