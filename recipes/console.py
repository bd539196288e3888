"""Where the recipes print."""

from __future__ import annotations

from rich.console import Console

__all__ = ["make_console"]

PIPE_WIDTH = 120


def make_console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; wide enough for the tables where output goes to a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)
