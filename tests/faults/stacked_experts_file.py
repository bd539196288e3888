"""A weight of three dimensions in a file must not be taken for a convolution that it is not.

Right: stacked experts are measured as one matrix for each expert; a LayerNorm over three dimensions and a
Bilinear layer, which no rule measures in a model, have no alpha in a file either. Second inputs: experts under
another name, a stack for two projections in one, and a Conv1d that is one.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from farms_tb import analyze, analyze_checkpoint

torch.manual_seed(0)
experts = torch.randn(8, 96, 64) @ torch.diag(torch.arange(1, 65.0) ** -1)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "experts.safetensors"
    for name in ("moe.input_linear.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        save_file({name: experts, "other.weight": torch.randn(40, 40)}, path)
        records = analyze_checkpoint(path).layers
        stacked = next(record for key, record in records.items() if key != "other")
        print(name, stacked.shape, stacked.alpha, stacked.status)
        assert stacked.alpha is None or stacked.shape[0] == 8, (name, stacked.shape)

    layers = {
        "norm": nn.LayerNorm([32, 16, 16]),
        "bilinear": nn.Bilinear(24, 24, 32),
        "linear": nn.Linear(64, 64),
        "conv": nn.Conv1d(24, 32, 3),
    }
    net = nn.ModuleDict(layers)
    net["norm"].weight.data += 0.2 * torch.randn(32, 16, 16)
    torch.save(net.state_dict(), Path(folder) / "net.pt")
    file, live = analyze_checkpoint(Path(folder) / "net.pt").layers, analyze(net).layers
for name in layers:
    print(name, file[name].shape, file[name].alpha, live[name].alpha)
    assert file[name].shape == live[name].shape, name
    assert file[name].alpha == live[name].alpha, name
assert file["norm"].alpha is None
assert file["conv"].alpha is not None
