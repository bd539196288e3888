"""Write files whole or not at all.

Every file that a user asks for is written through `atomic_path`: under a temporary name in the target's folder,
flushed to the disk, then renamed. A reader sees the old file or the new one, never half of one, even when the
writer is killed or its disk is full. Each writer has a temporary file of its own, so several may write one target
at a time: the last one wins. A symbolic link under the target's name is replaced, not followed, so no link in a
folder can make the package overwrite a file elsewhere.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "write_text_atomically"]


@contextmanager
def atomic_path(target: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """Yield a path to write to; when the block ends without an error, the file there takes the target's name.

    Args:
        target: the file to make or to replace. Its folder must exist. A device or a pipe (`/dev/null`) is written
            to directly, since it cannot be replaced.
        mode: permissions of the file, of which the user's umask is taken away as usual.

    Yields:
        An empty file in the target's folder, called `.<start of the target's name>-<random>.part`. Writers that
        choose a format by the ending of a name must be told the format. It is removed when the block raises.

    Raises:
        OSError: the folder does not exist, cannot be written to, or its disk is full; or the target is a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/a.txt") as path:
        ...         _ = path.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    target = Path(target)
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    temporary = target.with_name(f".{target.name[:40]}-{secrets.token_hex(8)}.part")
    # O_EXCL refuses names that exist, links included.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)  # a full disk does not say which file it was
        raise


def write_text_atomically(
    target: str | os.PathLike[str], text: str, *, errors: str = "strict", mode: int = 0o666
) -> None:
    """Write text as UTF-8, whole or not at all; line ends stay as they are.

    Args:
        target: the file to make or to replace.
        text: its new content.
        errors: what becomes of characters that UTF-8 lacks (lone surrogates), as for `str.encode`.
        mode: permissions of the file.

    Raises:
        OSError: see `atomic_path`.
        UnicodeEncodeError: a character that UTF-8 lacks, with `errors="strict"`.
    """
    content = text.encode("utf-8", errors)
    with atomic_path(target, mode) as path:
        path.write_bytes(content)
