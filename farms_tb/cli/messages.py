"""What the command says besides its results, on stderr, and the exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

EXIT_PART, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


@contextmanager
def complaints() -> Iterator[None]:
    """Turn the user's mistakes into one message and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise  # of `| head`, which is no mistake
    except (ValueError, TypeError, OSError, ImportError) as error:
        say(f"Error: {error}", style="red")
        raise typer.Exit(EXIT_INPUT) from error


def say(message: str, style: str = "") -> None:
    """Print a message to stderr: stdout is for results."""
    Console(stderr=True).print(Text(message, style=style), soft_wrap=True)
