"""A full disk must leave no half of a picture or page under its final name.

The limit on the size of files stands for the full disk: whatever is cut short has exactly that size. Right:
each writer raises OSError, and no file of that size is left. Second input: the written files existed before,
and are still the old ones.
"""

import os
import resource
import tempfile
from pathlib import Path

import torch

from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import save_all

LIMIT = 15_000
HEAD = "epoch,step,farms/alpha/a,farms/ratio/a\n"


def write_on_a_full_disk(folder: Path) -> None:
    """Write pictures and page in a process whose files may not grow beyond the limit."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    failures = 0
    for write in (
        lambda: save_all(folder, suffix=".svg"),
        lambda: save_all(folder, suffix=".pdf"),
        lambda: save_all(folder),
        lambda: write_page(folder),
    ):
        try:
            write()
        except OSError:
            failures += 1
    os._exit(0 if failures else 1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as fresh:
    folder = Path(fresh)
    (folder / "metrics.csv").write_text(HEAD + "".join(f"{i},{i},{2 + i % 3 / 10},1\n" for i in range(200)))
    write_on_a_full_disk(folder)
    cut = [name for name, content in files(folder).items() if len(content) == LIMIT]
    assert not cut, f"cut short: {cut}"

    save_all(folder)
    write_page(folder)
    before = files(folder)
    (folder / "metrics.csv").write_text(HEAD + "".join(f"{i},{i},{3 + i % 7 / 10},1\n" for i in range(200)))
    write_on_a_full_disk(folder)
    after = files(folder)
    cut = [name for name, content in after.items() if len(content) == LIMIT]
    assert not cut, f"cut short: {cut}"
    large = [name for name, content in before.items() if len(content) > LIMIT]
    assert large, "no written file is larger than the limit, so nothing was tested"
    assert all(after[name] == before[name] for name in large), "a file was changed that could not be written"
