"""A tensor of a file that is no matrix must cost its layer, and not the file.

Right: a nested tensor, which torch's safe mode loads, is listed with the reason, and the others are measured.
Second inputs: empty, scalar, sparse, quantized and meta tensors.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from typer.testing import CliRunner

from farms_tb import analyze_checkpoint
from farms_tb.cli.app import app

warnings.simplefilter("ignore")
torch.manual_seed(0)
ODD = {
    "nested": torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)]),
    "empty": torch.empty(0, 20),
    "no columns": torch.empty(20, 0),
    "scalar": torch.tensor(1.0),
    "sparse": torch.randn(20, 20).to_sparse(),
    "compressed sparse": torch.randn(20, 20).to_sparse_csr(),
    "quantized": torch.quantize_per_tensor(torch.randn(20, 20), 0.1, 0, torch.qint8),
    "meta": torch.empty(20, 20, device="meta"),
    "bool": torch.ones(20, 20, dtype=torch.bool),
}

with tempfile.TemporaryDirectory() as parent:
    path = Path(parent) / "m.pt"
    for name, tensor in ODD.items():
        torch.save({"a.weight": tensor, "b.weight": torch.randn(30, 20)}, path)
        records = analyze_checkpoint(path).layers
        print(name, {key: record.status for key, record in records.items()})
        assert records["b"].alpha is not None, name
        assert name == "quantized" or "a" not in records or records["a"].alpha is None, (name, records["a"])
        result = CliRunner().invoke(app, ["analyze", str(path)])
        assert result.exception is None or isinstance(result.exception, SystemExit), (name, result.exception)
