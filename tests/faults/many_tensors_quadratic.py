"""The time to list the tensors of a file must not grow with the square of their number.

A reader that opens the file anew for each tensor parses its head each time. Right: four times the tensors take
about four times as long; a quadratic reader takes sixteen times. Second input: the same in a file by
`torch.save`.
"""

import tempfile
import time
from pathlib import Path

import torch
from farms_tb.checkpoint import stored_layers, stored_tensors
from safetensors.torch import save_file


def read(path: Path) -> float:
    """Return the seconds of CPU that reading every layer takes."""
    begin = time.process_time()
    assert sum(1 for _ in stored_layers(stored_tensors(path))) > 0
    return time.process_time() - begin


with tempfile.TemporaryDirectory() as parent:
    for suffix in (".safetensors", ".pt"):
        took = []
        for number in (1500, 6000):
            path = Path(parent) / f"m{suffix}"
            weights = {f"layer.{i}.weight": torch.randn(6, 6) for i in range(number)}
            if suffix == ".pt":
                torch.save(weights, path)
            else:
                save_file(weights, path)
            took.append(min(read(path) for _ in range(2)))
        print(suffix, took)
        assert took[1] < 9 * took[0] + 0.5, f"{suffix}: {took}"
