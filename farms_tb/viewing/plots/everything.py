"""Draw and save the pictures of a run folder: all that it has the data for, or some.

`save_all` is what `farms-tb plot` calls. It checks first that everything that was asked for can be drawn, so that
a mistake costs no time and leaves no half-filled folder.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from farms_tb.report import Report
from farms_tb.viewing.names import file_name
from farms_tb.viewing.plots.curves import plot_alpha_curves, plot_ratio_curves, plot_ratio_map
from farms_tb.viewing.plots.layers import plot_alpha_by_depth, plot_full_against_farms
from farms_tb.viewing.plots.plane import plot_effect_plane, with_effect
from farms_tb.viewing.plots.spectra import plot_esd, plot_esds, with_histogram, with_outliers
from farms_tb.viewing.plots.style import PathLike, check_format
from farms_tb.viewing.run_folder import RunFolder, as_run_folder

FOLDER = "figures"
"""Where the pictures of a run go, in its folder."""

PICTURES = (
    "alpha",
    "lr_ratio",
    "lr_ratio_map",
    "alpha_by_depth",
    "effect_plane",
    "full_against_farms",
    "esd",
    "esd_full",
)
"""Names of the pictures of a run."""

_Draw = Callable[[Path], object]
"""Draws one picture and saves it under a path."""


def check_wanted(pictures: Sequence[str] | None, suffix: str, known: Sequence[str] = PICTURES) -> None:
    """Check the names of pictures and their format.

    Args:
        pictures: names out of `known`; None for all that can be drawn.
        suffix: the ending of the files, `".png"`.
        known: names of the pictures that there are.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such picture, or matplotlib writes no such files.
    """
    check_format(suffix)
    for name in pictures or ():
        if name not in known:
            raise ValueError(f"there is no picture {name!r}: there are {', '.join(known)}")


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
    the last checkpoint; with permutation nulls also `effect_plane`, and `esd_full`: the spectra of whole
    matrices, with their spikes and traps. Those that cannot be drawn are left out: `not_drawn(run)` says why.

    Args:
        run_folder: the folder of a run, finished or not, a file of weights, or what `read_run_folder` made of it.
        output_dir: where the pictures go; made if it does not exist. None for `figures` in the run folder.
        title: a heading for all, shown as it is; None for the run's name.
        suffix: the format: `".png"` (300 dpi), `".pdf"`, `".svg"` or any that matplotlib writes.
        pictures: the names of those to draw; None for all that can be drawn.
        layers: names of layers whose spectra are also drawn, one picture each; those of their whole matrices,
            too, where spikes and traps are known.

    Returns:
        The pictures made.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder, there is no such picture or layer or no data for it, or
            matplotlib does not know the format; or `figures` is a link to another folder.
        ImportError: matplotlib is not installed.
    """
    check_wanted(pictures, suffix)
    run = as_run_folder(run_folder)
    folder = _output_folder(run, output_dir)
    if title is None:
        title = run.title
    drawable = _drawable(run, title)
    chosen = drawable if pictures is None else pictures
    for name in (*chosen, *(["esd"] if layers else [])):
        if name not in drawable:
            reasons = " ".join(not_drawn(run)) or "The table of the layers says why: farms-tb analyze."
            raise ValueError(f"{run.path} has no data for the picture {name!r}. {reasons}")
    wanted = {name: drawable[name] for name in chosen}
    for name, draw in _spectra(run, layers):
        wanted[_unused(name, wanted)] = draw
    return save_pictures(wanted, folder, suffix)


def not_drawn(run: RunFolder) -> list[str]:
    """Return a sentence for each thing that there are no pictures of, those of `run.missing` first."""
    sentences = list(run.missing)
    if run.farms is None or run.full is None:
        return sentences
    known = {"effect_plane": with_effect(run.farms), "esd_full": with_outliers(run.full)}
    unknown = [name for name, layers in known.items() if not layers]
    if unknown:
        sentences.append(f"Without {' and '.join(unknown)}: this needs permutation nulls, which --null measures.")
    return sentences


def save_pictures(wanted: Mapping[str, _Draw], folder: Path, suffix: str) -> list[Path]:
    """Draw pictures, by their names, into a folder, which is made where it is not there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, draw in wanted.items():
        path = folder / f"{name}{suffix}"
        draw(path)
        saved.append(path)
    return saved


def _spectra(run: RunFolder, layers: Sequence[str]) -> Iterator[tuple[str, _Draw]]:
    """Yield a name and what draws it for each of these layers' spectra, after a check that all are there."""
    if run.farms is None or not layers:
        return
    with_histogram(run.farms, layers)
    for layer in dict.fromkeys(layers):
        yield f"esd_{file_name(layer)}", partial(plot_esd, run.farms, layer)
        if run.full is not None and layer in with_outliers(run.full):
            yield f"esd_full_{file_name(layer)}", partial(plot_esd, run.full, layer)


def _unused(name: str, taken: Container[str]) -> str:
    """Return a picture's name, with a number where another has it: `x` as a whole matrix, a layer `full_x`."""
    unused, number = name, 1
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _output_folder(run: RunFolder, output_dir: PathLike | None) -> Path:
    """Return the folder that the pictures go to: what the user names, or one in the run's folder.

    Raises:
        ValueError: `figures` in the run folder is a link. The folder may come from somebody else, and such a link
            would lead the pictures out of it.
    """
    if output_dir is not None:
        return Path(output_dir)
    folder = run.path / FOLDER
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {folder.readlink()}: pass the folder to write to (--output)")
    return folder


def _drawable(run: RunFolder, title: str) -> dict[str, _Draw]:
    """Return what draws each picture that there is data for, by its name in `PICTURES`."""
    found: dict[str, _Draw] = {}
    if run.history.alpha:
        found["alpha"] = partial(plot_alpha_curves, run.history, title=title)
    if run.history.ratio:
        found["lr_ratio"] = partial(plot_ratio_curves, run.history, title=title)
        found["lr_ratio_map"] = partial(plot_ratio_map, run.history, title=title)
    if run.farms is None or run.full is None:
        return found
    by_farms, by_full = _with_alpha(run.farms), _with_alpha(run.full)
    if by_farms:
        found["alpha_by_depth"] = partial(plot_alpha_by_depth, run.farms, title=title)
    if with_effect(run.farms):
        found["effect_plane"] = partial(plot_effect_plane, run.farms, title=title)
    if by_farms & by_full:
        found["full_against_farms"] = partial(plot_full_against_farms, run.farms, run.full, title=title)
    if any(record.histogram is not None for record in run.farms.layers.values()):
        found["esd"] = partial(plot_esds, run.farms, title=title)
    if with_outliers(run.full):
        found["esd_full"] = partial(plot_esds, run.full, title=title)
    return found


def _with_alpha(report: Report) -> set[str]:
    """Return the names of the layers that have an alpha."""
    return {name for name, alpha in report.alphas.items() if alpha is not None}
