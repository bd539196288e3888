"""Files that a reader finds whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move that file to `path` when the block has ended well.

    The temporary file lies in the folder of `path`, so that moving it is one step, and has a name of its own, so
    that two writers don't mix. Its content reaches the disk before its name changes: after a kill or a power cut
    `path` is the old file or the whole new one.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The path of an empty file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
