"""What commands say on stderr, and their exit codes: stdout is for results.

Scripts rely on the codes, which are listed below the help of every command that measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from farms_tb.printable import printable

if TYPE_CHECKING:
    from farms_tb.cli.measuring import Reading
    from farms_tb.cli.tables import Row

EXIT_PART, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130

EXIT_CODES_HELP = """
\b
Exit codes:
    0  measured
    1  nothing could be measured, or reading stopped early;
       with --strict: some layer has no alpha
    2  wrong usage or input
  130  interrupted; what was measured until then is printed
"""


@contextmanager
def complaints() -> Iterator[None]:
    """Turn the user's mistakes into one message and exit code 2.

    It goes around what reads arguments, opens files and writes results, not around the measurement: an unexpected
    error there is a fault of the package, and keeps its traceback.

    Raises:
        typer.Exit: in place of an error that a user can make.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of `| head`, which is no mistake
    except (ValueError, TypeError, OSError, ImportError) as error:
        say(f"Error: {error}", style="red")
        raise typer.Exit(EXIT_INPUT) from error


def say(message: str, style: str = "") -> None:
    """Print a message to stderr: stdout is for results.

    Args:
        message: the message, which may hold names out of a file: control characters are shown as escapes.
        style: as rich names it, say `"red"`.
    """
    Console(stderr=True).print(Text(printable(message, keep="\n"), style=style), soft_wrap=True)


def finish(found: Sequence[Reading], rows: Sequence[Row], needed: str, strict: bool) -> None:
    """Say what went wrong, and leave with the exit code that fits.

    Args:
        found: how the reading of each model ended.
        rows: what was printed.
        needed: the column that makes a row a measured one.
        strict: whether a row without it counts as a failure.

    Raises:
        typer.Exit: always.
    """
    stopped = [part.stopped for part in found if part.stopped]
    for reason in stopped:
        say(f"Not all layers were measured: {reason}", style="red")
    if any(part.interrupted for part in found):
        raise typer.Exit(EXIT_INTERRUPTED)
    measured = [row for row in rows if row[needed] is not None]
    if not measured:
        why = "the status of each layer says why" if rows else "no weight matrix, or none of such a name"
        say(f"Nothing could be measured: {why}")
        raise typer.Exit(EXIT_PART)
    incomplete = strict and len(measured) < len(rows)
    raise typer.Exit(EXIT_PART if stopped or incomplete else 0)
