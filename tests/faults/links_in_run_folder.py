"""A link in somebody's run folder must not make the page write where it points.

Right: the file that a link named like the page's temporary file points at stays as it is. Second inputs: the
page itself, a picture and its folder are links to files outside.
"""

import tempfile
from pathlib import Path

from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import save_all

CURVES = "epoch,step,farms/alpha/a\n0,0,2\n1,1,2\n"


def check(link: str, write) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as outside:
        run, precious = Path(folder), Path(outside) / "precious.txt"
        precious.write_text("mine")
        (run / "metrics.csv").write_text(CURVES)
        (run / link).parent.mkdir(exist_ok=True)
        (run / link).symlink_to(precious)
        try:
            write(run)
        except OSError as error:
            print(f"{link}: refused: {error}")
        assert precious.is_file(), link
        assert precious.read_text() == "mine", f"written through {link}"


for link in ("report.html.part", "report.html"):
    check(link, write_page)
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "metrics.csv").write_text(CURVES)
    pictures = [str(path.relative_to(folder)) for path in save_all(folder)]
for link in pictures[:2]:
    check(link, save_all)
