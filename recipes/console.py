"""Where the recipes print."""

from __future__ import annotations

from rich.console import Console

__all__ = ["make_console"]

PIPE_WIDTH = 120


def make_console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; wide enough for the tables where output goes to a file.

    Of several processes that train one model the first alone prints; errors come from all.
    """
    from recipes.processes import process_rank  # brings Lightning: seconds to import, for what never prints

    quiet = process_rank() > 0 and not stderr
    console = Console(stderr=stderr, quiet=quiet)
    return console if console.is_terminal else Console(stderr=stderr, quiet=quiet, width=PIPE_WIDTH)
