"""The command `farms-tb`: measure models and files of weights, and follow a run, from a terminal.

Each command is a module (`analyze`, `compare`, `sparsity`, `prune`, `watch`, `report`, `plot`), and `app` puts
them together. Results go to stdout or a file (`output`), everything else to stderr (`messages`). Needs the extra
`cli`; the rest of the package does without.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper

from farms_tb.missing import cannot_import, missing_package

__all__ = ["main"]


def main() -> None:
    """Run the command line: what the script `farms-tb` calls.

    Raises:
        SystemExit: always, with the command's exit code; with a message where the extra `cli` is not installed.
    """
    try:
        from farms_tb.cli.app import app
    except ModuleNotFoundError as error:
        if missing_package(error) not in ("typer", "rich"):
            raise
        sys.exit(cannot_import("farms-tb", error, 'pip install "farms-tb[cli]"'))
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a file in an old encoding gets a question mark for what it cannot show, not a traceback.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
