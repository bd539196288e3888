"""Messages on stderr, and the exit codes: stdout is for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from farms_tb.printable import printable

EXIT_PART, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


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
