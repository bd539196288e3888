"""8-bit floats must be measured with the scales of their blocks, or listed as quantised.

The stored numbers alone have another spectrum. Right: the alpha of a layer of transformers' FP8Linear, and of a
weight in a file whose scales are named `scale` or `weight_scale_inv`, is that of the dequantised weight, or
there is none. The second input are scales for each row.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from farms_tb import analyze, analyze_checkpoint

torch.manual_seed(0)
spectrum = torch.diag(torch.rand(256) ** 2)
weight = (torch.randn(256, 256) @ spectrum).clamp(-400, 400).to(torch.float8_e4m3fn)
blocks = torch.tensor([[1.0, 50.0], [0.02, 3.0]])
rows = torch.logspace(-2, 2, 256)[torch.randperm(256)][:, None]


def true_alpha(scale: torch.Tensor) -> float:
    real = nn.Linear(256, 256)
    real.weight.data = weight.float() * scale
    return analyze(nn.Sequential(real)).layers["0"].alpha


def check(case: str, alpha: float | None, status: str, truth: float) -> None:
    print(case, alpha, status, "dequantised:", truth)
    assert alpha is None or abs(alpha - truth) < 0.02, case


of_blocks = true_alpha(blocks.repeat_interleave(128, 0).repeat_interleave(128, 1))
layer = FP8Linear(256, 256, block_size=(128, 128))
with torch.no_grad():
    layer.weight.copy_(weight)
    layer.weight_scale_inv.copy_(blocks)
record = analyze(nn.Sequential(nn.Linear(64, 64), layer)).layers["1"]
check("a model", record.alpha, record.status, of_blocks)

of_rows = true_alpha(rows)
with tempfile.TemporaryDirectory() as parent:
    path = Path(parent) / "m.safetensors"
    for name in ("wq.scale", "wq.weight_scale_inv", "wq.weight_scale"):
        for scale, truth in ((blocks, of_blocks), (rows, of_rows)):
            # A tensor of its own keeps the file from having no layer to measure.
            save_file({"wq.weight": weight, name: scale, "other.weight": torch.randn(64, 64)}, path)
            record = analyze_checkpoint(path).layers["wq"]
            check(f"a file with {name} {tuple(scale.shape)}", record.alpha, record.status, truth)
