"""A flipped bit in a cached data file must cost the file, not the run, and never give other data.

A bit may turn the compression of the zip into one that nobody has, or say that it is encrypted. Right: the data
are made again. Second input: files that are cut short, empty, or another archive.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np

from recipes.data.cache import load_or_make, write_arrays

logging.disable(logging.WARNING)
EXPECTED = {"a": np.arange(400.0)}
DESCRIPTION = {"version": 1}


def check(path: Path, content: bytes, case: str) -> None:
    path.write_bytes(content)
    loaded = load_or_make(path, DESCRIPTION, lambda: EXPECTED)
    assert np.array_equal(loaded["a"], EXPECTED["a"]), case


with tempfile.TemporaryDirectory() as parent:
    path = Path(parent) / "x.npz"
    write_arrays(path, DESCRIPTION, EXPECTED)
    sound = path.read_bytes()
    for byte in [*range(60), *range(len(sound) - 230, len(sound))]:
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[byte] ^= 1 << bit
            check(path, bytes(damaged), f"bit {bit} of byte {byte}")
    for length in (0, 1, 30, len(sound) // 2, len(sound) - 1):
        check(path, sound[:length], f"the first {length} bytes")
    check(path, b"PK\x05\x06" + bytes(18), "an empty archive")
    np.save(Path(parent) / "y.npy", EXPECTED["a"])
    check(path, (Path(parent) / "y.npy").read_bytes(), "an array without an archive")
