"""How a command that measures ends: what it says last, and its exit code.

Scripts rely on the codes, which are listed below every such command's help.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from farms_tb.cli.measuring import Reading
from farms_tb.cli.messages import EXIT_INTERRUPTED, EXIT_PART, say
from farms_tb.cli.tables import Row

EXIT_CODES_HELP = """
\b
Exit codes:
    0  measured
    1  nothing could be measured, or reading stopped early;
       with --strict: some layer has no alpha
    2  wrong usage or input
  130  interrupted; what was measured until then is printed
"""


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
