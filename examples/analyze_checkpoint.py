"""Measure files of weights, and compare two of them: python examples/analyze_checkpoint.py [FILE [FILE]].

Safetensors, a Hugging Face directory, a torch state dict or a Lightning checkpoint. Nothing in a file is executed.
Without arguments, two small files are made and compared: a layer before and after it got some structure.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from farms_tb import analyze_checkpoint


def make_files(folder: Path) -> list[str]:
    """Write a network, and the same with its middle layer changed by a matrix of rank 8."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    torch.save(model.state_dict(), folder / "before.pt")
    with torch.no_grad():
        model[2].weight += 0.1 * torch.randn(128, 8) @ torch.randn(8, 128)
    torch.save(model.state_dict(), folder / "after.pt")
    return [str(folder / "before.pt"), str(folder / "after.pt")]


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = sys.argv[1:] or make_files(Path(folder))
        reports = [analyze_checkpoint(file, null=True) for file in files]
    print(reports[0])
    if len(reports) > 1:
        for name, layer in reports[0].layers.items():
            after = reports[1].layers.get(name)
            if layer.alpha is not None and after is not None and after.alpha is not None:
                print(f"{name}: alpha {layer.alpha:.2f} ± {layer.alpha_error:.2f} -> {after.alpha:.2f}")
