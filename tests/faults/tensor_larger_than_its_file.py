"""A tensor that claims more entries than its file has must not be measured.

A view of stride 0 makes a file of 4 kB claim 10^12 entries, which would take hours. Right: a refusal, or the
layer listed as damaged, within seconds. Second inputs: overlapping views, and a safetensors file whose head
lies.
"""

import json
import multiprocessing
import struct
import tempfile
from pathlib import Path

import torch

from farms_tb import analyze_checkpoint

SECONDS = 30


def measure(path: Path) -> None:
    try:
        records = analyze_checkpoint(path).layers
    except ValueError as error:
        print("refused:", str(error)[:200])
    else:
        assert records["a"].alpha is None, records["a"]


def check(path: Path, case: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=measure, args=(path,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{case}: exit {process.exitcode}"


def write_lying_safetensors(path: Path, shape: list[int], end: int) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    head = json.dumps({"a.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(1600))


VIEWS = {
    "stride 0": torch.ones(1).expand(10**6, 10**6),
    "stride 0 in one dimension": torch.randn(1, 10**4).expand(10**6, 10**4),
    "overlapping": torch.randn(2000).as_strided((500, 500, 60, 60), (1, 1, 1, 1)),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for case, tensor in VIEWS.items():
            torch.save({"a.weight": tensor}, Path(folder) / "m.pt")
            check(Path(folder) / "m.pt", case)
        for shape, end in (
            ([10**6, 10**6], 1600),
            ([20, 20], 10**15),
            ([10**6, 10**6], 4 * 10**12),
            ([-1, 20], 1600),
        ):
            write_lying_safetensors(Path(folder) / "m.safetensors", shape, end)
            check(Path(folder) / "m.safetensors", f"{shape} of {end} bytes")
