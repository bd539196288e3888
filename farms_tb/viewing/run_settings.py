"""Read the small files of a run: its settings, as text to show, and its scores.

They may come from somebody else and end up in a page that is handed on. Links that lead out of the run's folder
are therefore not followed, and a file that cannot be read costs its own content alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farms_tb.viewing.run_files import RunFiles

__all__ = ["RunSettings", "read_settings"]

SETTINGS_FILES = ("config.yaml", "hparams.yaml")
"""Names of files with settings: of the recipes, of Lightning's loggers."""

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class RunSettings:
    """How a run was set up, and how it ended.

    Attributes:
        settings: text of the file with settings; empty where there is none.
        summary: content of `summary.json`; empty where there is none.
        problems: a sentence for each file that is there and cannot be used.
    """

    settings: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_settings(files: RunFiles) -> RunSettings:
    """Read the settings and the scores of a run.

    Args:
        files: where the run's files lie.

    Returns:
        What could be read; nothing is raised for files that are missing, damaged or links to elsewhere.
    """
    problems: list[str] = []
    settings = _settings(files, problems)
    summary = _summary(files, problems)
    return RunSettings(settings, summary, tuple(problems))


def _settings(files: RunFiles, problems: list[str]) -> str:
    """Return the first file of settings, in the folder that was asked for or in the run's own."""
    for place in dict.fromkeys((files.folder, files.root)):
        for name in SETTINGS_FILES:
            content = _read_own(place / name, files.folder, problems)
            if content is not None:
                return content.decode("utf-8", "replace")
    return ""


def _summary(files: RunFiles, problems: list[str]) -> dict[str, Any]:
    """Return the scores of a run; none where there is no file of them, or it holds something else than a dict."""
    content = _read_own(files.folder / SUMMARY_FILE, files.folder, problems)
    if content is None:
        return {}
    try:
        summary = json.loads(content)
    except (ValueError, RecursionError):
        problems.append(f"{SUMMARY_FILE} is no JSON, or half written: it is left out.")
        return {}
    if not isinstance(summary, dict):
        return {}
    return summary


def _read_own(path: Path, folder: Path, problems: list[str]) -> bytes | None:
    """Read a file of a run.

    The page shows the content, and no link in somebody else's folder may bring a file of the reader's into it.

    Args:
        path: the file.
        folder: the folder that was asked for, outside of which nothing is read.
        problems: gets a sentence where the file is there and cannot be used.

    Returns:
        Its content; None where there is no such file, it cannot be read, or a link leads out of the folder.
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
