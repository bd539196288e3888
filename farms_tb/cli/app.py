"""The program `farms-tb`: its commands, each in a module of its own.

Typer reads arguments, defaults and help from the signatures and docstrings of the commands. Errors of the user's
are turned into messages by the commands themselves, see `farms_tb.cli.messages.complaints`.
"""

from __future__ import annotations

from typing import Annotated

import typer

import farms_tb
from farms_tb.cli.analyze import analyze
from farms_tb.cli.compare import compare
from farms_tb.cli.exit_codes import EXIT_CODES_HELP
from farms_tb.cli.plot import plot
from farms_tb.cli.prune import EXIT_CODES_OF_PRUNING, prune
from farms_tb.cli.report import report
from farms_tb.cli.sparsity import EXIT_CODES_OF_A_PLAN, sparsity
from farms_tb.cli.watch import watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """See how well each layer of a network is trained: FARMS alpha and what follows from it."""
    if version:
        print(farms_tb.__version__)
        raise typer.Exit


app.command(epilog=EXIT_CODES_HELP)(analyze)
app.command(epilog=EXIT_CODES_HELP)(compare)
app.command(epilog=EXIT_CODES_OF_A_PLAN)(sparsity)
app.command(epilog=EXIT_CODES_OF_PRUNING)(prune)
app.command()(watch)
app.command()(report)
app.command()(plot)
