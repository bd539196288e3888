"""One HTML page of a run, to look through and to hand on: it needs no network and no server.

The page draws with its own small scripts (`SCRIPTS`), from the values that stand in it as JSON (`content.py`).
"""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

from farms_tb.atomic_write import write_text_atomically
from farms_tb.viewing.page.content import content_of
from farms_tb.viewing.run_folder import RunFolder, as_run_folder

__all__ = ["write_page"]

PAGE_FILE = "report.html"

SCRIPTS = ("page.js", "verdicts.js", "start.js")
"""Parts of the page's one script, in this order: tools and most charts, verdicts, and what puts them together."""

_HERE = Path(__file__).parent


def write_page(
    run_folder: str | os.PathLike[str] | RunFolder, output: str | os.PathLike[str] | None = None
) -> Path:
    """Write one self-contained HTML file of a run: curves, a table of the layers, their spectra, the settings.

    Args:
        run_folder: the folder of a run, finished or not, or what `read_run_folder` made of it.
        output: the file; None for `report.html` in the run folder. Its folder is made where it is not there.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder, as it holds neither curves nor a checkpoint; or it holds several
            runs.
        OSError: the file cannot be written; an earlier one is kept.
    """
    run = as_run_folder(run_folder)
    path = run.path / PAGE_FILE if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, _render(run), errors="replace")
    return path


def _render(run: RunFolder) -> str:
    """Return the page as HTML: the template with the style, the script and the values of a run filled in."""
    content = content_of(run)
    parts = {
        "title": html.escape(content["title"]),
        "css": (_HERE / "page.css").read_text(encoding="utf-8"),
        "js": "\n".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        # A `<` in the data could end the script element that holds it.
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (_HERE / "page.html").read_text(encoding="utf-8")
    # In one pass: a name may hold {{css}} itself, and what was filled in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
