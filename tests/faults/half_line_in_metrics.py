"""A line of metrics.csv that was cut must not end the resume, nor be taken for a whole one.

A full disk or a kill cuts it.
Right: the resume leaves it out; a step of 210 that was cut to 21 is no row of step 21. Second input: the cut
may be after any byte of the file, within the head or a character of several bytes too.
"""

import os
import resource
import tempfile
from pathlib import Path

from recipes.loggers import RunFolderCSVLogger, forget_rows_after, read_rows

LIMIT = 4100


def log_until_the_disk_is_full(folder: Path) -> None:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, "the disk was never full"
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    logger = RunFolderCSVLogger(folder)
    alphas = {f"farms/alpha/layer{i}": 2.123456 for i in range(10)}
    try:
        for step in range(100):
            logger.log_metrics({**alphas, "loss": 0.5, "epoch": step // 10}, step=step)
            logger.save()
    except OSError:
        os._exit(0)
    os._exit(1)


with tempfile.TemporaryDirectory() as parent:
    path = Path(parent) / "metrics.csv"
    log_until_the_disk_is_full(path.parent)
    forget_rows_after(path, 30)
    assert all(row["step"].isdigit() for row in read_rows(path)), read_rows(path)

    path.write_bytes(b"epoch,step\r\n0,5\r\n9,21")
    forget_rows_after(path, 100)
    assert [row["step"] for row in read_rows(path)] == ["5"], read_rows(path)

    whole = "epoch,step,farms/alpha/größe\r\n0,10,2.5\r\n1,20,2.75\r\n".encode()
    rows = [
        {"epoch": "0", "step": "10", "farms/alpha/größe": "2.5"},
        {"epoch": "1", "step": "20", "farms/alpha/größe": "2.75"},
    ]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        forget_rows_after(path, 100)
        kept = read_rows(path) if path.exists() else []
        assert kept in ([], rows[:1], rows), f"the first {length} bytes give {kept}"
