"""`farms-tb plot`: pictures of a run or of a file of weights, or pictures that compare several.

Those that a run has no data for are left out; stderr says what is missing. See `farms_tb.viewing.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from farms_tb.cli.arguments import Key, Null
from farms_tb.cli.messages import complaints, say
from farms_tb.printable import printable
from farms_tb.viewing.plots.comparison import COMPARISONS, left_out, save_comparison
from farms_tb.viewing.plots.everything import FOLDER, PICTURES, check_wanted, not_drawn, save_all
from farms_tb.viewing.plots.runs import check_number
from farms_tb.viewing.run_folder import read_run_folder
from farms_tb.viewing.several_runs import read_runs


@dataclass(frozen=True)
class PlotRequest:
    """What is to be drawn, and how.

    Attributes:
        output: the folder that the pictures go to; None for the default.
        suffix: the ending of the files, `".png"`.
        pictures: names of pictures; None for all that there is data for.
        layers: names of layers whose spectra are drawn, one picture each.
        null: also measure permutation nulls.
        key: where the weights lie in files that hold several things; None to find them.
    """

    output: Path | None
    suffix: str
    pictures: Sequence[str] | None
    layers: Sequence[str]
    null: bool
    key: str | None


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="The folder of a run, finished or not; or a file of weights. Several are compared.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Default: figures in the run folder; of several runs, figures in the current folder.",
        ),
    ] = None,
    picture_format: Annotated[str, typer.Option("--format", help="png, pdf, svg, ...")] = "png",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PICTURE",
            help=f"Only this one (may be repeated): {', '.join(PICTURES)}; "
            f"of several runs: {', '.join(COMPARISONS)}.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help="Only the spectrum of this layer of one run, in full size (may be repeated)."
        ),
    ] = None,
    null: Null = False,
    key: Key = None,
) -> None:
    """Draw every picture that a run has the data for, or those of a file of weights.

    Of several runs or files it draws pictures that show all of them in one frame. Prints the path of each picture;
    what is missing is said on stderr.
    """
    pictures = only or None
    if layer and not only:
        pictures = []  # the spectra of these layers alone
    request = PlotRequest(output, f".{picture_format}", pictures, layer or (), null, key)
    with complaints():
        if len(runs) == 1:
            _plot_one(runs[0], request)
        else:
            _plot_several(runs, request)


def _plot_one(folder: Path, request: PlotRequest) -> None:
    check_wanted(request.pictures, request.suffix)
    run = read_run_folder(folder, null=request.null, key=request.key)
    saved = save_all(run, request.output, suffix=request.suffix, pictures=request.pictures, layers=request.layers)
    _print(saved)
    for sentence in run.missing if request.pictures is not None else not_drawn(run):
        say(sentence)


def _plot_several(folders: Sequence[Path], request: PlotRequest) -> None:
    if request.layers:
        raise ValueError(f"--layer draws the spectra of one run, got {len(folders)} runs: pass one of them")
    check_wanted(request.pictures, request.suffix, COMPARISONS)
    check_number(len(folders))
    runs = read_runs(folders, null=request.null, key=request.key)
    _print(save_comparison(runs, request.output or FOLDER, suffix=request.suffix, pictures=request.pictures))
    for name, run in runs.items():
        for sentence in run.missing:
            say(f"{name}: {sentence}")
    for sentence in left_out(runs):
        say(sentence)


def _print(saved: Sequence[Path]) -> None:
    for path in saved:
        print(printable(str(path)))
