"""A weight of low rank must be told as one, in whatever type it is stored.

The product of two thin matrices has zero singular values; rounded to float32 or bfloat16 they are tiny instead,
and an alpha of them is one of rounding. Right: no alpha, and ratio 1. Second inputs: the product of a 192x4 and
a 4x192 matrix, and a convolution of low rank.
"""

import warnings

import torch
from torch import nn

from farms_tb import TempBalance, analyze

warnings.simplefilter("ignore")
torch.manual_seed(0)


def low_rank(rows: int, columns: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)


failures = []
for size, rank in ((64, 2), (192, 4)):
    exact = low_rank(size, size, rank)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        linear = nn.Linear(size, size, bias=False, dtype=dtype)
        linear.weight.data = exact.to(dtype)
        convolution = nn.Conv2d(size, size, 1, bias=False, dtype=dtype)
        convolution.weight.data = exact.to(dtype)[..., None, None]
        for layer in (linear, convolution):
            record = analyze(nn.Sequential(layer)).layers["0"]
            print(type(layer).__name__, size, rank, dtype, record.alpha, record.status)
            if record.alpha is not None:
                failures.append((type(layer).__name__, size, rank, dtype, record.alpha))

net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
net[2].weight.data = low_rank(64, 64, 2).float()
ratios = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map").ratios
assert not failures, failures
assert ratios["2"] == 1.0, ratios
