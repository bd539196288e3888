"""A file that is cut while it is measured must not kill the interpreter.

Mapped files do: reading beyond their end is SIGBUS. It happens when `torch.save` or `save_file` write onto a
name that is being read. Right: a documented error that names the file. Second input: a file that is replaced in
place by a larger one of other layers.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

READER = """
import sys
from pathlib import Path
from farms_tb.checkpoint import stored_layers, stored_tensors

path, change = Path(sys.argv[1]), sys.argv[2]
tensors = stored_tensors(path)
if change == "cut":
    with path.open("r+b") as file:
        file.truncate(100)
else:
    path.write_bytes(Path(change).read_bytes())
try:
    for _, stack in stored_layers(tensors):
        float(stack.matrices.sum())
except (ValueError, RuntimeError, OSError) as error:
    assert path.name in str(error), error
    print("refused:", error)
else:
    print("measured what is no longer there")
"""


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as parent:
    for suffix in (".pt", ".safetensors"):
        path, other = Path(parent) / f"model{suffix}", Path(parent) / f"other{suffix}"
        save({f"other.{i}.weight": torch.randn(300, 500) for i in range(6)}, other)
        for change in ("cut", str(other)):
            save({f"{i}.weight": torch.randn(400, 400) for i in range(4)}, path)
            command = [sys.executable, "-c", READER, str(path), change]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            print(suffix, change, result.returncode, result.stdout, result.stderr[-300:])
            assert result.returncode == 0, f"{path.name}, {change}: exit {result.returncode}"
            assert result.stdout.startswith("refused"), result.stdout
