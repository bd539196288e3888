"""Read the small files of a run: its settings, as text to show, and its scores.

They may come from somebody else and end up in a page that is handed on. Links that lead out of the run's folder
are therefore not followed, and a file that cannot be read costs its own content alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farms_tb.viewing.run_files import RunFiles

__all__ = ["read_settings", "read_summary"]

SETTINGS_FILES = ("config.yaml", "hparams.yaml")
"""Names of files with settings: of the recipes, of Lightning's loggers."""

SUMMARY_FILE = "summary.json"


def read_settings(files: RunFiles, problems: list[str]) -> str:
    """Return the text of the first file of settings, in the folder that was asked for or in the run's own.

    It is empty where there is none. `problems` gets a sentence for each file that is there and cannot be used.
    """
    for place in dict.fromkeys((files.folder, files.root)):
        for name in SETTINGS_FILES:
            content = _read_own(place / name, files.folder, problems)
            if content is not None:
                return content.decode("utf-8", "replace")
    return ""


def read_summary(files: RunFiles, problems: list[str]) -> dict[str, Any]:
    """Return the scores of a run, the content of its `summary.json`.

    There are none where there is no such file, or it holds something else than a dict. `problems` gets a sentence
    where it is there and cannot be used.
    """
    content = _read_own(files.folder / SUMMARY_FILE, files.folder, problems)
    if content is None:
        return {}
    try:
        summary = json.loads(content)
    except (ValueError, RecursionError):
        problems.append(f"{SUMMARY_FILE} is no JSON, or half written: it is left out.")
        return {}
    return summary if isinstance(summary, dict) else {}


def _read_own(path: Path, folder: Path, problems: list[str]) -> bytes | None:
    """Return the content of a file; None where there is none, it cannot be read, or a link leads out of `folder`.

    The page shows the content, and no link in somebody else's folder may bring a file of the reader's into it.
    """
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        problems.append(f"{path.name} is a link out of the folder: it is left out.")
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        problems.append(f"{path.name} can't be read, it is left out: {error.strerror}.")
        return None
