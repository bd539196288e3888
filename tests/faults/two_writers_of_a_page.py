"""Two writers of one file must each write all of it.

`farms-tb report` may run while the recipe that it shows ends. Right: both write the page as often as they like,
and it is whole at any moment. Second input: both write pictures.
"""

import os
import tempfile
from pathlib import Path

from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import save_all


def fork(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:  # noqa: BLE001
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def check_both(work) -> None:
    children = [fork(work) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


with tempfile.TemporaryDirectory() as parent:
    folder = Path(parent)
    (folder / "metrics.csv").write_text("epoch,step,farms/alpha/a\n0,0,2\n1,1,2\n")

    def write_pages() -> None:
        for _ in range(60):
            page = write_page(folder).read_text(encoding="utf-8")
            assert page.rstrip().endswith("</html>"), "half a page"

    def write_pictures() -> None:
        for _ in range(3):
            save_all(folder, suffix=".svg")

    check_both(write_pages)
    check_both(write_pictures)
    left = [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
    assert not left, left
