"""`farms-tb plot`: pictures of a run or of a file of weights, or pictures that compare several.

Those that a run has no data for are left out; stderr says what is missing. See `farms_tb.viewing.plots`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_tb.cli.arguments import Key, Null
from farms_tb.cli.messages import complaints, say
from farms_tb.printable import printable
from farms_tb.viewing.plots.comparison import COMPARISONS, left_out, save_comparison
from farms_tb.viewing.plots.everything import FOLDER, PICTURES, check_wanted, not_drawn, save_all
from farms_tb.viewing.plots.runs import check_number_of_runs
from farms_tb.viewing.run_folder import read_run_folder
from farms_tb.viewing.several_runs import read_runs


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
    suffix = f".{picture_format}"
    with complaints():
        if len(runs) == 1:
            check_wanted(pictures, suffix)
            run = read_run_folder(runs[0], null=null, key=key)
            saved = save_all(run, output, suffix=suffix, pictures=pictures, layers=layer or ())
            missing = list(run.missing) if pictures is not None else not_drawn(run)
        else:
            if layer:
                raise ValueError(f"--layer draws the spectra of one run, got {len(runs)} runs: pass one of them")
            check_wanted(pictures, suffix, COMPARISONS)
            check_number_of_runs(len(runs))
            compared = read_runs(runs, null=null, key=key)
            saved = save_comparison(compared, output or FOLDER, suffix=suffix, pictures=pictures)
            missing = [f"{name}: {sentence}" for name, run in compared.items() for sentence in run.missing]
            missing += left_out(compared)
        for path in saved:
            print(printable(str(path)))
        for sentence in missing:
            say(sentence)
