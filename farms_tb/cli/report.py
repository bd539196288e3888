"""`farms-tb report`: a page about a run.

One HTML file that needs no network, to look through and to hand on; see `farms_tb.viewing.page`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_tb.cli.arguments import Key, Null
from farms_tb.cli.messages import complaints, say
from farms_tb.cli.output import check_output
from farms_tb.printable import printable
from farms_tb.viewing.page import write_page
from farms_tb.viewing.run_folder import read_run_folder


def report(
    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of a run, finished or not; or a file of weights.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: report.html in the run folder.")
    ] = None,
    null: Null = False,
    key: Key = None,
) -> None:
    """Write a page about a run, or about a file of weights: one HTML file with everything in it."""
    with complaints():
        if output is not None:
            check_output(output, [str(run_folder)])
        run = read_run_folder(run_folder, null=null, key=key)
        print(printable(str(write_page(run, output))))
        for sentence in run.missing:
            say(sentence)
