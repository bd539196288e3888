"""`farms-tb plot`: pictures of a run or of a file of weights.

Those that a run has no data for are left out; stderr says what is missing. See `farms_tb.viewing.plots`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_tb.cli.arguments import Key, Null, RunArgument
from farms_tb.cli.messages import complaints, say
from farms_tb.viewing.names import printable
from farms_tb.viewing.plots.everything import PICTURES, check_wanted, save_all
from farms_tb.viewing.run_folder import read_run_folder


def plot(
    run_folder: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Default: figures in the run folder.")
    ] = None,
    picture_format: Annotated[str, typer.Option("--format", help="png, pdf, svg, ...")] = "png",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PICTURE", help=f"Only this one (may be repeated): {', '.join(PICTURES)}."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Only the spectrum of this layer, in full size (may be repeated)."),
    ] = None,
    null: Null = False,
    key: Key = None,
) -> None:
    """Draw every picture that a run has the data for, or those of a file of weights.

    Prints the path of each picture; what the run has no data for is said on stderr.
    """
    pictures = only or None
    if layer and not only:
        pictures = []  # the spectra of these layers alone
    suffix = f".{picture_format}"
    with complaints():
        check_wanted(pictures, suffix)
        run = read_run_folder(run_folder, null=null, key=key)
        saved = save_all(run, output, suffix=suffix, pictures=pictures, layers=layer or ())
        for path in saved:
            print(printable(str(path)))
        for sentence in run.missing:
            say(sentence)
