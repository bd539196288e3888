"""A weight of another memory layout must cost its own layer at most.

Right: sparse and mkldnn weights are listed with the reason, and the others are measured. Second inputs: other
sparse layouts, weights on the meta device, and transposed or strided views, which are measured as what they
are.
"""

import warnings

import torch
from torch import nn

from farms_tb import analyze

warnings.simplefilter("ignore")
torch.manual_seed(0)
LAYOUTS = {
    "sparse": lambda w: w.to_sparse(),
    "compressed rows": lambda w: w.to_sparse_csr(),
    "compressed columns": lambda w: w.to_sparse_csc(),
    "blocks of rows": lambda w: w.to_sparse_bsr((8, 8)),
    "blocks of columns": lambda w: w.to_sparse_bsc((8, 8)),
    "mkldnn": lambda w: w.to_mkldnn(),
    "meta": lambda w: w.to("meta"),
}
VIEWS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "every second column": lambda w: torch.stack((w, w + 1), 2).reshape(64, 128)[:, ::2],
}


def records_with(change):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    weight = net[1].weight.detach().clone()
    net[1].weight = nn.Parameter(change(weight), requires_grad=False)
    plain = nn.Sequential(nn.Linear(64, 64))
    plain[0].weight.data = weight
    return analyze(net).layers, analyze(plain).layers["0"].alpha


for name, change in LAYOUTS.items():
    records, _ = records_with(change)
    print(name, records["1"].status)
    assert records["1"].alpha is None, name
    assert records["1"].status != "ok", name
    assert records["0"].alpha is not None, name
    assert records["2"].alpha is not None, name
for name, change in VIEWS.items():
    records, alpha = records_with(change)
    assert records["1"].alpha == alpha, name
