"""Where the recipes print."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["make_console", "progress_bar", "quiet_lightning", "warn"]

PIPE_WIDTH = 120
"""Characters in a line where the output goes to a file or a pipe, which have no width."""


def quiet_lightning(level: int) -> None:
    """Show of Lightning's messages only those of a level and above, `logging.WARNING` say.

    Args:
        level: The least level that is shown.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(level)


def warn(console: Console, text: str) -> None:
    """Print a warning in one line, whatever the width of the terminal.

    Args:
        console: Where to print.
        text: The warning; square brackets in it are no markup.
    """
    console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def make_console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; wide enough for the tables where output goes to a file.

    Of several processes that train one model the first alone prints; errors come from all.

    Args:
        stderr: Whether it prints to the standard error stream, where errors go.
    """
    from recipes.processes import process_rank  # brings Lightning: seconds to import, for what never prints

    quiet = process_rank() > 0 and not stderr
    console = Console(stderr=stderr, quiet=quiet)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, quiet=quiet, width=PIPE_WIDTH)


def progress_bar(console: Console, *left: ProgressColumn) -> Progress:
    """Return a bar that counts what is done of a task, with the time passed.

    Args:
        console: Where it is shown.
        left: Columns at its end, which say how much time is left.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *left, console=console)
